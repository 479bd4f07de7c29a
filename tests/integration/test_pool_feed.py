"""What the pool publishes, what it learns from starts, and what of that outlives a restart."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from llama_smart_proxy.backends.feed import Event, Feed, Kind, Subscription
from llama_smart_proxy.backends.pool.load_times import SHORT_S, LoadTimes
from llama_smart_proxy.proxy.errors import StartFailed
from llama_smart_proxy.proxy.store import FILE, ProxyMemory, Store
from tests.support.harness import until
from tests.support.pools import Fakes, ask, leased, open_pool


async def states(subscription: Subscription, last: str) -> list[str]:
    """The states of models up to `last`."""
    seen: list[Event] = []
    while not seen or seen[-1].data["state"] != last:
        seen += [event for event in await subscription.events() if event.kind is Kind.MODEL]
    return [f"{event.name} {event.data['state']}{' failed' if 'error' in event.data else ''}" for event in seen]


async def test_every_state_of_a_model_is_published_in_order(fakes: Fakes) -> None:
    async with open_pool(fakes.config(size=1)) as pool:
        with pool.downloads.feed.subscribe() as subscription:
            async with leased(pool, "a", fakes.model()):
                assert await states(subscription, "loaded") == ["a loading", "a loaded"]
                await pool.unload("a")
                assert await states(subscription, "unloading") == ["a unloading"]
            assert await states(subscription, "unloaded") == ["a unloaded"]
            with pytest.raises(StartFailed):
                await ask(pool, "b", fakes.model(fake={"EXIT": 3}))
            await until(lambda: pool.state("b") == "unloaded")
            assert (await states(subscription, "unloaded"))[:2] == ["b loading", "b unloaded failed"]
            await ask(pool, "a", fakes.model())
            assert await states(subscription, "loaded") == ["a loading", "a loaded"]
            await ask(pool, "c", fakes.model())
            assert await states(subscription, "loaded") == ["a unloaded", "c loading", "c loaded"]


async def test_the_length_of_a_queue_is_published(fakes: Fakes) -> None:
    async with open_pool(fakes.config()) as pool:
        model = fakes.model(parallel=1)
        with pool.downloads.feed.subscribe() as subscription:
            async with leased(pool, "a", model):
                waiting = [asyncio.ensure_future(ask(pool, "a", model)) for _ in range(2)]
                await until(lambda: pool._scheduler.queued == 2)
                waiting[0].cancel()
                await asyncio.wait({waiting[0]})
            await waiting[1]
            seen = [event.data["waiting"] for event in await subscription.events() if event.kind is Kind.QUEUE]
            assert seen == [1, 0, 1, 2, 1, 0]
        assert all(event.kind is not Kind.QUEUE for event in pool.downloads.feed.latest)


async def test_a_start_is_learned_and_published(fakes: Fakes) -> None:
    async with open_pool(fakes.config()) as pool:
        assert pool.times.typical_s("a") is None
        async with leased(pool, "a", fakes.model()) as instance:
            assert pool.times.typical_s("a") == pytest.approx(instance.load_s, abs=0.001)
        [learned] = [event for event in pool.downloads.feed.latest if event.kind is Kind.LOAD_TIME]
        assert (learned.name, learned.data) == ("a", {"seconds": pool.times.typical_s("a")})


def test_a_learned_time_is_the_median_of_the_last_few_and_that_of_the_same_file() -> None:
    times = LoadTimes(Feed())
    for seconds in (90.0, 1.0, 2.0, 3.0, 4.0, 100.0):
        times.learn("m", seconds, 1000)
    assert times.typical_s("m") == times.typical_s("m", 1100) == 3.0
    assert times.typical_s("m", 2000) is None, "the file has been replaced"
    times.learn("m", 9.0, 2000)
    assert times.typical_s("m", 2000) == 9.0


async def test_learned_times_survive_a_restart(tmp_path: Path) -> None:
    store = Store(tmp_path)
    before = LoadTimes(Feed(), ProxyMemory(store))
    before.learn("m", 8.0, 1000)
    before.learn("quick", SHORT_S / 2)
    store.close()
    again = Store(tmp_path)
    feed = Feed()
    times = LoadTimes(feed, ProxyMemory(again))
    times.recall()
    times.learn("new", 5.0)
    await until(lambda: times.typical_s("m", 1000) == 8.0, what="the time")
    assert times.typical_s("quick") is None, "what no one notices is not kept"
    assert {event.name: event.data["seconds"] for event in feed.latest} == {"m": 8.0, "new": 5.0}
    times.learn("m", 4.0, 1000)
    again.close()
    third = Store(tmp_path)
    times = LoadTimes(Feed(), ProxyMemory(third))
    times.recall()
    await until(lambda: times.typical_s("m", 1000) == 6.0, what="the median")
    assert times.typical_s("new") == 5.0
    third.close()


async def test_reading_what_was_learned_creates_no_file(tmp_path: Path) -> None:
    store = Store(tmp_path / "state")
    times = LoadTimes(Feed(), ProxyMemory(store))
    times.recall()
    times.learn("quick", SHORT_S / 2)
    store.close()
    assert not (tmp_path / "state" / FILE).exists()
