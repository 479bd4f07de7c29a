"""Models whose servers are started by commands: a real server program that is no llama-server, in a real pool."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from llama_smart_proxy.backends.base import Services, UpstreamRequest
from llama_smart_proxy.backends.commands.provider import CommandModel, Commands
from llama_smart_proxy.backends.pool.orphans import OWNER, owner_mark
from llama_smart_proxy.backends.pool.pool import Pool
from llama_smart_proxy.backends.weights.downloads import Downloads
from llama_smart_proxy.proxy.config import Config
from llama_smart_proxy.proxy.errors import StartFailed
from tests.fakes import plain_server
from tests.support.harness import free_port, logged, ports, until
from tests.support.pools import open_pool

PROGRAM = shlex.join([sys.executable, "-S", plain_server.__file__])
SERVE = f"{PROGRAM} serve --port ${{PORT}}"
STOP = f"{PROGRAM} stop"


@dataclass
class Stand:
    """The pool, its models with commands, and what their processes wrote down."""

    pool: Pool
    provider: Commands
    log: Path

    def model(self, name: str = "m") -> CommandModel:
        found = self.provider.known(name)
        assert isinstance(found, CommandModel)
        return found

    async def chat(self, name: str = "m", **fields: Any) -> str:
        body = {"model": name, "messages": [], **fields}
        model = self.model(name)
        model.prepare(body)
        request = UpstreamRequest("POST", "/v1/chat/completions", json.dumps(body).encode())
        async with model.open(request) as response:
            answer = json.loads(await response.read(1 << 20) or b"")
        return str(answer["choices"][0]["message"]["content"])

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        return [event for event in logged(self.log) if event["event"] in kinds]

    @property
    def server(self) -> psutil.Process:
        """The process that serves, or will."""
        return psutil.Process(self.events("start")[-1]["pid"])


@asynccontextmanager
async def standing(
    tmp_path: Path, *, pool: dict[str, Any] | None = None, **models: dict[str, Any]
) -> AsyncIterator[Stand]:
    log = tmp_path / "log"
    for model in models.values():
        model.setdefault("env", {})["PLAIN_LOG"] = str(log)
    server_pool = {"stop_timeout_s": 60, "load_timeout_s": 60, **ports(), **(pool or {})}
    config = Config.model_validate({"models": models, "server_pool": server_pool})
    async with open_pool(config) as opened:
        provider = Commands.create(config, Services(Downloads(), opened))
        assert provider is not None
        yield Stand(opened, provider, log)


def confined(process: psutil.Process) -> str:
    """Whether it can gain no privileges: 1 or 0."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return status.partition("NoNewPrivs:\t")[2].partition("\n")[0]


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


async def test_a_server_is_started_used_and_stopped_by_sigterm(tmp_path: Path) -> None:
    command = f"{SERVE} --name '${{MODEL_ID}} with blanks' # as a comment"
    own = {"cmd": command, "served_name": "org/big", "env": {"KEY": "${API_KEY}", "AT": "${HOST}:${PORT}"}}
    async with standing(tmp_path, m=own) as stand:
        assert await stand.chat() == "m with blanks got org/big"
        [start] = stand.events("start")
        [post] = stand.events("post")
        assert post["key"] == f"Bearer {start['env']['KEY']}" and len(start["env"]["KEY"]) > 20
        assert start["env"][OWNER] == owner_mark(), "by which a later proxy knows what is left of it"
        port = start["argv"][start["argv"].index("--port") + 1]
        assert start["env"]["AT"] == f"127.0.0.1:{port}"
        assert stand.model().state.value == "loaded" and await stand.model().slots() == 10
        process = stand.server
        assert confined(process) == "1"
        await stand.model().unload()
        assert gone(process) and [event["event"] for event in stand.events("term", "stop")] == ["term"]
        assert await stand.chat() == "m with blanks got org/big"
        assert len(stand.events("start")) == 2


async def test_it_is_ready_when_its_own_path_answers_200(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    own = {"cmd": f"{SERVE} --health /up?now --ready {ready}", "check_endpoint": "/up?now"}
    async with standing(tmp_path, m=own) as stand:
        asking = asyncio.ensure_future(stand.chat())
        await until(lambda: len(stand.events("get")) > 2, what="attempts")
        assert stand.model().state.value == "loading" and not asking.done()
        ready.touch()
        await asking
        assert {event["path"] for event in stand.events("get")} == {"/up?now"}


async def test_without_a_check_it_is_ready_once_it_accepts_connections(tmp_path: Path) -> None:
    own = {"cmd": f"{SERVE} --ready {tmp_path / 'never'}", "check_endpoint": "none"}
    async with standing(tmp_path, m=own) as stand:
        await stand.chat()
        assert stand.events("get") == []


async def test_a_server_at_a_port_and_path_of_its_own_is_found(tmp_path: Path) -> None:
    port = free_port()
    own = {"cmd": SERVE.replace("${PORT}", str(port)), "url": f"http://127.0.0.1:{port}/base", "check_endpoint": "none"}
    async with standing(tmp_path, m=own) as stand:
        await stand.chat()
        assert [event["path"] for event in stand.events("post")] == ["/base/v1/chat/completions"]


async def test_requests_beyond_the_limit_wait_their_turn(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    async with standing(tmp_path, m={"cmd": f"{SERVE} --gate {gate}", "concurrent": 2}) as stand:
        chats = [asyncio.ensure_future(stand.chat()) for _ in range(5)]
        await until(lambda: len(stand.events("post")) == 2, what="two requests")
        [status] = stand.pool.status()
        assert status["queue"] == 3
        gate.touch()
        await asyncio.gather(*chats)
        assert len(stand.events("post")) == 5


async def test_a_changed_command_is_another_server_and_a_changed_name_is_not(tmp_path: Path) -> None:
    own = {"cmd": SERVE, "env": {"PLAIN_LOG": str(tmp_path / "log")}}
    changes: list[tuple[dict[str, Any], bool]] = [
        ({}, True),
        (
            {"title": "Another", "keep_alive": 5, "served_name": "x", "filters": {"strip": ["a"]}, "aliases": ["b"]},
            True,
        ),
        ({"cmd": f"{SERVE} --name other"}, False),
        ({"cmd_stop": "true"}, False),
        ({"url": "http://127.0.0.1:${PORT}/v"}, False),
        ({"check_endpoint": "none"}, False),
        ({"env": {"A": "1"}}, False),
        ({"concurrent": 3}, False),
    ]
    async with standing(tmp_path, m=own) as stand:
        for change, same in changes:
            config = Config.model_validate({"models": {"m": own | change}})
            provider = Commands.create(config, Services(Downloads(), stand.pool))
            assert provider is not None
            [model] = provider.pooled()
            assert model.same(stand.model().model) is same, change


# -- the command that stops it -----------------------------------------------------------------------------------------


async def test_the_stop_command_ends_a_server_in_a_process_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "m.pid"
    own = {"cmd": f"{SERVE} --detach {file}", "cmd_stop": f"{STOP} {file}"}
    async with standing(tmp_path, m=own) as stand:
        await stand.chat()
        outside = psutil.Process(int(file.read_text()))
        free = confined(psutil.Process())
        assert confined(outside) == free, "what starts containers may need setuid programs"
        await stand.model().unload()
        assert gone(outside)
        assert [event["event"] for event in stand.events("stop", "term", "ignored", "client ends")] == [
            *("stop", "term", "client ends")
        ]


async def test_it_gets_the_pid_and_the_environment_and_runs_at_the_end_of_the_proxy(tmp_path: Path) -> None:
    own = {"cmd": SERVE, "cmd_stop": f"{STOP} --pid ${{PID}} ${{PORT}}-${{MODEL_ID}}"}
    async with standing(tmp_path, m=own) as stand:
        await stand.chat()
        process = stand.server
    [stop] = stand.events("stop")
    port = stand.events("start")[0]["argv"][2]
    assert stop["argv"] == ["stop", "--pid", str(process.pid), f"{port}-m"] and gone(process)


@pytest.mark.parametrize("how", ["--hang", "--refuse", "in vain"])
async def test_what_it_does_not_end_is_ended_by_signals(tmp_path: Path, how: str) -> None:
    stop = f"{STOP} {how} x" if how != "in vain" else "true"
    own = {"cmd": f"{SERVE} --deaf", "cmd_stop": stop, "stop_timeout_s": 0.8}
    async with standing(tmp_path, m=own) as stand:
        await stand.chat()
        process = stand.server
        await stand.model().unload()
        assert gone(process) and stand.events("ignored"), "SIGTERM first"


async def test_a_load_that_is_broken_off_runs_it_too(tmp_path: Path) -> None:
    file = tmp_path / "m.pid"
    own = {"cmd": f"{SERVE} --detach {file} --ready {tmp_path / 'never'}", "cmd_stop": f"{STOP} {file}"}
    async with standing(tmp_path, m=own) as stand:
        stand.pool.begin_load(stand.model().model)
        await until(lambda: stand.events("get"), what="the load")
        outside = psutil.Process(int(file.read_text()))
        await stand.model().unload()
        await until(lambda: gone(outside), what="the end")


# -- failures ----------------------------------------------------------------------------------------------------------


async def test_a_missing_program_is_a_problem_and_fails_its_requests(tmp_path: Path) -> None:
    missing = f"cmd: {tmp_path}/none: no such program, or not executable"
    async with standing(
        tmp_path, m={"cmd": f"{tmp_path}/none ${{PORT}}"}, n={"cmd": SERVE, "cmd_stop": "no-such-x"}
    ) as stand:
        assert [str(problem) for problem in await stand.provider.problems()] == [
            f"models.m: {missing}",
            "models.n: cmd_stop: no-such-x: no such program, or not executable",
        ]
        with pytest.raises(StartFailed, match="no such program"):
            await stand.chat()


async def test_a_server_that_ends_at_once_is_reported_with_its_own_words(tmp_path: Path) -> None:
    async with standing(tmp_path, m={"cmd": f"{SERVE} --fail"}) as stand:
        with pytest.raises(StartFailed, match=r"failed to load: its server .*out of luck"):
            await stand.chat()


async def test_a_server_that_never_listens_meets_the_limit_of_its_model(tmp_path: Path) -> None:
    own = {"cmd": f"{SERVE} --silent", "load_timeout_s": 0.3}
    async with standing(tmp_path, m=own) as stand:
        with pytest.raises(StartFailed, match=r"no sign of life for 0\.3 s"):
            await stand.chat()  # `standing` sees that it leaves no process


async def test_a_crash_is_noticed_and_the_next_request_starts_another_one(tmp_path: Path) -> None:
    async with standing(tmp_path, m={"cmd": SERVE}) as stand:
        await stand.chat()
        first = stand.server
        os.kill(first.pid, signal.SIGKILL)
        await until(lambda: stand.model().state.value == "unloaded", what="the crash")
        assert "crashed" in (stand.model().state.error or "")
        await stand.chat()
        assert stand.server.pid != first.pid
