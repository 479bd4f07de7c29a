"""Servers that cannot start, never get ready, will not end, flood their output; and what a server may know of us."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.support import raw_client
from tests.support.e2e_support import (
    Fakes,
    chat,
    embedded,
    fakes,
    instance,
    live_children,
    needs_llama_cpp,
    owned_by,
    state,
    streaming,
    tiny,
    watched_health,
)
from tests.support.gguf_fixture import tiny_models
from tests.support.harness import ports, running_proxy, until
from tests.support.toxic import RawUpstream, plain, raw_upstream

__all__ = ["fakes", "tiny_models"]  # fixtures


async def test_a_llama_server_on_path_is_what_is_spawned(fakes: Fakes) -> None:
    config = fakes.config({"m": fakes.model()})
    del config["llama_cpp"]
    async with running_proxy(config, env={"PATH": f"{fakes.server.parent}{os.pathsep}{os.environ['PATH']}"}) as proxy:
        assert (await chat(proxy, "m")).status == 200
    (start,) = fakes.events("start")
    assert start["argv"][:2] == ["--model", str(fakes.gguf)]


# -- servers that end at once ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "told"),
    [("1", "exited with code 1"), ("132", "exited with code 132 (SIGILL)"), ("SIGSEGV", "was killed by SIGSEGV")],
)
async def test_a_server_that_ends_at_once_is_a_503_and_its_last_words_are_for_the_operator(
    fakes: Fakes, how: str, told: str
) -> None:
    async with running_proxy(fakes.config({"m": fakes.model(EXIT=how)})) as proxy:
        answer = await chat(proxy, "m", stream=True)  # long before `load_timeout_s` is over
        assert answer.status == 503 and answer.header("content-type") == "application/json"
        assert sorted(answer.error) == ["code", "message", "param", "type"]
        assert (answer.error["type"], answer.error["code"]) == ("unavailable_error", "model_load_failed")
        assert (
            answer.error["message"] == f"Model 'm' failed to load: its server {told}; /health shows the end of its log."
        )
        (entry,) = (await proxy.health())["instances"]
        assert entry["log"][-1] == f"fake: about to end by {how}"
        assert int(answer.header("retry-after") or 0) >= 1


async def test_all_who_wait_are_told_and_a_crash_loop_is_throttled(fakes: Fakes) -> None:
    async with running_proxy(fakes.config({"bad": fakes.model(EXIT=1), "good": fakes.model()})) as proxy:
        assert (await chat(proxy, "good")).status == 200

        async def tried_again() -> bool:
            bad = await asyncio.gather(*(chat(proxy, "bad") for _ in range(10)))
            assert {answer.status for answer in bad} == {503}
            assert all("exited with code 1" in answer.error["message"] for answer in bad)
            assert (await chat(proxy, "good")).status == 200
            return len(fakes.events("start")) > 1 + 1

        await until(tried_again, what="another try")
        for _ in range(10):
            await tried_again()
        assert len(fakes.events("start")) <= 1 + 3, "three tries in a minute at most"
        assert await state(proxy, "good") == "loaded"


@needs_llama_cpp
async def test_llama_cpps_own_words_about_a_corrupt_file_reach_the_client(
    tmp_path: Path, tiny_models: dict[str, Path]
) -> None:
    corrupt = tmp_path / "cut.gguf"
    corrupt.write_bytes(tiny_models["tiny-a"].read_bytes()[:200_000])
    models = {"cut": tiny(corrupt), "whole": tiny(tiny_models["tiny-a"]), "gone": {"path": str(tmp_path / "no.gguf")}}
    async with running_proxy(embedded(models)) as proxy:
        answer = await chat(proxy, "cut")
        assert answer.status == 503 and "llama.cpp could not start" in answer.error["message"]
        assert "Traceback" not in answer.error["message"]
        missing = await chat(proxy, "gone")
        assert missing.status == 503 and "no such file" in missing.error["message"]
        assert (await chat(proxy, "whole", max_tokens=2)).status == 200


@needs_llama_cpp
async def test_an_unknown_flag_is_told_by_name(tiny_models: dict[str, Path]) -> None:
    async with running_proxy(embedded({"m": tiny(tiny_models["tiny-a"], "--frobnicate")})) as proxy:
        answer = await chat(proxy, "m")
        assert answer.status == 503 and "--frobnicate" in answer.error["message"]


# -- servers that never get ready --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["nobind", "mute", "503"])
async def test_a_server_that_never_gets_ready_is_given_up(fakes: Fakes, how: str) -> None:
    async with running_proxy(fakes.config({"m": fakes.model(NEVER=how)}, load_timeout_s=0.7)) as proxy:
        started = time.monotonic()
        answer = await chat(proxy, "m")
        took = time.monotonic() - started
        assert answer.status == 504 and answer.error["code"] == "model_load_timeout", answer.body
        assert took >= 0.7
        await until(lambda: owned_by(proxy.pid) == [], what="the end of the server")


async def test_a_slow_load_that_shows_signs_of_life_is_waited_for(fakes: Fakes) -> None:
    model = fakes.model(LOAD_S=5.5, LOG_LOAD=1)  # the limit leaves time to start Python on a busy machine
    async with running_proxy(fakes.config({"m": model}, load_timeout_s=5.0)) as proxy:
        assert (await chat(proxy, "m")).status == 200


# -- foreign servers on our ports --------------------------------------------------------------------------------------


@asynccontextmanager
async def foreign_servers(number: int) -> AsyncIterator[tuple[int, list[RawUpstream]]]:
    """The first port of a range whose first ports have servers on them that are healthy to whoever asks."""
    for _ in range(20):
        start = ports()["port_start"]
        async with AsyncExitStack() as stack:
            with suppress(OSError):
                script = plain(b'{"status":"ok"}')
                servers = [await stack.enter_async_context(raw_upstream(script, port=start + n)) for n in range(number)]
                yield start, servers
                return
    raise AssertionError("no range of ports is free")


async def test_a_foreign_server_on_our_port_is_never_sent_a_request(fakes: Fakes) -> None:
    async with foreign_servers(3) as (start, servers):
        config = fakes.config({"m": fakes.model()}, port_start=start, port_end=start + 5)
        async with running_proxy(config) as proxy:
            assert (await chat(proxy, "m")).status == 200
            assert (await instance(proxy, "m"))["port"] >= start + 3
        assert [server.requests for server in servers] == [[], [], []]


async def test_without_a_free_port_a_request_fails_at_once(fakes: Fakes) -> None:
    async with foreign_servers(2) as (start, servers):
        config = fakes.config({"m": fakes.model()}, port_start=start, port_end=start + 1)
        async with running_proxy(config) as proxy:
            answer = await chat(proxy, "m")  # long before `queue_timeout_s` is over
            assert answer.status == 503 and answer.error["code"] == "no_free_port"
            await servers[0].stop()
        assert [server.requests for server in servers] == [[], []]


# -- servers that will not end -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("manner", ["IGNORE_TERM", "FORK"])
async def test_a_server_that_ignores_sigterm_or_forks_is_gone_in_time(fakes: Fakes, manner: str) -> None:
    async with running_proxy(fakes.config({"m": fakes.model(fields=None, **{manner: 1})}, stop_timeout_s=0.5)) as proxy:
        await chat(proxy, "m")
        assert len(owned_by(proxy.pid)) == (2 if manner == "FORK" else 1)
        assert (await raw_client.post(proxy.port, "/models/unload", {"model": "m"})).status == 200
        await until(lambda: owned_by(proxy.pid) == [], what="the end of the process group")
        assert (await chat(proxy, "m")).status == 200
        await raw_client.post(proxy.port, "/models/unload", {"model": "m"})


async def test_a_grandchild_that_left_the_group_with_the_output_pipe_hangs_nothing(fakes: Fakes) -> None:
    async with running_proxy(fakes.config({"m": fakes.model(FORK="setsid")}, stop_timeout_s=0.5)) as proxy:
        await chat(proxy, "m")
        (grandchild,) = [event["pid"] for event in fakes.events("fork")]
        try:
            assert (await raw_client.post(proxy.port, "/models/unload", {"model": "m"})).status == 200
            assert await state(proxy, "m") == "unloaded" and (await instance(proxy, "m")) == {}
        finally:
            os.kill(grandchild, signal.SIGKILL)


# -- a server that floods its output -----------------------------------------------------------------------------------


async def flooded(fakes: Fakes, seconds: float) -> None:
    models = {"noisy": fakes.model(SPAM=100), "calm": fakes.model(TOKENS=5)}
    async with running_proxy(fakes.config(models)) as proxy:
        await chat(proxy, "calm")
        await chat(proxy, "noisy")
        before, ends = proxy.rss_bytes(), time.monotonic() + seconds
        async with watched_health(proxy):
            while time.monotonic() < ends:
                for name in models:
                    assert (await chat(proxy, name)).status == 200
        assert proxy.rss_bytes() - before < 16 * 2**20


async def test_a_server_that_floods_its_output_disturbs_nobody(fakes: Fakes) -> None:
    await flooded(fakes, 2.0)


@pytest.mark.full
async def test_ten_seconds_of_flood_disturb_nobody(fakes: Fakes) -> None:
    await flooded(fakes, 10.0)


# -- what a server gets from us ----------------------------------------------------------------------------------------

SECRETS = {
    "HF_TOKEN": "hf-secret",
    "OPENAI_API_KEY": "sk-secret",
    "HTTPS_PROXY": "http://secret.invalid",
    "AIP_HTTP_PORT": "1",
    "LLAMA_ARG_PORT": "1",
    "LSP_SERVER__HEAD_TIMEOUT_S": "9",
    "LLAMA_API_KEY": "not-this-one",
}


def proc(pid: int, file: str) -> str:
    return Path(f"/proc/{pid}/{file}").read_text()


def environ(pid: int) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in proc(pid, "environ").split("\0") if "=" in pair)


def kernel_objects(pid: int) -> set[str]:
    """The sockets, pipes and the like that a process has open, by their kernel names."""
    found = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            found.add(os.readlink(fd))
    return {name for name in found if name.startswith(("socket:", "pipe:", "anon_inode:[event"))}


async def test_a_server_inherits_nothing_it_should_not_have(fakes: Fakes) -> None:
    models = {name: fakes.model(fields={"keep_alive": -1}) for name in "ab"}
    async with running_proxy(fakes.config(models), env=SECRETS) as proxy:
        keys = set()
        async with streaming(proxy, "a", fake={"tokens": 1000, "token_ms": 50}):
            for name in models:
                await chat(proxy, name)
                pid = (await instance(proxy, name))["pid"]
                env = environ(pid)
                assert not (SECRETS.keys() - {"LLAMA_API_KEY"}) & env.keys()
                assert not any("secret" in value for value in env.values())
                keys.add(env["LLAMA_API_KEY"])
                assert env["LLAMA_API_KEY"] not in proc(pid, "cmdline")
                shared = kernel_objects(pid) & kernel_objects(proxy.pid)
                assert {name.partition(":")[0] for name in shared} <= {"pipe"} and len(shared) == 1, shared
        assert len(keys) == 2 and SECRETS["LLAMA_API_KEY"] not in keys
        assert all(len(key) >= 24 for key in keys)
        assert not any(key in proxy.log for key in keys)


async def test_a_server_is_confined(fakes: Fakes) -> None:
    async with running_proxy(fakes.config({"m": fakes.model()})) as proxy:
        await chat(proxy, "m")
        pid = (await instance(proxy, "m"))["pid"]
        status = dict(line.split(":\t", 1) for line in proc(pid, "status").splitlines())
        assert status["NoNewPrivs"] == "1"
        assert int(proc(pid, "oom_score_adj")) >= 500
        process = psutil.Process(pid)
        assert process.rlimit(psutil.RLIMIT_CORE) == (0, 0)
        assert os.getpgid(pid) == os.getsid(pid) == pid
        assert os.readlink(f"/proc/{pid}/fd/0") == "/dev/null"
        listening = [c.laddr.ip for c in process.net_connections() if c.status == psutil.CONN_LISTEN]
        assert listening == ["127.0.0.1"]


@needs_llama_cpp
async def test_a_server_of_ours_answers_only_to_the_proxy(tiny_models: dict[str, Path]) -> None:
    async with running_proxy(embedded({"m": tiny(tiny_models["tiny-a"])})) as proxy:
        await chat(proxy, "m", max_tokens=1)
        port = (await instance(proxy, "m"))["port"]
        for path in ("/props", "/slots", "/v1/models", "/metrics"):
            assert (await raw_client.get(port, path)).status == 401
        assert live_children(proxy.pid) == 1
