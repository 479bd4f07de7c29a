"""The end of the proxy, by SIGTERM or by SIGKILL: what clients see of it, and that no server outlives it."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support import raw_client
from tests.support.e2e_support import (
    DONE,
    Fakes,
    Gate,
    asking,
    chat,
    embedded,
    error_of,
    fakes,
    gate,
    instance,
    live_children,
    needs_llama_cpp,
    owned_by,
    queued,
    stalled_streams,
    streaming,
    text_of,
    tiny,
)
from tests.support.gguf_fixture import tiny_models
from tests.support.harness import ROOT, START_S, Proxy, environment, launch, running_proxy, until
from tests.support.raw_client import BrokenAnswer
from tests.support.terminal import Terminal, terminal

__all__ = ["fakes", "gate", "terminal", "tiny_models"]  # fixtures
LONG_S = 60.0
"""Nothing here takes so long on any machine; a defect takes for ever."""
PATIENT = {"server": {"drain_s": 120}}
"""Far longer than a test waits for the end of a proxy."""


async def refuses(proxy: Proxy) -> bool:
    """Whether the proxy takes no new work: it says so itself while it drains. As it begins to, it closes a connection
    whose request has not come yet."""
    with suppress(OSError, BrokenAnswer):
        health = await raw_client.get(proxy.port, "/health")
        chat = await raw_client.post(proxy.port, "/v1/chat/completions", {"model": "m"})
        return health.status == 503 and chat.status == 503 and chat.json()["error"]["code"] == "shutting_down"
    return False


# -- SIGTERM -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("closes", [False, True], ids=["SIGTERM", "terminal"])
async def test_a_signal_lets_a_stream_run_to_its_end(
    fakes: Fakes, gate: Gate, terminal: Terminal, closes: bool
) -> None:
    """A terminal that is closed sends SIGHUP more than once: by its shell, and by the kernel."""
    config, within = fakes.config({"m": fakes.model(TOKENS=30)}) | PATIENT, terminal.within if closes else ()
    async with running_proxy(config, within=within) as proxy:
        async with streaming(proxy, "m", fake={"last_at": str(gate)}) as stream:
            await stream.until_text()
            if closes:
                terminal.close()
            else:
                proxy.send(signal.SIGTERM)
            await until(lambda: refuses(proxy), what="its refusal of new work")
            for _ in range(2 if closes else 0):
                proxy.send(signal.SIGHUP)
            assert await refuses(proxy)
            gate.open()
            events = await stream.rest()
        assert events[-1] == DONE and len(text_of(events).split()) == 30
        assert await proxy.ended() == 0
        assert owned_by(proxy.pid) == []


@needs_llama_cpp
async def test_sigterm_lets_a_stream_of_llama_cpp_run_to_its_end(tiny_models: dict[str, Path]) -> None:
    async with running_proxy(embedded({"tiny": tiny(tiny_models["tiny-a"])})) as proxy:
        async with streaming(proxy, "tiny", ignore_eos=True, max_tokens=1000) as stream:
            await stream.until_text()
            proxy.send(signal.SIGTERM)
            events = await stream.rest()
        assert events[-1] == DONE and json.loads(events[-2])["timings"]["predicted_n"] == 1000
        assert await proxy.ended() == 0
        assert owned_by(proxy.pid) == []


async def test_sigterm_ends_an_idle_proxy_at_once_even_with_idle_connections(fakes: Fakes) -> None:
    async with running_proxy(fakes.config({"m": fakes.model()}) | PATIENT) as proxy:
        await chat(proxy, "m")
        async with raw_client.connected(proxy.port) as silent, raw_client.connected(proxy.port) as kept:
            await kept.send(raw_client.request("GET", "/health"))
            await kept.answer(method="GET")
            proxy.send(signal.SIGTERM)
            assert await proxy.ended() == 0
            assert await silent.rest() == b"" == await kept.rest()


async def test_when_the_time_to_drain_is_over_a_stream_is_told_in_band(fakes: Fakes) -> None:
    config = fakes.config({"m": fakes.model(TOKENS=4800, TOKEN_MS=25)}) | {"server": {"drain_s": 0.5}}
    async with running_proxy(config) as proxy:
        async with streaming(proxy, "m") as stream:
            await stream.until_text()
            started = time.monotonic()
            proxy.send(signal.SIGTERM)
            events = await stream.rest()
            assert time.monotonic() - started > 0.4
        assert events[-1] == DONE
        error = json.loads(events[-2])["error"]
        assert error["type"] in ("server_error", "unavailable_error") and error["message"]
        assert await proxy.ended() == 0
        assert owned_by(proxy.pid) == []


async def test_who_waits_for_a_model_at_the_end_is_told_so(fakes: Fakes) -> None:
    config = fakes.config({"m": fakes.model(LOAD_S=60)}) | {"server": {"drain_s": 0.3}}
    async with running_proxy(config) as proxy:
        async with asking(proxy, "m") as client:
            await until(lambda: fakes.events("start"))
            proxy.send(signal.SIGTERM)
            answer = await client.answer()
        assert answer.status == 503 and answer.error["code"] == "shutting_down"
        assert answer.header("retry-after")
        assert await proxy.ended() == 0


async def test_who_waits_for_a_model_at_sigterm_is_served_if_there_is_time(fakes: Fakes, gate: Gate) -> None:
    async with running_proxy(fakes.config({"m": fakes.model(LOAD_UNTIL=gate)}) | PATIENT) as proxy:
        async with asking(proxy, "m") as client:
            await until(lambda: fakes.events("start"))
            proxy.send(signal.SIGTERM)
            await until(lambda: "draining" in proxy.log)
            gate.open()
            assert (await client.answer()).status == 200
        assert await proxy.ended() == 0


@pytest.mark.parametrize(
    ("first", "second"),
    [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT), (signal.SIGHUP, signal.SIGINT)],
)
async def test_a_second_signal_ends_it_at_once_as_the_log_says(
    fakes: Fakes, terminal: Terminal, first: signal.Signals, second: signal.Signals
) -> None:
    """SIGHUP is that of a terminal that is closed."""
    config = fakes.config({"m": fakes.model(TOKENS=10_000, TOKEN_MS=25)}) | PATIENT
    closes = first == signal.SIGHUP
    async with running_proxy(config, within=terminal.within if closes else ()) as proxy:
        async with streaming(proxy, "m") as stream:
            await stream.until_text()
            if closes:
                terminal.close()
            else:
                proxy.send(first)
            await until(lambda: f"{first.name}: draining for up to 120 s; a second Ctrl-C or SIGTERM" in proxy.log)
            assert await stream.event()
            proxy.send(second)
            assert (await stream.rest())[-1] == DONE
            assert await proxy.ended() == 0
        assert owned_by(proxy.pid) == []


async def test_sigint_is_sigterm(fakes: Fakes) -> None:
    async with running_proxy(fakes.config({"m": fakes.model()})) as proxy:
        await chat(proxy, "m")
        proxy.send(signal.SIGINT)
        assert await proxy.ended() == 0
        assert owned_by(proxy.pid) == []


def test_a_proxy_that_nohup_has_started_ignores_sighup(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("server: {port: 0}")
    argv = [sys.executable, "-m", "llama_smart_proxy", "serve", "--config", str(file)]
    argv = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *argv]
    with subprocess.Popen(argv, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "listening" not in (line := process.stderr.readline()):
            assert line
        process.send_signal(signal.SIGHUP)
        process.terminate()
        said = process.stderr.read()
        assert process.wait(LONG_S) == 0
    assert "SIGTERM: draining" in said and "SIGHUP" not in said


HANGING = """
import asyncio
from llama_smart_proxy import Agent

class Hanging(Agent):
    '''Never comes to an end with {hook}.'''
    command = "hanging"
    async def {hook}(self) -> None:
        print("waits", file=sys.stderr, flush=True)
        await asyncio.Event().wait()
"""


@pytest.mark.parametrize("hook", ["start", "close"])
async def test_an_agent_that_hangs_does_not_keep_a_signal_from_its_effect(tmp_path: Path, hook: str) -> None:
    (tmp_path / "hanging.py").write_text("import sys" + HANGING.format(hook=hook))
    (tmp_path / "config").mkdir()
    proxy = launch({"agents_dirs": [tmp_path]}, tmp_path / "config", env=None, args=())
    try:
        if hook == "close":
            await until(proxy.started, START_S)
            proxy.send(signal.SIGINT)
        await until(lambda: "waits" in proxy.log, START_S)
        proxy.send(signal.SIGINT)
        assert await proxy.ended(LONG_S) == 0
    finally:
        proxy.stop()


async def test_a_stream_cut_off_at_the_end_of_the_drain_is_told_the_proxy_shuts_down(fakes: Fakes) -> None:
    config = fakes.config({"m": fakes.model()}) | {"server": {"drain_s": 0.3}}
    async with running_proxy(config) as proxy, stalled_streams(proxy, ["m"], 2) as streams:
        proxy.send(signal.SIGTERM)
        assert [error_of(await stream.rest())["code"] for stream in streams] == ["shutting_down"] * 2
        assert await proxy.ended(LONG_S) == 0


# -- SIGKILL -----------------------------------------------------------------------------------------------------------


async def loaded_clients(proxy: Proxy, models: str) -> None:
    """Three clients of each model that ask until the connection breaks."""

    async def client(model: str, stream: bool) -> None:
        with suppress(OSError, BrokenAnswer):
            while True:
                await chat(proxy, model, stream=stream, ignore_eos=True, max_tokens=300)

    async with asyncio.TaskGroup() as clients:
        for model in models:
            for stream in (True, True, False):
                clients.create_task(client(model, stream))


async def kill_under_load(tiny_models: dict[str, Path]) -> None:
    """One proxy that is killed under load."""
    models = {name: tiny(tiny_models[f"tiny-{name}"]) for name in "ab"}
    with tempfile.TemporaryDirectory() as folder:
        proxy = launch(embedded(models, size=2), Path(folder), env=None, args=())
        try:
            await until(proxy.started, START_S)
            load = asyncio.get_running_loop().create_task(loaded_clients(proxy, "ab"))
            for name in models:
                await until(lambda name=name: serving(proxy, name))  # type: ignore[misc]
            servers = owned_by(proxy.pid)
            assert len(servers) == 2
            proxy.send(signal.SIGKILL)
            await until(lambda: owned_by(proxy.pid) == [], what="the end of the servers")
            await load
        finally:
            proxy.stop()


async def serving(proxy: Proxy, model: str) -> bool:
    return bool((await instance(proxy, model)).get("leases"))


@needs_llama_cpp
async def test_no_server_outlives_a_proxy_that_is_killed_under_load(tiny_models: dict[str, Path]) -> None:
    for _ in range(3):
        await kill_under_load(tiny_models)


@pytest.mark.full
@needs_llama_cpp
async def test_no_server_outlives_any_of_twenty_killed_proxies(tiny_models: dict[str, Path]) -> None:
    for _ in range(20):
        await kill_under_load(tiny_models)


async def test_a_proxy_killed_while_it_loads_leaves_no_server(fakes: Fakes) -> None:
    async with running_proxy(fakes.config({"m": fakes.model(LOAD_S=60)})) as proxy, asking(proxy, "m"):
        await until(lambda: fakes.events("start"))
        assert await queued(proxy, "m") == 1 and live_children(proxy.pid) == 1
        proxy.send(signal.SIGKILL)
        assert await proxy.ended() == -signal.SIGKILL
        await until(lambda: owned_by(proxy.pid) == [], what="the end of the servers")


async def test_the_next_proxy_ends_what_a_killed_one_could_not_take_along(fakes: Fakes) -> None:
    config = fakes.config({"m": fakes.model(FORK=1)})
    async with running_proxy(config) as proxy:
        await chat(proxy, "m")
        (grandchild,) = (event["pid"] for event in fakes.events("fork"))
        proxy.send(signal.SIGKILL)
        assert await proxy.ended() == -signal.SIGKILL
        # Or of the grandchild as well: every proxy that starts ends it, and so may one of another test.
        await until(lambda: set(owned_by(proxy.pid)) <= {grandchild}, what="the end of the server itself")
    async with running_proxy(config) as successor:
        await until(lambda: owned_by(proxy.pid) == [], what="the end of the leftover")
        assert (await chat(successor, "m")).status == 200
        assert len(owned_by(successor.pid)) == 2  # its own server, and what that forked
        await raw_client.post(successor.port, "/models/unload", {"model": "m"})
        await until(lambda: owned_by(successor.pid) == [], what="the end of both")


async def test_a_download_that_hangs_does_not_delay_the_end(fakes: Fakes) -> None:
    """The hub takes the connection and says nothing, which is how a download over a bad line looks."""
    called = asyncio.Event()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        called.set()
        await reader.read()
        writer.close()

    silent = await asyncio.start_server(listen, "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(fakes.folder), "HF_HUB_DOWNLOAD_TIMEOUT": "60"}
    config = fakes.config({"m": {"repo": "org/model-GGUF", "variant": "Q4_K_M"}}) | {"server": {"drain_s": 0.2}}
    async with running_proxy(config, env=env) as proxy, asking(proxy, "m"):
        await until(lambda: called.is_set(), what="the call to the hub")
        proxy.send(signal.SIGTERM)
        assert await proxy.ended() == 0
    silent.close()
