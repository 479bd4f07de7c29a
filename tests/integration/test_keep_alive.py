"""How long an idle model stays when requests have a say in it, as those of Ollama's clients do."""

from __future__ import annotations

import asyncio
import math
import signal

import pytest

from llama_smart_proxy.backends.pool.pool import Pool
from llama_smart_proxy.backends.pool.queue import ModelQueue
from llama_smart_proxy.proxy.errors import Overloaded
from tests.support.harness import until
from tests.support.pools import FakeModel, Fakes, ask, chat, children, leased, open_pool

LONG = 600.0


def queue_of(pool: Pool, name: str, model: FakeModel) -> ModelQueue:
    return pool._scheduler.queue(model.at(name))


async def ask_for(pool: Pool, name: str, model: FakeModel, keep_alive: float, **fake: object) -> None:
    """One request that says how long the model shall stay."""
    pool._scheduler.idling.set_keep_alive(queue_of(pool, name, model), keep_alive)
    await ask(pool, name, model, **fake)


def left_s(pool: Pool, name: str) -> float | None:
    """Seconds until the model is stopped."""
    place = pool._scheduler.queues[name].place
    expires_at = pool._scheduler.idling.expires_at(place) if place is not None else None
    return None if expires_at is None else expires_at - asyncio.get_running_loop().time()


async def test_a_request_may_shorten_the_stay(fakes: Fakes) -> None:
    async with open_pool(fakes.config(keep_alive=LONG)) as pool:
        model = fakes.model(keep_alive=LONG)
        await ask_for(pool, "a", model, 0.3)
        left = left_s(pool, "a")
        assert left is not None and left <= 0.3
        await until(lambda: pool.state("a") == "unloaded", what="the unload")


async def test_a_request_may_prolong_the_stay(fakes: Fakes) -> None:
    async with open_pool(fakes.config(size=3, keep_alive=0.2)) as pool:
        await ask_for(pool, "for ever", fakes.model(), math.inf)
        await ask_for(pool, "long", fakes.model(keep_alive=0), LONG)
        await ask(pool, "usual", fakes.model())
        await until(lambda: pool.state("usual") == "unloaded", what="the unload of the one that nobody asked to stay")
        assert pool.state("for ever") == pool.state("long") == "loaded"
        left = left_s(pool, "long")
        assert left_s(pool, "for ever") == math.inf and left is not None and LONG - 60 < left <= LONG


async def test_the_last_request_wins_also_over_a_timer_that_runs(fakes: Fakes) -> None:
    async with open_pool(fakes.config()) as pool:
        model = fakes.model()
        await ask_for(pool, "a", model, LONG)  # starts a timer
        await ask_for(pool, "a", model, 0.2)
        await until(lambda: pool.state("a") == "unloaded", what="the unload")
        await ask_for(pool, "a", model, 2.0)
        await ask_for(pool, "a", model, LONG)
        await ask(pool, "a", model)  # says nothing: nothing changes
        await ask_for(pool, "b", fakes.model(), 3.0)
        await until(lambda: pool.state("b") == "unloaded", what="the unload of another with a time that is no shorter")
        assert pool.state("a") == "loaded" and fakes.spawns == 3


async def test_an_idle_model_may_be_told_too(fakes: Fakes) -> None:
    async with open_pool(fakes.config(keep_alive=LONG)) as pool:
        model = fakes.model()
        await pool.load(model.at("a"))
        pool._scheduler.idling.set_keep_alive(queue_of(pool, "a", model), 0.2)
        assert pool.state("a") == "loaded"
        await until(lambda: pool.state("a") == "unloaded", what="the unload")


async def test_zero_unloads_after_the_answer_and_not_before(fakes: Fakes) -> None:
    async with open_pool(fakes.config()) as pool:
        model = fakes.model(parallel=1)
        await ask(pool, "a", model)
        await asyncio.gather(*(ask_for(pool, "a", model, 0) for _ in range(5)))
        assert pool.state("a") == "unloaded" and fakes.spawns == 1
        assert len(fakes.events("request", "/v1/chat/completions")) == 6
        await until(lambda: not children())


async def test_a_stopped_process_takes_the_wish_with_it(fakes: Fakes) -> None:
    async with open_pool(fakes.config(keep_alive=LONG)) as pool:
        model = fakes.model()
        await ask_for(pool, "a", model, math.inf)
        await pool.unload("a")
        await ask(pool, "a", model)
        left = left_s(pool, "a")
        assert left is not None and left <= LONG


async def test_a_crashed_process_takes_the_wish_with_it(fakes: Fakes) -> None:
    async with open_pool(fakes.config(keep_alive=LONG)) as pool:
        model = fakes.model()
        await ask_for(pool, "a", model, math.inf)
        [child] = children()
        child.send_signal(signal.SIGKILL)
        await until(lambda: pool.state("a") == "unloaded", what="the end")
        await ask(pool, "a", model)
        left = left_s(pool, "a")
        assert left is not None and left <= LONG


async def test_a_wish_uttered_while_the_last_process_ends_is_for_the_next_one(fakes: Fakes) -> None:
    async with open_pool(fakes.config(keep_alive=LONG, stop_timeout_s=0.4)) as pool:
        model = fakes.model(fake={"IGNORE_TERM": 1})
        await ask_for(pool, "a", model, 0)
        assert pool.state("a") == "unloaded" and children()
        await ask_for(pool, "a", model, math.inf)
        assert fakes.spawns == 2 and left_s(pool, "a") == math.inf


async def test_a_pinned_model_stays_whatever_requests_say(fakes: Fakes) -> None:
    async with open_pool(fakes.config()) as pool:
        model = fakes.model(pinned=True)
        await ask_for(pool, "a", model, 0)
        await ask(pool, "a", model)
        assert pool.state("a") == "loaded" and fakes.spawns == 1
        assert left_s(pool, "a") == math.inf


async def test_a_model_kept_for_ever_still_makes_room(fakes: Fakes) -> None:
    async with open_pool(fakes.config(size=1)) as pool:
        await ask_for(pool, "a", fakes.model(), math.inf)
        await ask(pool, "b", fakes.model())
        assert pool.state("a") == "unloaded" and pool.state("b") == "loaded"


async def test_when_a_model_expires_is_known_while_it_is_loaded(fakes: Fakes) -> None:
    async with open_pool(fakes.config(keep_alive=LONG)) as pool:
        model = fakes.model(fake={"LOAD_S": 0.2})
        loading = asyncio.ensure_future(pool.load(model.at("a")))
        await until(lambda: pool.state("a") == "loading")
        assert left_s(pool, "a") is None
        await loading
        async with leased(pool, "a", model) as instance:
            await chat(instance, tokens=10, token_ms=40)
            now, place = asyncio.get_running_loop().time, pool._scheduler.queues["a"].place
            assert place is not None
            before, expires_at = now(), pool._scheduler.idling.expires_at(place)
            assert expires_at is not None and before <= expires_at - LONG <= now()  # from now on, however long it takes
            await pool.unload("a")
            told_to_go = left_s(pool, "a")
            assert told_to_go is not None and told_to_go <= 0
        await until(lambda: left_s(pool, "a") is None, what="the unload")


async def test_the_wish_of_a_request_that_fails_does_no_harm(fakes: Fakes) -> None:
    async with open_pool(fakes.config(queue_limit=0)) as pool:
        model = fakes.model(parallel=1)
        await pool.load(model.at("a"))
        async with leased(pool, "a", model):
            with pytest.raises(Overloaded):
                await ask_for(pool, "a", model, LONG)
        assert pool.state("a") == "loaded"
        left = left_s(pool, "a")
        assert left is not None and left > LONG - 60
