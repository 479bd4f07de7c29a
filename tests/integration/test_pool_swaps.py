"""Making room: who is evicted, when, and who never is."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from llama_smart_proxy.backends.pool.pool import Pool
from llama_smart_proxy.proxy.errors import Overloaded
from tests.support.harness import ports, until
from tests.support.pools import Census, FakeModel, Fakes, ask, chat, elapse, leased, open_pool

LONG_S = 60.0
"""Nothing here takes so long on any machine; a defect takes for ever."""


@asynccontextmanager
async def busy(pool: Pool, name: str, model: FakeModel) -> AsyncIterator[asyncio.Event]:
    """Hold a lease until the yielded event is set, or the block is left."""
    let_go, held = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        async with leased(pool, name, model):
            held.set()
            await let_go.wait()

    task = asyncio.ensure_future(hold())
    try:
        await held.wait()
        yield let_go
    finally:
        let_go.set()
        await task


async def test_the_least_recently_used_model_makes_room(fakes: Fakes) -> None:
    async with open_pool(fakes.config(size=2)) as pool:
        model = fakes.model()
        for name in ("a", "b", "a", "c"):
            await ask(pool, name, model)
        assert [pool.state(name) for name in "abc"] == ["loaded", "unloaded", "loaded"]
        await ask(pool, "b", model)
        assert [pool.state(name) for name in "abc"] == ["unloaded", "loaded", "loaded"]
        totals = {entry["model"]: (entry["starts"], entry["restarts"], entry["evictions"]) for entry in pool.totals()}
        assert totals == {"a": (1, 0, 1), "b": (2, 0, 1), "c": (1, 0, 0)}


async def test_a_loaded_model_is_asked_before_it_makes_room_for_another_of_the_same_moment(fakes: Fakes) -> None:
    async with open_pool(fakes.config(size=1)) as pool:
        model = fakes.model()
        await ask(pool, "a", model)
        for first, second in ("ba", "ab"):
            await asyncio.gather(ask(pool, first, model), ask(pool, second, model))
        assert fakes.spawns == 3, "b, and a again: the last one loaded is the first one asked"


async def test_pinned_models_stay_and_fill_the_pool(fakes: Fakes) -> None:
    async with open_pool(fakes.config(size=2)) as pool:
        pinned, model = fakes.model(pinned=True), fakes.model()
        await ask(pool, "p", pinned)
        for name in "abc":
            await ask(pool, name, model)
        assert pool.state("p") == "loaded" and fakes.spawns == 4
        await ask(pool, "q", pinned)
        with pytest.raises(
            Overloaded, match=r"all 2 places .* pinned models"
        ):  # at once: later it would be a queue timeout
            await ask(pool, "a", model)


async def test_a_busy_instance_is_never_evicted(fakes: Fakes) -> None:
    async with open_pool(fakes.config(size=1, swap_after_s=600)) as pool:
        model = fakes.model()
        async with leased(pool, "a", model) as instance:
            other = asyncio.ensure_future(ask(pool, "b", model))
            assert b"t19" in await chat(instance, tokens=20, token_ms=50)
            assert not fakes.events("stop") and not other.done()
        await other  # as soon as the place is free: nothing else makes room within ten minutes
        assert fakes.events("stop")


async def test_a_wait_for_a_busy_place_ends_at_the_queue_timeout(fakes: Fakes) -> None:
    async with open_pool(fakes.config(size=1, queue_timeout_s=0.5, swap_after_s=0.1)) as pool:
        model = fakes.model()
        async with busy(pool, "a", model):
            begun = time.monotonic()
            with pytest.raises(Overloaded) as caught:
                await ask(pool, "b", model)
            assert caught.value.code == "queue_timeout"
            assert time.monotonic() - begun > 0.4
            await ask(pool, "a", model)  # no longer drained: nobody waits for its place
        assert fakes.spawns == 1


async def test_a_busy_model_is_drained_for_one_that_waited_long(fakes: Fakes) -> None:
    """Without draining, overlapping requests for `a` would keep `b` out for ever."""
    async with open_pool(fakes.config(size=1, swap_after_s=0.3)) as pool:
        model, stop = fakes.model(), asyncio.Event()

        async def crowd() -> None:
            while not stop.is_set():
                await ask(pool, "a", model, tokens=1, token_ms=20)

        crowds = [asyncio.ensure_future(crowd()) for _ in range(4)]
        await until(lambda: pool.state("a") == "loaded")
        begun = time.monotonic()
        await ask(pool, "b", model)
        assert time.monotonic() - begun > 0.2  # until then the loaded model's own queue was served
        stop.set()
        await asyncio.gather(*crowds)


async def test_a_long_answer_does_not_keep_a_cold_model_out_when_another_place_becomes_free(fakes: Fakes) -> None:
    """Two places: `a` answers one request all the time, `b` many short ones that overlap; `c` has to come in."""
    async with open_pool(fakes.config(size=2, swap_after_s=0.2)) as pool:
        models = {name: fakes.model() for name in "abc"}
        stop = asyncio.Event()

        async def crowd() -> None:
            while not stop.is_set():
                await ask(pool, "b", models["b"], tokens=1, token_ms=20)

        async with leased(pool, "a", models["a"]):
            crowds = [asyncio.ensure_future(crowd()) for _ in range(4)]
            try:
                await until(lambda: pool.state("b") == "loaded")
                async with asyncio.timeout(LONG_S):
                    await ask(pool, "c", models["c"])
                assert pool.state("a") == "loaded"
            finally:
                stop.set()
                await asyncio.gather(*crowds)


async def test_two_cold_models_can_drain_two_instances(fakes: Fakes) -> None:
    async with open_pool(fakes.config(size=2, swap_after_s=0.1)) as pool:
        model = fakes.model()
        async with busy(pool, "a", model) as a, busy(pool, "b", model) as b:
            cold = [asyncio.ensure_future(ask(pool, name, model)) for name in ("c", "d")]
            drained = pool._scheduler.places
            await until(lambda: [place.draining for place in drained] == [True, True], what="two drained instances")
            kept_out = [asyncio.ensure_future(ask(pool, name, model)) for name in ("a", "b")]
            await asyncio.wait(kept_out, timeout=0.1)
            assert not any(task.done() for task in kept_out)
            a.set()
            b.set()
            await asyncio.gather(*cold, *kept_out)


async def test_a_drained_instance_admits_again_when_nobody_wants_its_place(fakes: Fakes) -> None:
    async with open_pool(fakes.config(size=1, swap_after_s=0.05)) as pool:
        model = fakes.model()
        async with busy(pool, "a", model):
            cold = asyncio.ensure_future(ask(pool, "b", model))
            await until(lambda: pool._scheduler.places[0].draining, what="the drain")
            assert pool.state("a") == "unloading"
            own = asyncio.ensure_future(ask(pool, "a", model))
            await asyncio.wait({own}, timeout=0.1)
            assert not own.done()
            cold.cancel()
            await own
        assert fakes.spawns == 1


async def test_a_load_serves_more_than_one_request_under_mixed_load(fakes: Fakes) -> None:
    async with open_pool(fakes.config(size=1, swap_after_s=0.3)) as pool:
        model = fakes.model(parallel=1)
        await asyncio.gather(*(ask(pool, name, model, tokens=1, token_ms=5) for _ in range(40) for name in "ab"))
        assert fakes.spawns <= 40  # for 80 requests that came in turn; a few on an idle machine


@pytest.mark.parametrize("rounds", [10, pytest.param(200, marks=pytest.mark.full)])
async def test_two_models_that_race_for_one_place_are_started_once_each(fakes: Fakes, rounds: int) -> None:
    async with open_pool(fakes.config(size=1)) as pool, Census() as census:
        model, chance = fakes.model(), random.Random(9)
        await ask(pool, "a", model)

        async def racer(name: str) -> None:
            await elapse(chance.random() * 0.005)
            await ask(pool, name, model)

        for number in range(rounds):
            names = [f"x{number % 3}", f"y{number % 3}"]
            before = fakes.spawns
            await asyncio.gather(*(racer(name) for name in names))
            assert fakes.spawns - before == 2
    assert census.most == 1


@pytest.mark.parametrize("rounds", [15, pytest.param(200, marks=pytest.mark.full)])
async def test_a_request_at_any_moment_of_a_stop_is_served(fakes: Fakes, rounds: int) -> None:
    async with open_pool(fakes.config(size=1)) as pool, Census() as census:
        model, chance = fakes.model(), random.Random(11)
        for number in range(rounds):
            await ask(pool, "a", model)
            ending = asyncio.ensure_future(pool.unload("a") if number % 2 else ask(pool, "b", model))
            await asyncio.wait({ending}, timeout=chance.random() * 0.08)
            await ask(pool, "a", model)
            await ending
    assert census.most == 1


@pytest.mark.parametrize(("turns", "burst_s"), [(12, 0.5), pytest.param(500, 2.0, marks=pytest.mark.full)])
async def test_two_models_that_take_turns_in_one_place_neither_run_both_nor_starve(
    fakes: Fakes, turns: int, burst_s: float
) -> None:
    async with open_pool(fakes.config(size=1, swap_after_s=0.1)) as pool, Census() as census:
        model = fakes.model(fake={"LOAD_S": 0.05})
        for number in range(turns):
            await ask(pool, "ab"[number % 2], model, tokens=1)
        loads: list[int] = []  # the processes that were used, in order
        waits: list[int] = []  # how often the other model had the place while a request waited

        async def client(name: str) -> None:
            ends = time.monotonic() + burst_s
            while time.monotonic() < ends:
                before = len(loads)
                async with leased(pool, name, model) as instance:
                    if loads[-1:] != [instance.pid]:
                        loads.append(instance.pid)
                    waits.append(len(loads) - before)
                    await chat(instance, tokens=1, token_ms=2)

        await asyncio.gather(*(client("ab"[number % 2]) for number in range(6)))
        assert max(waits) <= 3
    assert census.most == 1


# -- another configuration -------------------------------------------------------------------------------------------


async def test_a_pool_that_grows_starts_what_waits(fakes: Fakes) -> None:
    config = fakes.config(size=1, swap_after_s=600)
    async with open_pool(config) as pool:
        model = fakes.model()
        async with busy(pool, "a", model):
            waiting = asyncio.ensure_future(ask(pool, "b", model))
            await until(lambda: pool.status()[-1]["queue"] == 1)
            pool.configure(config.server_pool.model_copy(update={"size": 2}))
            await waiting
            assert pool.state("a") == "loaded"


async def test_a_pool_that_shrinks_stops_those_used_longest_ago(fakes: Fakes) -> None:
    config = fakes.config(size=3)
    async with open_pool(config) as pool:
        model = fakes.model()
        for name in "abc":
            await ask(pool, name, model)
        pool.configure(config.server_pool.model_copy(update={"size": 1}))
        assert [pool.state(name) for name in "abc"] == ["unloaded"] * 2 + ["loaded"]
        await ask(pool, "d", model)
        assert [pool.state(name) for name in "abcd"] == ["unloaded"] * 3 + ["loaded"]
        assert pool.fitting("ad") == [["d"], ["a"]]


async def test_idle_processes_and_new_requests_get_the_new_times(fakes: Fakes) -> None:
    config = fakes.config(keep_alive=600)
    async with open_pool(config) as pool:
        model = fakes.model(parallel=1)
        await ask(pool, "a", model)
        others = ports()
        new = {"keep_alive": 0.1, "queue_timeout_s": 0.1, **others}
        pool.configure(config.server_pool.model_copy(update=new))
        await until(lambda: pool.state("a") == "unloaded", what="the unload")
        async with busy(pool, "a", model):
            assert pool.status()[0]["port"] in range(others["port_start"], others["port_end"] + 1)
            with pytest.raises(Overloaded, match=r"within 0\.1 s"):
                await ask(pool, "a", model)
