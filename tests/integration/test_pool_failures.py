"""Starts that fail, servers that crash: who is told, how soon, and how often it is tried again."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import time

import pytest

from llama_smart_proxy.backends.base import UpstreamRequest
from llama_smart_proxy.backends.pool import backoff
from llama_smart_proxy.backends.pool.pool import Pool
from llama_smart_proxy.proxy.errors import StartFailed, UpstreamFailed
from tests.support.e2e_support import CHAT
from tests.support.harness import PATIENCE_S, until
from tests.support.pools import FakeModel, Fakes, ask, chat, leased, open_fds, open_pool


@pytest.fixture
def long_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first back-off takes a minute instead of a second, so that it is not over before the test has looked."""
    monkeypatch.setattr(backoff, "FIRST_S", 60.0)


async def failure(pool: Pool, model: FakeModel, name: str = "bad") -> StartFailed:
    with pytest.raises(StartFailed) as caught:
        await ask(pool, name, model)
    return caught.value


@pytest.mark.parametrize("how", ["1@loaded", "SIGSEGV@loaded", "SIGKILL@loaded"])
async def test_a_server_that_ends_while_it_loads_is_told_to_all_who_wait_at_once(fakes: Fakes, how: str) -> None:
    async with open_pool(fakes.config(load_timeout_s=600, queue_timeout_s=600)) as pool:
        model = fakes.model(fake={"EXIT": how, "LOAD_S": 0.3})

        async def wait() -> None:
            error = await failure(pool, model)
            assert error.status == 503 and "fake: about to end" in error.log[-1]

        async with asyncio.timeout(PATIENCE_S):  # no timeout of the pool has told them, but the exit
            await asyncio.gather(*(wait() for _ in range(20)))
        assert fakes.spawns == 1
        message = pool.failed("bad")
        assert message is not None and "its server" in message
        assert pool.state("bad") == "unloaded"
        assert pool.status()[0]["error"] == message


@pytest.mark.usefixtures("long_backoff")
async def test_a_failing_model_is_left_alone_for_a_while(fakes: Fakes) -> None:
    async with open_pool(fakes.config()) as pool:
        model = fakes.model(fake={"EXIT": "3"})
        first = await failure(pool, model)
        again = [await failure(pool, model) for _ in range(50)]
        assert fakes.spawns == 1
        assert {error.message for error in again} == {first.message}
        assert all(error.status == 503 and error.retry_after_s in range(1, 61) for error in again)
        await ask(pool, "good", fakes.model())


async def test_a_model_that_recovers_is_served_again(fakes: Fakes) -> None:
    async with open_pool(fakes.config()) as pool:
        model = fakes.model(fake={"EXIT": "3", "TIMES": 1, "COUNTER": fakes.folder / "counter"})
        begun = time.monotonic()
        await failure(pool, model)

        async def served() -> bool:
            try:
                return bool(await ask(pool, "bad", model))
            except StartFailed:
                return False

        await until(served, what="an answer")
        assert time.monotonic() - begun > 0.9
        assert pool.failed("bad") is None
        assert fakes.spawns == 2


@pytest.mark.full
async def test_a_failing_model_is_started_three_times_a_minute_under_steady_demand(fakes: Fakes) -> None:
    async with open_pool(fakes.config()) as pool:
        bad, good = fakes.model(fake={"EXIT": "3"}), fakes.model(fake={"LOG": os.devnull})

        async def tried_three_times() -> bool:
            await failure(pool, bad)
            await ask(pool, "good", good, tokens=1, token_ms=1)
            return fakes.spawns == 3

        await until(tried_three_times)
        for _ in range(100):
            await tried_three_times()
        assert fakes.spawns == 3
        assert (await failure(pool, bad)).retry_after_s in range(1, 61)


async def test_other_models_do_not_notice_a_failing_one(fakes: Fakes) -> None:
    async with open_pool(fakes.config()) as pool:
        good, bad = fakes.model(), fakes.model(fake={"EXIT": "SIGILL"})
        await ask(pool, "good", good)
        stream = asyncio.ensure_future(ask(pool, "good", good, tokens=20, token_ms=10))
        for name in "abc":
            await failure(pool, bad, name)
        assert b"t19" in await stream
        assert pool.state("good") == "loaded"


@pytest.mark.usefixtures("long_backoff")
async def test_a_load_timeout_fails_all_who_wait(fakes: Fakes) -> None:
    async with open_pool(fakes.config(load_timeout_s=0.5)) as pool:
        model = fakes.model(fake={"NEVER": "mute"})
        errors = await asyncio.gather(*(failure(pool, model) for _ in range(5)))
        assert {(error.status, error.code) for error in errors} == {(504, "model_load_timeout")}
        later = await failure(pool, model)
        assert later.status == 503 and later.retry_after_s is not None


async def test_an_exhausted_port_range_fails_at_once_and_costs_no_back_off(fakes: Fakes) -> None:
    start = fakes.config().server_pool.port_start
    async with open_pool(fakes.config(size=2, port_start=start, port_end=start)) as pool:
        model = fakes.model()
        async with leased(pool, "a", model):
            error = await failure(pool, model)
            assert error.code == "no_free_port" and error.status == 503
        await pool.unload("a")
        await ask(pool, "bad", model)


async def test_no_file_descriptors_left_fails_one_request_not_the_pool(fakes: Fakes) -> None:
    async with open_pool(fakes.config()) as pool:
        model = fakes.model()
        await ask(pool, "good", model)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        used, fds = {int(name) for name in os.listdir("/proc/self/fd")}, open_fds()
        lowest_free = next(number for number in range(1000) if number not in used)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 1, limits[1]))
        try:
            async with leased(pool, "bad", model):
                pytest.fail("it was started")
        except StartFailed as exc:
            assert exc.code == "spawn_failed"
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert pool.state("good") == "loaded"
        await ask(pool, "bad", model)  # without any back-off
        # What stays is the watch on a second child, and two connections.
        await until(lambda: open_fds() <= fds + 6, what="the closing of all other files")


async def test_a_crash_after_work_is_followed_by_a_fresh_start(fakes: Fakes) -> None:
    async with open_pool(fakes.config()) as pool:
        model = fakes.model()
        for count in range(4):
            await ask(pool, "a", model)
            assert pool.status()[0]["restarts"] == count
            (total,) = pool.totals()
            assert (total["restarts"], total["starts"], total["evictions"]) == (count, count + 1, 0)
            async with leased(pool, "a", model) as instance:
                os.kill(instance.pid, signal.SIGKILL)
                assert await instance.wait_stopped(PATIENCE_S)
            assert pool.state("a") == "unloaded"
            assert "killed by SIGKILL" in (pool.failed("a") or "")


async def test_a_request_that_broke_can_be_sent_again_at_once(fakes: Fakes) -> None:
    """As `backends.spawned` does it: the lease is left only when the crash has been noticed."""
    async with open_pool(fakes.config()) as pool:
        model = fakes.model(fake={"DIE_AFTER": 0, "TIMES": 1, "COUNTER": fakes.folder / "counter"})
        with pytest.raises(UpstreamFailed):
            async with leased(pool, "a", model) as instance:
                try:
                    await chat(instance)
                finally:
                    await instance.wait_stopped(PATIENCE_S)
        assert b"t0" in await ask(pool, "a", model)
        assert fakes.spawns == 2


async def test_a_crash_in_mid_stream_that_only_the_end_of_the_process_tells_is_a_disconnection(fakes: Fakes) -> None:
    """Its connection is not read any more, as its reader is slow: the end of that is not seen."""
    model = fakes.model()
    call = UpstreamRequest("POST", CHAT, json.dumps({"stream": True, "fake": {"tokens": 1_000_000}}).encode())
    async with (
        open_pool(fakes.config()) as pool,
        leased(pool, "m", model) as instance,
        instance.connections.request(call) as response,
    ):
        await until(lambda: response._paused)
        os.kill(instance.pid, signal.SIGKILL)
        await until(lambda: pool.state("m") == "unloaded")
        with pytest.raises(UpstreamFailed) as failure:
            await response.read(1)
        assert failure.value.code == "upstream_disconnected"


@pytest.mark.usefixtures("long_backoff")
async def test_a_server_that_dies_on_every_first_request_is_left_alone(fakes: Fakes) -> None:
    async with open_pool(fakes.config()) as pool:
        model = fakes.model(fake={"DIE_AFTER": 0})
        for _ in range(2):
            with pytest.raises(UpstreamFailed):
                async with leased(pool, "a", model) as instance:
                    try:
                        await chat(instance)
                    finally:
                        await instance.wait_stopped(PATIENCE_S)
        error = await failure(pool, model, "a")
        assert "crashed" in error.message and error.retry_after_s in range(1, 61)
        assert fakes.spawns == 2
