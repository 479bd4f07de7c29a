"""The commands that ask and change a running proxy, as people and scripts use them."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from llama_smart_proxy.proxy.cli.main import main
from tests.support import raw_client
from tests.support.e2e_support import Fakes
from tests.support.harness import ROOT, Proxy, environment, session_proxy, until

ADMIN, USER = "key-of-the-admin-1234567890", "key-of-a-user-1234567890123"


class Ran(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str


class Commands:
    """Runs commands against a proxy, in this process."""

    def __init__(self, proxy: Proxy, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.proxy = proxy
        self._capsys = capsys
        self._monkeypatch = monkeypatch

    def __call__(self, *words: str, key: str = ADMIN) -> Ran:
        self._monkeypatch.setenv("LSP_URL", self.proxy.url)
        self._monkeypatch.setenv("LSP_API_KEY", key)
        status = main([*words])
        return Ran(status, *self._capsys.readouterr())


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """A proxy with keys, and the models `a`, `org/b:x` and `broken`, of which one has a place."""
    fakes = Fakes(tmp_path_factory.mktemp("control_cli"))
    models = {"a": fakes.model(fields={"parallel": 1}), "org/b:x": fakes.model(), "broken": fakes.model(EXIT=3)}
    keys = [{"name": "root", "key": ADMIN, "scopes": ["admin"]}, {"name": "ann", "key": USER, "models": ["a"]}]
    with session_proxy(fakes.config(models, size=1, keep_alive=600) | {"server": {"api_keys": keys}}) as proxy:
        yield proxy


@pytest.fixture
def run(own: Proxy, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Commands:
    return Commands(own, capsys, monkeypatch)


async def chat(proxy: Proxy, request_id: str, model: str = "a", **fields: Any) -> raw_client.Answer:
    fake = fields.pop("fake", {})
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "fake": fake, **fields}
    headers = [("Authorization", f"Bearer {ADMIN}"), ("X-Request-Id", request_id)]
    return await raw_client.post(proxy.port, "/v1/chat/completions", body, headers=headers)


def columns(line: str) -> list[str]:
    return re.split(r"\s{2,}", line.strip())


def test_models_are_loaded_listed_and_unloaded(run: Commands) -> None:
    assert run("load", "org/b:x") == (0, "org/b:x: loaded\n", "")
    heads, row = run("ps").out.splitlines()
    assert columns(heads) == [
        "NAME",
        "STATE",
        "SLOTS",
        "QUEUE",
        "MEM",
        "CONTEXT",
        "LOADED",
        "IDLE",
        "EXPIRES",
        "BACKEND",
    ]
    cells = dict(zip(columns(heads), columns(row), strict=True))
    assert (cells["NAME"], cells["STATE"], cells["SLOTS"], cells["QUEUE"]) == ("org/b:x", "ready", "0/4", "0")
    assert (
        cells["MEM"].endswith("iB")
        and cells["EXPIRES"].startswith(("in 9 m", "in 10 m"))
        and cells["BACKEND"] == "llama.cpp"
    )
    assert json.loads(run("ps", "--json").out)["running"][0]["model"] == "org/b:x"
    assert json.loads(run("unload", "org/b:x", "--json").out)["state"] == "unloaded"
    assert run("ps").out == "no model is loaded\n"


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["load", "none"], 1, "model 'none' not found"),
        (["load", "broken"], 1, "exited with code 3"),
        (["unload", "none"], 1, "not found"),
        (["logs", "none"], 1, "not found"),
        (["logs", "a", "-n", "-1"], 1, "lines must be a number, of at least 0"),
        (["why", "no-such-request"], 1, "'no-such-request' is known; the 10000 most recent ones are"),
        (["ps", "--url", "127.0.0.1:1"], 3, "no proxy is running at"),
        (["ps", "--key", "wrong"], 4, "the API key of --key or LSP_API_KEY is not accepted"),
    ],
)
def test_a_command_that_fails_has_one_line_of_reason_and_its_status(
    run: Commands, words: Sequence[str], status: int, text: str
) -> None:
    ran = run(*words)
    assert (ran.status, ran.out) == (status, "") and text in ran.err and ran.err.count("\n") == 1


@pytest.mark.parametrize("words", [["load", "a"], ["unload", "a"], ["logs", "a"], ["events"], ["why", "x"], ["reload"]])
def test_what_only_administrators_may_do_is_refused_to_others(run: Commands, words: Sequence[str]) -> None:
    ran = run(*words, key=USER)
    assert (ran.status, ran.out) == (4, "") and "scope admin" in ran.err


def test_others_see_the_models_that_exist_for_them_without_what_is_for_administrators(run: Commands) -> None:
    run("load", "broken")
    assert "exited with code 3" in run("ps").out
    assert json.loads(run("ps", "--json", key=USER).out)["running"] == []
    run("load", "a")
    [entry] = json.loads(run("ps", "--json", key=USER).out)["running"]
    assert entry["model"] == "a" and not {"pid", "port", "proxy", "cmd", "error", "log", "restarts"} & entry.keys()


def test_a_log_is_printed_as_far_as_it_is_asked_for(run: Commands) -> None:
    run("load", "a")
    whole = run("logs", "a").out.splitlines()
    assert whole and run("logs", "a", "-n", "1").out.splitlines() == whole[-1:]
    assert json.loads(run("logs", "a", "--json").out) == whole


@pytest.mark.parametrize("words", [["logs", "-f", "a"], ["events"]])
def test_what_is_followed_is_printed_at_once_and_ends_quietly_at_ctrl_c(
    own: Proxy, run: Commands, words: Sequence[str]
) -> None:
    run("load", "a")  # which there is something to print about
    env = environment({"LSP_URL": own.url, "LSP_API_KEY": ADMIN})
    argv = [sys.executable, "-m", "llama_smart_proxy", *words]
    process = subprocess.Popen(argv, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    finally:
        process.kill()
    assert (process.returncode, err) == (130, b"")


def test_a_reload_prints_what_has_changed_or_every_problem(run: Commands) -> None:
    file = Path(re.findall(r"configuration: (\S+config\.yaml)", run.proxy.log)[-1])
    good = file.read_text()
    assert run("reload") == (0, "reloaded: nothing has changed\n", "")
    file.write_text(json.dumps({**json.loads(good), "nonsense": 1, "log_level": "loud"}))
    ran = run("reload")
    assert (ran.status, ran.out) == (1, "")
    assert [line.partition(": ")[0] for line in ran.err.splitlines()] == [str(file)] * 2
    assert json.loads(run("reload", "--json").out)["problems"] == ran.err.splitlines()
    changed = json.loads(good)
    changed["models"]["new"] = changed["models"]["a"]
    file.write_text(json.dumps(changed))
    assert run("reload").out == "reloaded\nmodels added: new\n"
    file.write_text(good)
    assert json.loads(run("reload", "--json").out)["models_removed"] == ["new"]


# -- why ---------------------------------------------------------------------------------------------------------------


async def test_why_explains_a_load_an_eviction_and_the_answer(run: Commands) -> None:
    run("load", "org/b:x")
    assert (await chat(run.proxy, "first", stream=True, fake={"tokens": 5, "token_ms": 5})).status == 200
    ran = run("why", "first")
    assert ran.status == 0
    sentence, _, heads, *rows = ran.out.splitlines()
    assert sentence.startswith("POST /v1/chat/completions for a took ")
    assert "org/b:x was stopped to make room, as it was the least recently used idle model" in sentence
    assert "until a was loaded" in sentence and "at its server until the answer began" in sentence
    assert columns(heads) == ["STEP", "AFTER", "TOOK", "ABOUT"]
    assert {"evict", "load", "prefill", "decode"} <= {columns(row)[0] for row in rows}
    answer = json.loads(run("why", "first", "--json").out)
    assert answer["outcome"] == "ok" and answer["key"] == "root" and answer["retries"] == 0
    assert answer["times"]["load_s"] > 0 and answer["times"]["decode_s"] > 0
    assert answer["tokens"]["completion"] == 5 and answer["tokens"]["per_second"] > 0
    assert answer["times"]["first_token_s"] <= answer["total_s"]


async def test_why_names_what_a_request_is_queued_behind(run: Commands, tmp_path: Path) -> None:
    run("load", "a")
    gate = tmp_path / "gate"
    slow = asyncio.ensure_future(chat(run.proxy, "slow", fake={"last_at": str(gate)}))

    async def busy() -> bool:
        found = await asyncio.to_thread(run, "ps", "--json")
        return bool(json.loads(found.out)["running"][0]["slots"]["busy"] == 1)

    await until(busy, what="the slow request")
    waiting = asyncio.ensure_future(chat(run.proxy, "behind"))

    async def queued() -> bool:
        return "in the queue for a (behind slow)" in (await asyncio.to_thread(run, "why", "behind")).out

    await until(queued, what="the queue")
    gate.touch()
    assert (await waiting).status == (await slow).status == 200
    assert "in the queue for a (behind slow)" in run("why", "behind").out
    answer = json.loads(run("why", "behind", "--json").out)
    [step] = answer["steps"]
    assert (step["kind"], step["ahead"], step["behind"]) == ("queue", 0, ["slow"]) and step["seconds"] > 0
    assert answer["times"]["decode_s"] is None, "the answer came as a whole"


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/api/embed", {"input": "x"}),
        ("/api/chat", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/tokenize", {"content": "x"}),
    ],
)
async def test_a_load_is_explained_for_every_kind_of_request(run: Commands, path: str, fields: dict[str, Any]) -> None:
    run("unload", "a")
    headers = [("Authorization", f"Bearer {ADMIN}"), ("X-Request-Id", f"kind{path}")]
    assert (await raw_client.post(run.proxy.port, path, {"model": "a", **fields}, headers=headers)).status == 200
    assert "until a was loaded" in run("why", f"kind{path}").out


async def test_a_request_under_way_is_listed_and_explained(run: Commands, tmp_path: Path) -> None:
    run("load", "a")
    gate = tmp_path / "gate"
    asking = asyncio.ensure_future(chat(run.proxy, "going", stream=True, fake={"tokens": 3, "last_at": str(gate)}))

    async def streams() -> bool:
        found = json.loads((await asyncio.to_thread(run, "why", "going", "--json")).out or "{}")
        return found.get("outcome") == "under way" and found["times"]["decode_s"] is not None

    await until(streams, what="the stream")
    heads, row = run("ps").out.splitlines()[-2:]
    cells = dict(zip(columns(heads), columns(row), strict=True))
    assert (cells["REQUEST"], cells["KEY"], cells["MODEL"], cells["STATE"]) == ("going", "root", "a", "streaming")
    sentence = run("why", "going").out.splitlines()[0]
    assert "POST /v1/chat/completions for a has taken" in sentence and sentence.endswith("It is under way.")
    gate.touch()
    assert (await asking).status == 200


async def test_of_two_requests_with_one_id_the_newest_is_explained(run: Commands) -> None:
    assert (await chat(run.proxy, "twice")).status == 200
    assert (await chat(run.proxy, "twice", "none")).status == 404
    answer = json.loads(run("why", "twice", "--json").out)
    assert (answer["outcome"], answer["status"], answer["model"]) == ("model_not_found", 404, None)
    assert "It failed with status 404 (model_not_found)." in answer["sentence"]
