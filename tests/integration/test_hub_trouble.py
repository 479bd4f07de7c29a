"""Full disks, lost connections, killed processes, lying servers: what came is kept, what is wrong never loaded."""

from __future__ import annotations

import asyncio
import hashlib
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.hub import gguf
from tests.support.harness import ROOT, environment, until
from tests.support.hub_calls import Bench, bench, calling, small_disk

__all__ = ["bench", "small_disk"]  # fixtures
SIZE = 1_000_000
PART, SLOW = 100_000, 400_000
"""At so many bytes a second there are two seconds left to break a download off that has come so far."""


def add(bench: Bench, repo: str, **manners: object) -> bytes:
    """A repository with one model of `SIZE` bytes, other ones each time."""
    data = bench.hub.add(f"{repo}/m-Q4_K_M.gguf", gguf(SIZE, seed=random.randrange(2**32)))
    bench.hub.behave(f"{repo}/m-Q4_K_M.gguf", **manners)
    return data


def fetched(bench: Bench, repo: str) -> bytes | None:
    """The bytes of the model that would be loaded."""
    path = bench.calls("locate", repo, "Q4_K_M").result
    assert (path is not None) == (f"hf.co/{repo}:Q4_K_M" in bench.calls("cached").result)
    return content(path)


def content(path: str | None) -> bytes | None:
    return Path(path).read_bytes() if path is not None else None


def ranges(bench: Bench, repo: str) -> list[str | None]:
    """What was asked for; None is everything."""
    return [request["range"] for request in bench.hub.requests(having=f"/{repo}/resolve/")]


# -- resuming ----------------------------------------------------------------------------------------------------------


def test_a_connection_that_ends_at_37_percent_is_resumed_there(bench: Bench) -> None:
    data = add(bench, "drop/once", drop=0.37, times=1)
    assert bench.calls("pull", "drop/once").message == ""
    assert fetched(bench, "drop/once") == data
    assert ranges(bench, "drop/once") == [None, f"bytes=370000-{SIZE - 1}"]


async def test_a_server_that_is_gone_for_a_moment_is_asked_again(bench: Bench) -> None:
    data = add(bench, "drop/more", drop=0.37)
    bench.calls.begin("pull", "drop/more")
    await until(lambda: len(ranges(bench, "drop/more")) >= 2)
    bench.hub.behave("drop/more/m-Q4_K_M.gguf")
    assert bench.calls.end().message == ""
    assert fetched(bench, "drop/more") == data
    assert set(ranges(bench, "drop/more")) == {None, f"bytes=370000-{SIZE - 1}"}


def test_a_server_without_ranges_is_read_from_the_start(bench: Bench) -> None:
    data = add(bench, "drop/ranges", slow=SLOW)
    bench.calls("cancel", "drop/ranges", PART)
    bench.hub.behave("drop/ranges/m-Q4_K_M.gguf", no_ranges=1)
    assert bench.calls("pull", "drop/ranges").message == ""
    assert fetched(bench, "drop/ranges") == data


@pytest.mark.full
def test_when_a_server_stays_away_the_next_pull_goes_on_where_it_was(bench: Bench) -> None:
    data = add(bench, "drop/always", drop=0.37)
    outcome = bench.calls("pull", "drop/always")
    assert (outcome.code, outcome.status) == ("download_failed", 503) and "cannot reach" in outcome.message
    assert fetched(bench, "drop/always") is None
    bench.hub.behave("drop/always/m-Q4_K_M.gguf")
    assert bench.calls("pull", "drop/always").message == ""
    assert fetched(bench, "drop/always") == data
    asked = ranges(bench, "drop/always")
    assert asked[0] is None and set(asked[1:]) == {f"bytes=370000-{SIZE - 1}"}


def test_a_download_that_is_broken_off_ends_its_thread_and_keeps_what_came(bench: Bench) -> None:
    data = add(bench, "cancelled/repo", slow=SLOW)
    assert bench.calls("cancel", "cancelled/repo", PART).result == 1
    kept = bench.partial("cancelled/repo").stat().st_size
    assert PART <= kept < SIZE and fetched(bench, "cancelled/repo") is None
    bench.hub.behave("cancelled/repo/m-Q4_K_M.gguf")
    assert bench.calls("pull", "cancelled/repo").message == ""
    assert fetched(bench, "cancelled/repo") == data
    assert ranges(bench, "cancelled/repo") == [None, f"bytes={kept}-{SIZE - 1}"]


def test_another_etag_starts_anew_and_clears_away_the_old_bytes(bench: Bench) -> None:
    add(bench, "etag/repo", slow=SLOW)
    bench.calls("cancel", "etag/repo", PART)
    old = bench.partial("etag/repo")
    data = add(bench, "etag/repo")
    assert bench.calls("pull", "etag/repo").message == ""
    assert fetched(bench, "etag/repo") == data
    assert not old.exists() and ranges(bench, "etag/repo") == [None, None]


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.full)])
async def test_after_kill_9_at_any_point_the_next_process_goes_on_with_the_next_byte(bench: Bench, kills: int) -> None:
    repo = f"killed/repo{kills}"
    data = add(bench, repo)
    folder = bench.folder(repo) / "blobs"
    points = sorted(random.sample(range(0, SIZE - 100_000, 1000), kills))
    kept = []

    def size() -> int:
        return sum(file.stat().st_size for file in folder.glob("*")) if folder.exists() else -1

    async def reached(point: int) -> None:
        await until(lambda: size() >= point, 60, what=f"byte {point}")

    for point in points:  # the hub does not go on much further, so that no process can complete the file
        bench.hub.behave(f"{repo}/m-Q4_K_M.gguf", slow=2_000_000, hold=(point + 80_000) / SIZE)
        process = start_pull(bench, f"hf.co/{repo}")
        await reached(point)
        process.kill()
        process.wait()
        kept.append(size())
        assert fetched(bench, repo) is None
    bench.hub.behave(f"{repo}/m-Q4_K_M.gguf")
    assert start_pull(bench, f"hf.co/{repo}").wait(90) == 0
    assert fetched(bench, repo) == data
    expected = [f"bytes={size}-{SIZE - 1}" if size > 0 else None for size in kept]
    asked = ranges(bench, repo)  # a process that was killed before it got so far has asked for nothing
    assert set(asked) <= {None, *expected} and asked[-1] == expected[-1]
    assert asked.count(None) <= 1 + expected.count(None)


def start_pull(bench: Bench, name: str) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", "llama_smart_proxy", "pull", name]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(argv, cwd=ROOT, env=environment(bench.hub.env(bench.home)), stdout=quiet, stderr=quiet)


# -- between the last byte and the verdict -----------------------------------------------------------------------------


def unverified(bench: Bench, repo: str, data: bytes, announced: bytes) -> Path:
    """What a process leaves that dies when all bytes are there and none is verified."""
    digest = hashlib.sha256(announced).hexdigest()
    file = bench.folder(repo) / "blobs" / f"{digest}.lsp.incomplete"
    file.parent.mkdir(parents=True)
    file.write_bytes(data)
    return file


def test_a_file_that_was_never_verified_is_verified_and_not_fetched_again(bench: Bench) -> None:
    data = add(bench, "crash/good")
    unverified(bench, "crash/good", data, data)
    assert fetched(bench, "crash/good") is None
    assert bench.calls("pull", "crash/good").message == ""
    assert fetched(bench, "crash/good") == data and ranges(bench, "crash/good") == []


@pytest.mark.parametrize("wrong", ["other bytes", "more bytes"])
def test_a_wrong_file_that_was_never_verified_is_never_loaded(bench: Bench, wrong: str) -> None:
    repo = f"crash/{wrong.partition(' ')[0]}"
    data = add(bench, repo)
    unverified(bench, repo, bytes(SIZE) if wrong == "other bytes" else data + b"x", data)
    outcome = bench.calls("pull", repo)
    if wrong == "other bytes":
        assert outcome.code == "download_failed" and "another digest" in outcome.message
        assert fetched(bench, repo) is None and not list((bench.folder(repo) / "blobs").iterdir())
        outcome = bench.calls("pull", repo)
    assert outcome.message == "" and fetched(bench, repo) == data


# -- a server that lies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        ("html", "it announced 1000000 bytes, and sends 48 bytes with status 200"),
        ("short", "it announced 1000000 bytes, and sends 999000 bytes with status 200"),
        ("long", "it announced 1000000 bytes, and sends 1001000 bytes with status 200"),
        ("more", "it sent more than the announced 1000000 bytes"),
        ("content", "another digest"),
    ],
)
def test_what_is_not_what_was_announced_is_never_loaded(bench: Bench, lie: str, said: str) -> None:
    data = add(bench, f"lies/{lie}", lie=lie)
    outcome = bench.calls("pull", f"lies/{lie}")
    assert (outcome.code, outcome.status) == ("download_failed", 503)
    assert "sent an invalid response" in outcome.message and said in outcome.message and "\n" not in outcome.message
    assert fetched(bench, f"lies/{lie}") is None
    bench.hub.behave(f"lies/{lie}/m-Q4_K_M.gguf")
    assert bench.calls("pull", f"lies/{lie}").message == ""
    assert fetched(bench, f"lies/{lie}") == data


@pytest.mark.parametrize("lie", ["range", "html"])
def test_a_resumed_download_is_not_spoilt_by_a_wrong_answer(bench: Bench, lie: str) -> None:
    repo = f"lies/resumed-{lie}"
    data = add(bench, repo, slow=SLOW)
    bench.calls("cancel", repo, PART)
    kept = bench.partial(repo).stat().st_size
    bench.hub.behave(f"{repo}/m-Q4_K_M.gguf", lie=lie, **({"no_ranges": 1} if lie == "html" else {}))
    assert bench.calls("pull", repo).code == "download_failed"
    assert bench.partial(repo).stat().st_size == kept
    bench.hub.behave(f"{repo}/m-Q4_K_M.gguf")
    assert bench.calls("pull", repo).message == ""
    assert fetched(bench, repo) == data


def test_a_file_that_is_no_gguf_is_never_loaded(bench: Bench) -> None:
    bench.hub.add("lies/pickle/m-Q4_K_M.gguf", b"\x80\x04" + bytes(1000))
    outcome = bench.calls("pull", "lies/pickle")
    assert outcome.code == "download_failed" and "not a GGUF file" in outcome.message
    assert fetched(bench, "lies/pickle") is None and not list((bench.folder("lies/pickle") / "blobs").iterdir())


# -- no space left -----------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_not_begun(bench: Bench, small_disk: Path) -> None:
    bench.hub.add("space/big/m-Q4_K_M.gguf", gguf(6_000_000))
    with calling(bench.hub.env(small_disk)) as calls:
        outcome = calls("pull", "space/big")
    assert (outcome.code, outcome.status) == ("no_space", 503)
    assert "6.00 MB are missing, 4." in outcome.message and "MB are free in" in outcome.message
    assert ranges(bench, "space/big") == []


async def test_a_disk_that_fills_up_is_an_error_and_the_download_goes_on_later(bench: Bench, small_disk: Path) -> None:
    data = bench.hub.add("space/full/m-Q4_K_M.gguf", gguf(3_000_000))
    bench.hub.behave("space/full/m-Q4_K_M.gguf", hold=0.3)
    blobs = small_disk / "hub" / "models--space--full" / "blobs"
    with calling(bench.hub.env(small_disk)) as calls:
        calls.begin("pull", "space/full")
        await until(lambda: any(file.stat().st_size >= 890_000 for file in blobs.glob("*")))
        free = shutil.disk_usage(small_disk).free
        (small_disk / "filler").write_bytes(bytes(free - 500_000))
        bench.hub.behave("space/full/m-Q4_K_M.gguf")
        outcome = await asyncio.to_thread(calls.end)
        assert (outcome.code, outcome.status) == ("no_space", 503) and "is full" in outcome.message
        assert calls("locate", "space/full", "Q4_K_M").result is None
        (small_disk / "filler").unlink()
        (kept,) = [file.stat().st_size for file in blobs.iterdir()]
        assert calls("pull", "space/full").message == ""
        assert content(calls("locate", "space/full", "Q4_K_M").result) == data
    assert kept > 900_000 and ranges(bench, "space/full") == [None, f"bytes={kept}-2999999"]
