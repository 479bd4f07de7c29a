"""What a launcher decides: the command, where its server is, when it is ready, what precedes its end."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from dataclasses import replace

import pytest

from llama_smart_proxy.backends.base import UpstreamRequest
from llama_smart_proxy.backends.http.connection import ConnectionPool, Endpoint
from llama_smart_proxy.backends.llamacpp.launcher import LlamaCppLauncher, pool_model
from llama_smart_proxy.backends.pool.launcher import Command, CommandFor, HttpLauncher, PoolModel
from llama_smart_proxy.backends.pool.pool import Pool
from llama_smart_proxy.proxy.errors import Overloaded, StartFailed
from tests.support.harness import PATIENCE_S, free_port, until
from tests.support.pools import FakeModel, Fakes, ask, children, open_pool

PROPS = UpstreamRequest("GET", "/props", slot=False)


class Noting(LlamaCppLauncher):
    """Asks the server in each hook, and notes what it answers; then waits for `last`, if it is there."""

    def __init__(self, model: FakeModel) -> None:
        super().__init__("a", model, model._program)
        self.seen: list[tuple[str, int]] = []
        self.last: asyncio.Future[None] | None = None

    async def after_ready(self, connections: ConnectionPool) -> None:
        await self._note("after_ready", connections)

    async def before_stop(self, connections: ConnectionPool) -> None:
        await self._note("before_stop", connections)

    async def _note(self, hook: str, connections: ConnectionPool) -> None:
        status, _ = await connections.fetch(PROPS, timeout_s=PATIENCE_S)
        self.seen.append((hook, status))
        if self.last is not None:
            await self.last


BOTH = [("after_ready", 200), ("before_stop", 200)]


def noted(model: FakeModel) -> tuple[PoolModel, Noting]:
    launcher = Noting(model)
    return replace(model.at("a"), launcher=launcher), launcher


async def evict(pool: Pool, fakes: Fakes, model: PoolModel) -> None:
    await ask(pool, "b", fakes.model())


async def unload(pool: Pool, fakes: Fakes, model: PoolModel) -> None:
    await pool.unload(model.name)


async def expire(pool: Pool, fakes: Fakes, model: PoolModel) -> None:
    pool.set_keep_alive(model, 0.05)


async def shut_down(pool: Pool, fakes: Fakes, model: PoolModel) -> None:
    await pool.close(drain_s=0)


@pytest.mark.parametrize("end", [evict, unload, expire, shut_down])
async def test_before_a_gentle_end_the_launcher_may_ask_the_server(fakes: Fakes, end: Callable[..., object]) -> None:
    async with open_pool(fakes.config(size=1, stop_timeout_s=60)) as pool:
        model, launcher = noted(fakes.model())
        await pool.load(model)
        ending = end(pool, fakes, model)
        assert asyncio.iscoroutine(ending)
        await ending
        await until(lambda: fakes.events("stop"), what="the end")
        assert launcher.seen == BOTH


async def test_nothing_is_asked_of_a_server_that_crashed(fakes: Fakes) -> None:
    async with open_pool(fakes.config()) as pool:
        model, launcher = noted(fakes.model())
        async with pool.lease(model, PROPS) as lease:
            os.kill(lease.instance.pid, signal.SIGKILL)
            assert await lease.instance.wait_stopped(PATIENCE_S)
        assert launcher.seen == BOTH[:1]


async def test_nothing_is_asked_of_a_server_that_was_never_ready(fakes: Fakes) -> None:
    async with open_pool(fakes.config()) as pool:
        model, launcher = noted(fakes.model(fake={"LOAD_S": 600}))
        loading = asyncio.ensure_future(pool.load(model))
        await until(lambda: fakes.events("start"), what="the process")
        await pool.unload("a")
        with pytest.raises(Overloaded):
            await loading
        assert launcher.seen == [] and not children()


async def test_the_launcher_acts_before_the_first_request_is_sent(fakes: Fakes) -> None:
    async with open_pool(fakes.config()) as pool:
        model, launcher = noted(fakes.model())
        launcher.last = asyncio.get_running_loop().create_future()
        waiting = asyncio.ensure_future(pool.load(model))
        await until(lambda: launcher.seen, what="the hook")
        assert pool.state("a") == "loading" and not waiting.done()
        launcher.last.set_result(None)
        await waiting


@pytest.mark.parametrize("error", [StartFailed("no room"), RuntimeError("a bug")])
async def test_a_launcher_that_fails_is_logged_and_delays_nothing(
    fakes: Fakes, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_pool(fakes.config()) as pool:
        model, launcher = noted(fakes.model())
        launcher.last = asyncio.get_running_loop().create_future()
        launcher.last.set_exception(error)
        await pool.load(model)
        await pool.unload("a")
        assert launcher.seen == BOTH and len(fakes.events("stop")) == 1
        for hook, _ in BOTH:
            assert f"a: {hook} of its launcher failed: {error}" in caplog.text


async def test_a_launcher_that_does_not_return_gets_half_of_the_time_to_stop(
    fakes: Fakes, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_pool(fakes.config(stop_timeout_s=0.6)) as pool:
        model, launcher = noted(fakes.model())
        await pool.load(model)
        launcher.last = asyncio.get_running_loop().create_future()
        async with asyncio.timeout(PATIENCE_S):
            await pool.unload("a")
        assert "before_stop of its launcher failed: TimeoutError" in caplog.text
        assert not children()


# -- any server with an HTTP API ---------------------------------------------------------------------------------------


class Plain(HttpLauncher):
    """The fake server, started in a few lines."""

    slots = 3

    def __init__(self, fakes: Fakes, *, port: int = 0, keyed_path: str | None = None) -> None:
        self.fakes = fakes
        self.port = port
        self.keyed_path = keyed_path

    def command(self, listen: Endpoint, key: str) -> Command:
        at = Endpoint(listen.host, self.port or listen.port)
        argv = [str(self.fakes.program), "--model", str(self.fakes.gguf), "--host", at.host, "--port", str(at.port)]
        return Command(argv, {**os.environ, "LLAMA_API_KEY": key, "FAKE_LOG": str(self.fakes.log)}, at)


@pytest.mark.parametrize("keyed_path", [None, "/props"])
async def test_a_server_is_launched_by_its_command_alone(fakes: Fakes, keyed_path: str | None) -> None:
    model = PoolModel("m", Plain(fakes, keyed_path=keyed_path))
    async with open_pool(fakes.config()) as pool, pool.lease(model, PROPS) as lease:
        it = lease.instance
        assert it.slots == 3 and it.port == it.connections.endpoint.port
        assert (await it.connections.fetch(PROPS, timeout_s=PATIENCE_S))[0] == 200


async def test_a_server_is_asked_where_its_command_says_that_it_is(fakes: Fakes) -> None:
    port = free_port()
    model = PoolModel("m", Plain(fakes, port=port))
    async with open_pool(fakes.config()) as pool, pool.lease(model, PROPS) as lease:
        it = lease.instance
        assert it.connections.endpoint.port == port != it.port
        assert (await it.connections.fetch(PROPS, timeout_s=PATIENCE_S))[0] == 200


async def test_a_server_that_takes_any_key_is_not_ours(fakes: Fakes) -> None:
    async with open_pool(fakes.config()) as pool:
        with pytest.raises(StartFailed, match="ports was lost: what answers there takes any key"):
            await pool.load(PoolModel("m", Plain(fakes, keyed_path="/health")))
        assert fakes.spawns == 3


async def test_a_program_that_is_not_there_fails_the_start(fakes: Fakes) -> None:
    class Missing(HttpLauncher):
        def prepare(self) -> CommandFor:
            raise StartFailed("vllm: no such program")

    async with open_pool(fakes.config()) as pool:
        with pytest.raises(StartFailed, match="vllm: no such program"):
            await pool.load(PoolModel("m", Missing()))


# -- a llama-server that does not enforce its API key ------------------------------------------------------------------


def keyless(fakes: Fakes) -> FakeModel:
    """A model whose server is started by a script that loses the API key."""
    script = fakes.folder / "keyless"
    script.write_text(f'#!/bin/sh\nunset LLAMA_API_KEY\n"{fakes.program}" "$@"\n')
    script.chmod(0o755)
    return fakes.model().run_by(script)


async def test_a_server_that_does_not_enforce_its_key_says_just_that(fakes: Fakes) -> None:
    async with open_pool(fakes.config()) as pool:
        with pytest.raises(StartFailed, match=r"not enforce the API key .* llama_cpp\.allow_unauthenticated: true"):
            await pool.load(keyless(fakes).at("m"))
        assert fakes.spawns == 1


async def test_a_server_that_does_not_enforce_its_key_is_used_where_that_is_allowed(fakes: Fakes) -> None:
    model = keyless(fakes)
    allowed = pool_model("m", model, model._program, unauthenticated=True)
    async with open_pool(fakes.config()) as pool, pool.lease(allowed, PROPS) as lease:
        assert lease.instance.slots == 4
        assert (await lease.instance.connections.fetch(PROPS, timeout_s=PATIENCE_S))[0] == 200
