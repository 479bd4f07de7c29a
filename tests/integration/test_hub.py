"""Models are fetched from a hub, each once, and what cannot be had is told apart."""

from __future__ import annotations

import hashlib
from pathlib import Path
from socket import AF_INET

import psutil
import pytest

from llama_smart_proxy.backends.weights import hub as backends_hub
from llama_smart_proxy.backends.weights.hub_http import INTERNET, MACHINE, NETWORK, NOWHERE, reach
from tests.fakes.hub import Hub, gguf, running_hub
from tests.support.hub_calls import Bench, Calls, Outcome, bench, calling

__all__ = ["bench"]  # fixture


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def located(calls: Calls, repo: str, variant: str = "Q4_K_M") -> Path | None:
    path = calls("locate", repo, variant).result
    return Path(path) if path is not None else None


# -- fetching ----------------------------------------------------------------------------------------------------------


def test_a_model_is_fetched_and_its_progress_told_in_the_words_of_ollama(bench: Bench) -> None:
    data = bench.hub.add("plain/repo/m-Q4_K_M.gguf", gguf(1_000_000))
    bench.hub.add("plain/repo/m-Q8_0.gguf", gguf(10))
    assert located(bench.calls, "plain/repo") is None
    outcome = bench.calls("pull", "plain/repo")
    assert outcome.message == ""
    path = located(bench.calls, "plain/repo")
    assert path is not None and path.read_bytes() == data
    statuses = list(dict.fromkeys(progress["status"] for progress in outcome.progress))
    digest = sha256(data)
    assert statuses == [
        "pulling manifest",
        f"pulling {digest[:12]}",
        "verifying sha256 digest",
        "writing manifest",
    ]
    told = [progress for progress in outcome.progress if "total" in progress]
    assert {(progress["digest"], progress["total"]) for progress in told} == {(f"sha256:{digest}", len(data))}
    sizes = [progress["completed"] for progress in told]
    assert sizes == sorted(sizes) and sizes[-1] == len(data)


def test_what_is_there_is_not_fetched_again(bench: Bench) -> None:
    bench.hub.add("twice/repo/m-Q4_K_M.gguf", gguf(1000))
    for _ in range(2):
        assert bench.calls("pull", "twice/repo").message == ""
    assert len(bench.hub.requests(having="/twice/repo/resolve/")) == 1


def test_a_split_model_is_there_only_with_all_its_parts(bench: Bench) -> None:
    first, second = "big-Q8_0-00001-of-00002.gguf", "big-Q8_0-00002-of-00002.gguf"
    bench.hub.add(f"split/repo/q8/{first}", gguf(1000, 1))
    bench.hub.add(f"split/repo/q8/{second}", gguf(1000, 2))
    bench.hub.behave(f"split/repo/q8/{second}", status=404, error="EntryNotFound")
    assert bench.calls("pull", "split/repo", "Q8_0").code == "model_not_found"
    assert located(bench.calls, "split/repo", "Q8_0") is None
    bench.hub.behave(f"split/repo/q8/{second}")
    assert bench.calls("pull", "split/repo", "Q8_0").message == ""
    path = located(bench.calls, "split/repo", "Q8_0")
    assert path is not None and path.name == first and path.with_name(second).is_file()
    assert len(bench.hub.requests(having=first)) == 1


def test_a_small_file_that_is_not_in_lfs_is_verified_by_its_git_digest(bench: Bench) -> None:
    data = bench.hub.add("small/repo/m-Q4_K_M.gguf", gguf(500))
    bench.hub.behave("small/repo", no_lfs=1)
    assert "verifying sha1 digest" in [p["status"] for p in bench.calls("pull", "small/repo").progress]
    path = located(bench.calls, "small/repo")
    assert path is not None and path.read_bytes() == data


def test_a_newer_version_is_fetched_by_a_pull_and_is_the_one_that_is_used(bench: Bench) -> None:
    bench.hub.add("newer/repo/m-Q4_K_M.gguf", gguf(1000, 1))
    bench.calls("pull", "newer/repo")
    data = bench.hub.add("newer/repo/m-Q4_K_M.gguf", gguf(1000, 2))
    bench.calls("pull", "newer/repo")
    path = located(bench.calls, "newer/repo")
    assert path is not None and path.read_bytes() == data


def test_fifty_who_want_the_same_model_share_one_download(bench: Bench) -> None:
    bench.hub.add("fifty/repo/m-Q4_K_M.gguf", gguf(600_000))
    bench.hub.behave("fifty/repo/m-Q4_K_M.gguf", slow=2_000_000)
    streams = bench.calls("watch", "fifty/repo", 50).result
    assert len(streams) == 50
    for stream in streams:
        sizes = [progress["completed"] for progress in stream if "completed" in progress]
        assert stream[-1] == {"status": "success"} and sizes and sizes == sorted(sizes)
    assert len(bench.hub.requests(having="/fifty/repo/resolve/")) == 1


def test_two_programs_that_want_the_same_file_fetch_it_once(bench: Bench) -> None:
    bench.hub.add("shared/repo/m-Q4_K_M.gguf", gguf(600_000))
    bench.hub.behave("shared/repo/m-Q4_K_M.gguf", slow=2_000_000)
    with calling(bench.hub.env(bench.home)) as other:
        for calls in (bench.calls, other):
            calls.begin("pull", "shared/repo")
        assert [calls.end().message for calls in (bench.calls, other)] == ["", ""]
    assert len(bench.hub.requests(having="/shared/repo/resolve/")) == 1


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("hf.co/org/repo:Q8_0", ("org/repo", "Q8_0")),
        ("huggingface.co/org/repo.v2-GGUF:dir/m-Q8_0.gguf", ("org/repo.v2-GGUF", "dir/m-Q8_0.gguf")),
        ("HF.co/Org/Repo", ("Org/Repo", "Q4_K_M")),
        ("hf.co/org/repo:latest", ("org/repo", "Q4_K_M")),
        *((name, None) for name in ("qwen3", "org/repo", "hf.co/repo", "hf.co/a/b/c", "hf.co/org/", "hf.co//repo")),
        *((f"hf.co/{repo}", None) for repo in ("../x", "a/..", "a/b..c", "a/.b", "-a/b", "a/b\0", "a/b\n", "a--b/c")),
        *((f"hf.co/a/b:{variant}", None) for variant in ("", "../x", "/etc/x", "x/../y", "a\0", "a\\b", "a//b", ".x")),
        (f"hf.co/a/{'b' * 95}", None),
    ],
)
def test_a_name_of_the_hub_cannot_lead_anywhere_else(name: str, parsed: tuple[str, str] | None) -> None:
    assert backends_hub.parse_name(name) == parsed


@pytest.mark.parametrize("name", ["../../evil.gguf", "/evil.gguf", "a/../../evil.gguf", "a\\evil.gguf", "e\0vil.gguf"])
def test_a_hub_cannot_name_a_file_outside_of_the_cache(bench: Bench, name: str) -> None:
    file = f'{{"rfilename": {name!r}, "size": 4, "lfs": {{"sha256": "{"a" * 64}", "size": 4, "pointerSize": 1}}}}'
    siblings = file.replace("'", '"').replace("\\x00", "\\u0000")
    bench.hub.add("evil/repo/x", b"")
    bench.hub.behave("evil/repo", info=f'{{"id": "evil/repo", "sha": "{"b" * 40}", "siblings": [{siblings}]}}')
    outcome = bench.calls("pull", "evil/repo", "evil.gguf")
    assert outcome.code == "model_not_found" and "it contains no GGUF files" in outcome.message


# -- errors that say which ---------------------------------------------------------------------------------------------


def test_a_missing_repository_is_named(bench: Bench) -> None:
    outcome = bench.calls("pull", "no/such")
    assert (outcome.code, outcome.status) == ("model_not_found", 404)
    assert "there is no repository no/such at http://127.0.0.1" in outcome.message
    assert bench.calls("pull", "not a repository").code == "model_not_found"


@pytest.mark.parametrize(
    ("variant", "wrong"),
    [("Q2_K", "no file fits variant 'Q2_K'; a-Q4_0.gguf, b-Q4_0.gguf"), ("Q4_0", "several files fit variant 'Q4_0'; ")],
)
def test_an_unclear_variant_names_the_candidates(bench: Bench, variant: str, wrong: str) -> None:
    for name in "ab":
        bench.hub.add(f"unclear/repo/{name}-Q4_0.gguf", gguf(10))
    outcome = bench.calls("pull", "unclear/repo", variant)
    assert (outcome.code, outcome.status) == ("model_not_found", 404)
    assert wrong in outcome.message and "a-Q4_0.gguf, b-Q4_0.gguf" in outcome.message


def test_a_gated_repository_says_what_to_do_about_it(bench: Bench) -> None:
    bench.hub.add("gated/repo/m-Q4_K_M.gguf", gguf(1000))
    bench.hub.behave("gated/repo", token="hf_good")
    outcome = bench.calls("pull", "gated/repo")
    assert (outcome.code, outcome.status) == ("model_gated", 403)
    assert "gated: accept its terms at http" in outcome.message and "and set HF_TOKEN" in outcome.message
    with calling(bench.hub.env(bench.home, HF_TOKEN="hf_bad")) as calls:
        outcome = calls("pull", "gated/repo")
        assert outcome.code == "model_gated" and "with the account of the token" in outcome.message
    with calling(bench.hub.env(bench.home, HF_TOKEN="hf_good")) as calls:
        assert calls("pull", "gated/repo").message == ""


def test_offline_says_so_and_what_is_cached_still_works(bench: Bench) -> None:
    bench.hub.add("offline/repo/m-Q4_K_M.gguf", gguf(1000))
    bench.calls("pull", "offline/repo")
    before = len(bench.hub.requests(having=""))
    with calling(bench.hub.env(bench.home, HF_HUB_OFFLINE="1")) as calls:
        assert located(calls, "offline/repo") is not None
        outcome = calls("pull", "offline/repo")
        assert (outcome.code, outcome.status) == ("download_failed", 503) and "HF_HUB_OFFLINE" in outcome.message
    assert len(bench.hub.requests(having="")) == before


def test_a_hub_that_is_not_there_or_silent_or_broken_is_told_apart(bench: Bench, tmp_path: Path) -> None:
    with running_hub(tmp_path / "gone") as gone:
        env = gone.env(tmp_path / "home")
    with calling(env) as calls:
        outcome = calls("pull", "org/repo")
        assert (outcome.code, outcome.status) == ("download_failed", 503)
        assert f"cannot reach {gone.url}" in outcome.message and "\n" not in outcome.message
    bench.hub.add("mute/repo/m-Q4_K_M.gguf", gguf(1000))
    bench.hub.behave("mute/repo", mute=1)
    with calling(bench.hub.env(bench.home, HF_HUB_ETAG_TIMEOUT="1")) as calls:
        outcome = calls("pull", "mute/repo")
        assert outcome.status == 504 and "did not answer in time" in outcome.message
    bench.hub.behave("mute/repo", status=500)
    assert "answered with status 500" in bench.calls("pull", "mute/repo").message


def test_an_answer_that_describes_no_repository_is_no_crash(bench: Bench) -> None:
    bench.hub.add("odd/repo/m-Q4_K_M.gguf", gguf(10))
    sha, sibling = "b" * 40, '{"rfilename": "m-Q4_K_M.gguf", "size": 10, "lfs": {"sha256": "../x", "size": 10}}'
    for info in ("<html>", "[]", '{"id": 7}', '{"id": "odd/repo", "sha": "../.."}', f'{{"id": "o", "sha": "{sha}"}}'):
        bench.hub.behave("odd/repo", info=info)
        outcome = bench.calls("pull", "odd/repo")
        assert outcome.code in ("download_failed", "model_not_found"), info
    bench.hub.behave("odd/repo", info=f'{{"id": "odd/repo", "sha": "{sha}", "siblings": [{sibling}]}}')
    assert bench.calls("pull", "odd/repo").code == "download_failed"


# -- where requests go -------------------------------------------------------------------------------------------------


def test_the_token_goes_to_the_hub_and_nowhere_else(bench: Bench, tmp_path: Path) -> None:
    data = bench.hub.add("token/repo/m-Q4_K_M.gguf", gguf(1000))
    bench.hub.behave("token/repo", token="hf_secret")
    with running_hub(tmp_path / "cdn") as cdn:
        cdn.add("token/repo/m-Q4_K_M.gguf", data)
        bench.hub.behave("token/repo/m-Q4_K_M.gguf", redirect=f"{cdn.url}/cdn/{{path}}?signed=1")
        with calling(bench.hub.env(bench.home, HF_TOKEN="hf_secret")) as calls:
            assert calls("pull", "token/repo").message == ""
            assert located(calls, "token/repo") is not None
        assert [request["auth"] for request in cdn.requests(having="")] == [None]
    assert {request["auth"] for request in bench.hub.requests(having="token/repo")} == {"Bearer hf_secret"}


def refused_redirect(hub: Hub, home: Path, target: str) -> Outcome:
    hub.add("away/repo/m-Q4_K_M.gguf", gguf(1000))
    hub.behave("away/repo/m-Q4_K_M.gguf", redirect=target)
    with calling(hub.env(home)) as calls:
        return calls("pull", "away/repo")


def test_a_redirect_into_this_machine_is_not_followed(tmp_path: Path) -> None:
    addresses = [nic.address for nics in psutil.net_if_addrs().values() for nic in nics if nic.family == AF_INET]
    own = next((address for address in addresses if reach(address) == NETWORK), None)
    if own is None:
        pytest.skip("this machine has no address in a private network")
    with running_hub(tmp_path / "hub", own) as hub, running_hub(tmp_path / "canary") as canary:
        outcome = refused_redirect(hub, tmp_path / "home", f"{canary.url}/cdn/{{path}}")
        assert outcome.code == "download_failed" and "redirects to 127.0.0.1" in outcome.message
        assert canary.requests(having="") == []


@pytest.mark.parametrize("target", ["http://169.254.169.254/latest/meta-data", "file:///etc/passwd", "{hub}"])
def test_a_redirect_to_nowhere_or_in_a_circle_is_an_error(bench: Bench, tmp_path: Path, target: str) -> None:
    circle = f"{bench.hub.url}/away/repo/resolve/main/m-Q4_K_M.gguf"
    outcome = refused_redirect(bench.hub, tmp_path, target.replace("{hub}", circle))
    assert outcome.code == "download_failed" and "redirects" in outcome.message


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        *((host, INTERNET) for host in ("8.8.8.8", "2606:4700::1111", "64:ff9b::808:808", "no-such-host.invalid")),
        *((host, NETWORK) for host in ("10.1.2.3", "192.168.1.1", "172.16.0.1", "100.64.0.1", "fd00::1", "fec0::1")),
        *((host, MACHINE) for host in ("127.0.0.1", "127.1", "2130706433", "0x7f.1", "::1", "::ffff:127.0.0.1")),
        *((host, MACHINE) for host in ("64:ff9b::7f00:1", "localhost")),
        *((host, NOWHERE) for host in ("169.254.169.254", "fe80::1", "224.0.0.1", "ff02::1", "0.0.0.0", "::")),
        *((host, NOWHERE) for host in ("2002:7f00:1::", "2001:0:1::1")),
    ],
)
def test_how_far_away_an_address_is_cannot_be_disguised(host: str, expected: int) -> None:
    assert reach(host) == expected
