"""Many clients at once, servers that cannot start, foreign servers on our ports, and no file descriptors left."""

from __future__ import annotations

import asyncio
import random
import resource
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress

import psutil
import pytest

from tests.support import raw_client
from tests.support.e2e_support import (
    Fakes,
    Gate,
    asking,
    chat,
    fakes,
    gate,
    idle,
    live_children,
    state,
    watched_health,
)
from tests.support.harness import Proxy, running_proxy, until
from tests.support.raw_client import Answer, RawClient

__all__ = ["fakes", "gate"]  # fixtures
ONE_SLOT = {"args": ["--parallel", "1"]}


@pytest.fixture(autouse=True)
def many_files() -> Iterator[None]:
    """Room for thousands of sockets in this process and in the proxy, which inherits it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 8192)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# -- a herd on a cold model --------------------------------------------------------------------------------------------


async def herd(proxy: Proxy, stack: AsyncExitStack, number: int) -> list[RawClient]:
    """So many clients that ask for the cold model `m`, each known to be in the queue before the next one asks."""
    clients = []
    watch = await stack.enter_async_context(raw_client.connected(proxy.port))
    for index in range(number):
        clients.append(await stack.enter_async_context(asking(proxy, "m", user=str(index))))
        await until(lambda index=index: standing(watch, index + 1), what=f"request {index} in the queue")  # type: ignore[misc]
    return clients


async def standing(watch: RawClient, number: int) -> bool:
    """Whether so many wait for `m`."""
    await watch.send(raw_client.request("GET", "/health"))
    instances = (await watch.answer(method="GET")).json()["instances"]
    return bool(instances) and instances[0]["queue"] >= number


async def one_load_serves_all_in_order(fakes: Fakes, gate: Gate, number: int) -> None:
    model = fakes.model(LOAD_UNTIL=gate, TOKENS=1, fields=ONE_SLOT)
    async with running_proxy(fakes.config({"m": model}, queue_limit=number)) as proxy:
        before = proxy.rss_bytes()
        async with watched_health(proxy), AsyncExitStack() as stack:
            clients = await herd(proxy, stack, number)
            grown = proxy.rss_bytes() - before
            gate.open()
            answers = await asyncio.gather(*(client.answer() for client in clients))
        assert {answer.status for answer in answers} == {200}
        assert [int(body["user"]) for body in fakes.generated()] == list(range(number))
        assert len(fakes.events("start")) == 1
        assert grown < number * 64 * 1024 + 16 * 2**20, f"{grown / number / 1024:.0f} KiB a request"


async def test_a_herd_on_a_cold_model_causes_one_load_and_is_served_in_order(fakes: Fakes, gate: Gate) -> None:
    await one_load_serves_all_in_order(fakes, gate, 100)


@pytest.mark.full
async def test_a_thousand_requests_on_a_cold_model_cause_one_load_and_leave_health_answered(
    fakes: Fakes, gate: Gate
) -> None:
    await one_load_serves_all_in_order(fakes, gate, 1000)


async def overfull(fakes: Fakes, gate: Gate, number: int, limit: int) -> None:
    """All beyond `limit` are refused while the model loads; then the others are served."""
    async with running_proxy(fakes.config({"m": fakes.model(LOAD_UNTIL=gate)}, queue_limit=limit)) as proxy:
        refused: list[Answer] = []

        async def ask() -> int:
            answer = await chat(proxy, "m")
            if answer.status != 200:
                refused.append(answer)
            return answer.status

        asked = [asyncio.ensure_future(ask()) for _ in range(number)]
        await until(lambda: len(refused) == number - limit, what="a refusal for all beyond the limit")
        gate.open()
        assert (await asyncio.gather(*asked)).count(200) == limit
        assert {(answer.status, answer.error["code"]) for answer in refused} == {(503, "overloaded")}
        assert all(int(answer.header("retry-after") or 0) >= 1 for answer in refused)
        assert len(fakes.events("start")) == 1


async def test_beyond_the_queue_limit_requests_are_refused_at_once(fakes: Fakes, gate: Gate) -> None:
    await overfull(fakes, gate, 80, 20)


@pytest.mark.full
async def test_of_a_thousand_requests_a_hundred_are_queued_and_the_rest_refused(fakes: Fakes, gate: Gate) -> None:
    await overfull(fakes, gate, 1000, 100)


# -- swap thrash -------------------------------------------------------------------------------------------------------


async def sampled_children(proxy: Proxy, most: list[int]) -> None:
    """Note the greatest number of living children, looking each 10 ms."""
    while True:
        most[0] = max(most[0], live_children(proxy.pid))
        await asyncio.sleep(0.01)


async def thrash(fakes: Fakes, turns: int, burst: int) -> None:
    models = {name: fakes.model(LOAD_S=0.05, TOKENS=2) for name in "ab"}
    async with running_proxy(fakes.config(models, size=1, swap_after_s=0.02)) as proxy:
        most = [0]
        sampler = asyncio.get_running_loop().create_task(sampled_children(proxy, most))
        async with watched_health(proxy):
            for turn in range(turns):
                assert (await chat(proxy, "ab"[turn % 2])).status == 200
            for _ in range(2):
                answers = await asyncio.gather(*(chat(proxy, "ab"[n % 2], stream=True) for n in range(burst)))
                assert {answer.status for answer in answers} == {200}
                assert all(answer.body.endswith(b"data: [DONE]\n\n") for answer in answers)
        sampler.cancel()
        with suppress(asyncio.CancelledError):
            await sampler
        assert most == [1]
        await until(lambda: idle(proxy))


async def test_two_models_that_take_turns_in_one_place_never_run_both(fakes: Fakes) -> None:
    await thrash(fakes, 20, 30)


@pytest.mark.full
async def test_five_hundred_swaps_never_run_both_models_and_leave_health_answered(fakes: Fakes) -> None:
    await thrash(fakes, 500, 200)


# -- requests in the moment of a stop ----------------------------------------------------------------------------------


async def ask_around_stops(fakes: Fakes, times: int) -> None:
    models = {name: fakes.model(TOKENS=2) for name in "ab"}
    chance = random.Random(11)
    async with running_proxy(fakes.config(models, size=1, swap_after_s=0.01)) as proxy:
        await chat(proxy, "a")

        async def later(model: str, delay_s: float) -> Answer:
            await asyncio.sleep(delay_s)  # the offset is what is tried out, nothing is waited for
            return await chat(proxy, model)

        for turn in range(times):
            unload = raw_client.request("POST", "/models/unload", {"model": "a"}, close=True)
            stop = raw_client.ask(proxy.port, unload) if turn % 2 else chat(proxy, "b")  # for which `a` is evicted
            done, *answers = await asyncio.gather(stop, *(later("a", chance.uniform(0, 0.15)) for _ in range(3)))
            assert done.status == 200
            assert [answer.status for answer in answers] == [200] * 3, [answer.body for answer in answers]
        await until(lambda: idle(proxy))


async def test_requests_in_the_moment_of_a_stop_are_served(fakes: Fakes) -> None:
    await ask_around_stops(fakes, 15)


@pytest.mark.full
async def test_requests_at_two_hundred_moments_of_a_stop_are_served(fakes: Fakes) -> None:
    await ask_around_stops(fakes, 200)


# -- no file descriptors left ------------------------------------------------------------------------------------------


def limit_files(proxy: Proxy, number: int) -> None:
    """Let the proxy open no file descriptor of that number or above."""
    psutil.Process(proxy.pid).rlimit(psutil.RLIMIT_NOFILE, (number, 8192))


async def test_a_proxy_out_of_file_descriptors_neither_spins_nor_dies_and_recovers(fakes: Fakes) -> None:
    async with running_proxy(fakes.config({"m": fakes.model()}), clean_log=False) as proxy:
        await chat(proxy, "m")
        limit_files(proxy, 64)
        async with AsyncExitStack() as stack:
            for _ in range(100):  # the kernel completes those connections that the proxy cannot accept
                await stack.enter_async_context(raw_client.connected(proxy.port))
            await until(lambda: proxy.fds() >= 60, what="the limit")
            before, started = proxy.cpu_s(), time.monotonic()
            await until(lambda: time.monotonic() - started > 1.0)
            share = (proxy.cpu_s() - before) / (time.monotonic() - started)
            assert share < 0.5, "it spins"

        async def answers() -> bool:
            with suppress(OSError, raw_client.BrokenAnswer):
                return (await chat(proxy, "m")).status == 200
            return False

        await until(answers)


async def test_a_server_that_cannot_be_spawned_for_want_of_files_is_a_503(fakes: Fakes) -> None:
    async with running_proxy(fakes.config({"m": fakes.model(), "other": fakes.model()})) as proxy:
        await chat(proxy, "other")
        async with raw_client.connected(proxy.port) as client:
            await client.send(raw_client.request("GET", "/health"))
            await client.answer(method="GET")
            limit_files(proxy, proxy.fds())
            await client.send(raw_client.request("POST", "/v1/chat/completions", {"model": "m", "messages": []}))
            answer = await client.answer()
            assert answer.status == 503 and answer.error["code"] == "spawn_failed", answer.body
            assert "Too many open files" in answer.error["message"]
            limit_files(proxy, 4096)
            await client.send(raw_client.request("POST", "/v1/chat/completions", {"model": "m", "messages": []}))
            assert (await client.answer()).status == 200
        assert await state(proxy, "other") == "loaded"
