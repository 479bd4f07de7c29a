"""Who gets an instance, who waits, who is turned away; and how instances end that nobody needs."""

from __future__ import annotations

import asyncio
import math
import signal
import time
from collections.abc import Awaitable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from llama_smart_proxy.backends.base import Priority, Services, UpstreamRequest
from llama_smart_proxy.backends.llamacpp.provider import LlamaCpp
from llama_smart_proxy.backends.pool.pool import Pool
from llama_smart_proxy.proxy.config import Config
from llama_smart_proxy.proxy.errors import Overloaded
from tests.support.harness import PATIENCE_S, until
from tests.support.pools import CHAT, FakeModel, Fakes, ask, chat, children, leased, open_pool


async def hold(pool: Pool, name: str, model: FakeModel, let_go: asyncio.Event, *, slot: bool = True) -> None:
    async with leased(pool, name, model, slot=slot):
        await let_go.wait()


def leases(pool: Pool, name: str) -> object:
    return next((entry["leases"] for entry in pool.status() if entry["model"] == name and "leases" in entry), 0)


def queue(pool: Pool, name: str) -> object:
    return next((entry["queue"] for entry in pool.status() if entry["model"] == name), 0)


async def refused(lease: Awaitable[object], code: str) -> Overloaded:
    with pytest.raises(Overloaded) as caught:
        await lease
    assert caught.value.code == code
    assert caught.value.retry_after_s is not None and caught.value.retry_after_s >= 1
    return caught.value


async def test_requests_for_a_cold_model_share_one_load(fakes: Fakes) -> None:
    async with open_pool(fakes.config()) as pool:
        model = fakes.model(fake={"LOAD_S": 0.2})
        waiting = [asyncio.ensure_future(ask(pool, "a", model)) for _ in range(20)]
        await until(lambda: queue(pool, "a") == 20, what="the queue")
        assert pool.state("a") == "loading"
        answers = await asyncio.gather(*waiting)
        assert len(answers) == 20
        assert pool.state("a") == "loaded"
        assert fakes.spawns == 1
        await until(lambda: leases(pool, "a") == 0)
    assert pool.state("a") == "unloaded"


async def test_no_more_than_its_slots_generate_at_a_time_in_the_order_they_came(fakes: Fakes) -> None:
    async with open_pool(fakes.config()) as pool:
        model = fakes.model(parallel=2)
        order: list[int] = []
        inside = worst = 0

        async def use(number: int) -> None:
            nonlocal inside, worst
            async with leased(pool, "a", model) as instance:
                order.append(number)
                inside += 1
                worst = max(worst, inside)
                await chat(instance, tokens=1, token_ms=2)
                inside -= 1

        await asyncio.gather(*(use(number) for number in range(30)))
        assert order == list(range(30))
        assert worst == 2


async def test_questions_need_no_slot(fakes: Fakes) -> None:
    async with open_pool(fakes.config()) as pool:
        model, let_go = fakes.model(parallel=1), asyncio.Event()
        holder = asyncio.ensure_future(hold(pool, "a", model, let_go))
        await until(lambda: leases(pool, "a") == 1)
        waiter = asyncio.ensure_future(ask(pool, "a", model))
        await until(lambda: queue(pool, "a") == 1)
        async with leased(pool, "a", model, slot=False) as instance:
            assert instance.slots == 1
        assert not waiter.done()
        let_go.set()
        await asyncio.gather(holder, waiter)


async def test_a_lease_names_its_slot_which_remembers_the_last_request(fakes: Fakes) -> None:
    async with open_pool(fakes.config()) as pool, AsyncExitStack() as stack:
        model = fakes.model(parallel=2).at("a")
        first, second, third = (UpstreamRequest("POST", CHAT, body=b"%d" % number) for number in range(3))
        leases = [await stack.enter_async_context(pool.lease(model, request)) for request in (first, second)]
        slots = leases[0].place.slots
        assert [lease.slot for lease in leases] == [0, 1]
        async with pool.lease(model, UpstreamRequest("GET", "/props", slot=False)) as question:
            assert question.slot is None and question.instance is leases[0].instance
        waiting = asyncio.ensure_future(stack.enter_async_context(pool.lease(model, third)))
        await until(lambda: queue(pool, "a") == 1)
        await stack.pop_all().aclose()
        assert [slot.last for slot in slots] == [first, second]
        assert (await waiting).slot == 1  # the last one that was entered was left first
        assert [slot.last for slot in slots] == [first, third] and slots[1].busy


async def test_a_request_that_waits_is_known_by_client_and_priority(fakes: Fakes) -> None:
    async with open_pool(fakes.config()) as pool:
        model = fakes.model(fake={"LOAD_S": 600})
        request = UpstreamRequest("POST", CHAT, client="c", priority=Priority.TASK)
        waiting = asyncio.ensure_future(pool.lease(model.at("a"), request).__aenter__())
        await until(lambda: queue(pool, "a") == 1)
        [waiter] = pool._scheduler.queues["a"].later_waiters
        assert (waiter.request.client, waiter.request.priority) == ("c", Priority.TASK)
        waiting.cancel()


async def test_a_loading_model_delays_no_other(fakes: Fakes) -> None:
    async with open_pool(fakes.config(size=2, load_timeout_s=600)) as pool:
        slow, quick = fakes.model(fake={"LOAD_S": 600}), fakes.model()
        waiting = asyncio.ensure_future(ask(pool, "slow", slow))
        await until(lambda: pool.state("slow") == "loading")
        await ask(pool, "quick", quick)
        assert pool.state("slow") == "loading" and not waiting.done()
        waiting.cancel()


async def test_the_queue_is_bounded_over_all_models(fakes: Fakes) -> None:
    async with open_pool(fakes.config(size=2, queue_limit=3)) as pool:
        model = fakes.model(fake={"LOAD_S": 1.5})
        waiting = [asyncio.ensure_future(ask(pool, name, model)) for name in ("a", "a", "b")]
        await until(lambda: queue(pool, "a") == 2 and queue(pool, "b") == 1)
        await refused(ask(pool, "a", model), "overloaded")
        await refused(ask(pool, "b", model), "overloaded")
        assert not any(one.done() for one in waiting)
        await asyncio.gather(*waiting)
        await ask(pool, "a", model)


@pytest.mark.full
async def test_a_thousand_requests_on_a_cold_model_cause_one_load_and_are_served_in_order(fakes: Fakes) -> None:
    async with open_pool(fakes.config(queue_limit=1000)) as pool:
        model, order = fakes.model(fake={"LOAD_S": 0.5}, parallel=4), list[int]()

        async def use(number: int) -> None:
            async with leased(pool, "a", model) as instance:
                order.append(number)
                await chat(instance, tokens=1)

        await asyncio.gather(*(use(number) for number in range(1000)))
        assert order == list(range(1000))
        assert fakes.spawns == 1


async def test_a_wait_for_a_slot_ends_at_the_queue_timeout(fakes: Fakes) -> None:
    async with open_pool(fakes.config(queue_timeout_s=0.3)) as pool:
        model, let_go = fakes.model(parallel=1), asyncio.Event()
        holder = asyncio.ensure_future(hold(pool, "a", model, let_go))
        await until(lambda: leases(pool, "a") == 1)
        begun = time.monotonic()
        await refused(ask(pool, "a", model), "queue_timeout")
        assert time.monotonic() - begun > 0.25
        assert queue(pool, "a") == 0
        let_go.set()
        await holder
        await ask(pool, "a", model)


async def test_the_queue_timeout_does_not_end_a_load(fakes: Fakes) -> None:
    async with open_pool(fakes.config(queue_timeout_s=0.2)) as pool:
        await ask(pool, "a", fakes.model(fake={"LOAD_S": 0.7}))


# -- leaving ---------------------------------------------------------------------------------------------------------


async def test_who_leaves_is_gone_at_once_and_the_load_goes_on(fakes: Fakes) -> None:
    async with open_pool(fakes.config()) as pool:
        gate = fakes.folder / "gate"
        model = fakes.model(fake={"LOAD_UNTIL": gate})
        for steps in range(10):
            waiter = asyncio.ensure_future(ask(pool, "a", model))
            for _ in range(steps * steps):
                await asyncio.sleep(0)
            waiter.cancel()
            await asyncio.wait({waiter})
            assert pool.state("a") != "loaded"
            assert queue(pool, "a") == leases(pool, "a") == 0
        gate.touch()
        await until(lambda: pool.state("a") == "loaded", what="the load nobody waits for")
        assert fakes.spawns == 1
        assert not fakes.events("request", "/v1/chat/completions")
        await ask(pool, "a", model)


async def test_a_lease_granted_to_one_who_just_left_goes_to_the_next(fakes: Fakes) -> None:
    async with open_pool(fakes.config()) as pool:
        model = fakes.model(parallel=1)
        for _ in range(50):
            let_go = asyncio.Event()
            holder = asyncio.ensure_future(hold(pool, "a", model, let_go))
            await until(lambda: leases(pool, "a") == 1)
            leaver, stayer = (asyncio.ensure_future(hold(pool, "a", model, let_go)) for _ in range(2))
            await until(lambda: queue(pool, "a") == 2)
            holder.cancel()
            leaver.cancel()  # in the same turn of the loop in which the holder hands over to it
            await asyncio.wait({holder, leaver})
            let_go.set()
            await stayer  # were the lease lost, this would fail when the queue's time is over
            assert queue(pool, "a") == leases(pool, "a") == 0


async def test_a_cancelled_stream_frees_its_slot_and_its_connection(fakes: Fakes) -> None:
    async with open_pool(fakes.config()) as pool:
        model = fakes.model(parallel=1)
        stream = asyncio.ensure_future(ask(pool, "a", model, stall_after=1))
        await until(lambda: fakes.events("request", "/v1/chat/completions"), what="the request")
        stream.cancel()
        await until(lambda: fakes.events("closed"), what="the closing of the connection")
        await ask(pool, "a", model)


# -- keeping alive ---------------------------------------------------------------------------------------------------


async def test_an_idle_instance_is_unloaded_after_keep_alive(fakes: Fakes) -> None:
    async with open_pool(fakes.config(keep_alive=0.3)) as pool:
        model = fakes.model()
        for _ in range(4):  # use starts the count anew
            await ask(pool, "a", model, tokens=1, token_ms=150)
        begun = time.monotonic()
        await ask(pool, "a", model, tokens=1)
        assert fakes.spawns == 1
        await until(lambda: pool.state("a") == "unloaded", what="the unload")
        assert time.monotonic() - begun > 0.25
        await until(lambda: not children())


async def test_keep_alive_zero_unloads_at_once_but_serves_who_waits(fakes: Fakes) -> None:
    async with open_pool(fakes.config()) as pool:
        model = fakes.model(keep_alive=0, parallel=1)
        await asyncio.gather(*(ask(pool, "a", model) for _ in range(5)))
        assert pool.state("a") == "unloaded"
        assert fakes.spawns == 1


@pytest.mark.parametrize("fields", [{"keep_alive": -1}, {"pinned": True}])
async def test_negative_keep_alive_and_pinned_mean_never(fakes: Fakes, fields: dict[str, Any]) -> None:
    async with open_pool(fakes.config(keep_alive=0)) as pool:
        model = fakes.model(**fields)
        assert model.pinned or model.keep_alive == math.inf
        await ask(pool, "a", model)
        await ask(pool, "b", fakes.model())
        await until(lambda: pool.state("b") == "unloaded")
        assert pool.state("a") == "loaded"


# -- operators -------------------------------------------------------------------------------------------------------


async def test_load_and_unload_are_idempotent(fakes: Fakes) -> None:
    async with open_pool(fakes.config(queue_limit=0)) as pool:
        model = fakes.model()
        await pool.unload("a")
        await asyncio.gather(pool.load(model.at("a")), pool.load(model.at("a")))
        await pool.load(model.at("a"))
        assert pool.state("a") == "loaded" and fakes.spawns == 1
        await asyncio.gather(pool.unload("a"), pool.unload("a"))
        assert pool.state("a") == "unloaded" and not children()


async def test_unloading_one_in_use_waits_for_its_last_answer(fakes: Fakes) -> None:
    async with open_pool(fakes.config()) as pool:
        model, let_go = fakes.model(), asyncio.Event()
        holder = asyncio.ensure_future(hold(pool, "a", model, let_go))
        await until(lambda: leases(pool, "a") == 1)
        await pool.unload("a")
        assert pool.state("a") == pool.status()[0]["state"] == "unloading"
        later = asyncio.ensure_future(ask(pool, "a", model))
        await until(lambda: queue(pool, "a") == 1)
        assert fakes.spawns == 1
        let_go.set()
        await asyncio.gather(holder, later)
        assert fakes.spawns == 2  # admitted nobody, ended, and was started again for who came later


async def test_unloading_breaks_off_a_load(fakes: Fakes) -> None:
    async with open_pool(fakes.config(load_timeout_s=600)) as pool:
        waiter = asyncio.ensure_future(ask(pool, "a", fakes.model(fake={"LOAD_S": 600})))
        await until(lambda: pool.state("a") == "loading" and children())
        async with asyncio.timeout(PATIENCE_S):
            await pool.unload("a")
        await refused(waiter, "unloaded")
        assert not children()


async def test_preload_loads_in_the_background_pinned_first(fakes: Fakes) -> None:
    config = fakes.config(size=2)
    slow = {"LOAD_S": 0.3}
    models = {name: fakes.model(preload=True, fake=slow) for name in ("a", "b")}
    models["c"] = fakes.model(preload=True, pinned=True, fake=slow)
    config = Config.model_validate(config.model_dump() | {"models": {k: v.model_dump() for k, v in models.items()}})
    async with open_pool(config) as pool:
        await LlamaCpp(config, Services(pool.downloads, pool)).start()
        assert pool.state("a") != "loaded" != pool.state("c")
        await until(lambda: pool.state("a") == pool.state("c") == "loaded")
        assert pool.state("b") == "unloaded" and fakes.spawns == 2


async def test_status_tells_what_operators_ask_for(fakes: Fakes) -> None:
    async with open_pool(fakes.config()) as pool:
        assert pool.status() == []
        async with leased(pool, "a", fakes.model()) as instance:
            [entry] = pool.status()
            assert entry["model"] == "a" and entry["state"] == "ready"
            assert entry["pid"] == instance.pid and entry["port"] == instance.port
            assert entry["leases"] == 1 and entry["queue"] == entry["restarts"] == 0
            assert isinstance(entry["rss_bytes"], int) and entry["rss_bytes"] > 2**20
            assert isinstance(entry["ready_s"], float) and "error" not in entry
            before = time.time()
        last_used = pool.status()[0]["last_used"]
        assert isinstance(last_used, float) and before - 1 < last_used < time.time() + 1


# -- the end ---------------------------------------------------------------------------------------------------------


async def test_closing_lets_those_inside_finish(fakes: Fakes) -> None:
    async with open_pool(fakes.config()) as pool:
        model = fakes.model(parallel=1)
        inside = [asyncio.ensure_future(ask(pool, "a", model, tokens=5, token_ms=40)) for _ in range(2)]
        await until(lambda: leases(pool, "a") == 1)
        closing = asyncio.ensure_future(pool.close(drain_s=600))
        await until(lambda: pool._scheduler.closing)
        await refused(ask(pool, "a", model), "shutting_down")
        await asyncio.gather(*inside)
        async with asyncio.timeout(PATIENCE_S):
            await closing


async def test_a_second_close_cuts_the_drain_short(fakes: Fakes) -> None:
    async with open_pool(fakes.config(size=1)) as pool:
        model, never = fakes.model(), asyncio.Event()
        holder = asyncio.ensure_future(hold(pool, "a", model, never))
        await until(lambda: leases(pool, "a") == 1)
        waiter = asyncio.ensure_future(ask(pool, "b", model))
        await until(lambda: queue(pool, "b") == 1)
        closing = asyncio.ensure_future(pool.close(drain_s=600))
        await asyncio.wait({closing}, timeout=0.1)
        assert not closing.done()
        async with asyncio.timeout(PATIENCE_S):
            await pool.close(drain_s=0)
            await closing
        await refused(waiter, "shutting_down")
        holder.cancel()
        await asyncio.wait({holder})


async def test_closing_breaks_off_loads_and_kills_the_stubborn(fakes: Fakes) -> None:
    async with open_pool(fakes.config(size=3, stop_timeout_s=0.4, load_timeout_s=600)) as pool:
        stubborn = fakes.model(fake={"IGNORE_TERM": 1})
        await ask(pool, "a", stubborn)
        await ask(pool, "b", stubborn)
        waiter = asyncio.ensure_future(ask(pool, "c", fakes.model(fake={"LOAD_S": 600})))
        await until(lambda: len(children()) == 3)
        await pool.close(drain_s=0)
        assert not children(), "none was given up on"
        await refused(waiter, "shutting_down")


async def test_who_waits_for_a_crashed_server_gets_a_new_one(fakes: Fakes) -> None:
    async with open_pool(fakes.config()) as pool:
        model, let_go = fakes.model(parallel=1), asyncio.Event()
        holder = asyncio.ensure_future(hold(pool, "a", model, let_go))
        await until(lambda: leases(pool, "a") == 1)
        waiter = asyncio.ensure_future(ask(pool, "a", model))
        await until(lambda: queue(pool, "a") == 1)
        [child] = children()
        child.send_signal(signal.SIGKILL)
        await waiter
        let_go.set()
        await holder
        [entry] = pool.status()
        assert entry["restarts"] == 1 and entry["leases"] == 0


async def test_a_limit_of_the_model_leaves_slots_of_its_server_unused(fakes: Fakes) -> None:
    async with open_pool(fakes.config()) as pool:
        model = fakes.model(parallel=4, concurrent=2)
        assert await pool.load(model.at("a")) == 4, "which bounds `n` of a request"
        async with leased(pool, "a", model), leased(pool, "a", model):
            third = asyncio.ensure_future(ask(pool, "a", model))
            await until(lambda: pool.status()[0]["queue"] == 1, what="the wait")
            async with leased(pool, "a", model, slot=False):
                assert not third.done()
        await third
