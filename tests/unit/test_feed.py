"""The feed of events: a snapshot first, then everything in order, and publishers that never wait."""

from __future__ import annotations

import asyncio

from llama_smart_proxy.backends.feed import MOST_PENDING, Feed, Kind, Subscription


async def read(subscription: Subscription) -> list[tuple[str, str]]:
    """Name and state of what has come."""
    return [(event.name, event.data["state"]) for event in await subscription.events()]


async def test_a_subscriber_gets_a_snapshot_and_then_every_change_in_order() -> None:
    feed = Feed()
    for name, state in (("a", "loading"), ("b", "loading"), ("a", "loaded")):
        feed.publish(Kind.MODEL, name, {"state": state})
    feed.publish(Kind.DOWNLOAD, "f", {"status": "success"}, over=True)
    with feed.subscribe() as subscription:
        assert await read(subscription) == [("b", "loading"), ("a", "loaded")], "what is over is no part of it"
        changes = [("a", "unloading"), ("b", "loaded"), ("a", "unloaded"), ("a", "loading")]
        for name, state in changes:
            feed.publish(Kind.MODEL, name, {"state": state})
            feed.publish(Kind.MODEL, name, {"state": state})  # which is none
        assert await read(subscription) == changes
        waiting = asyncio.ensure_future(subscription.events())
        await asyncio.sleep(0)
        assert not waiting.done()
        waiting.cancel()
        feed.publish(Kind.MODEL, "b", {"state": "unloaded"})
        assert await read(subscription) == [("b", "unloaded")], "a read that was broken off loses nothing"


async def test_a_subscriber_who_does_not_read_loses_the_oldest_and_knows_how_things_are_in_the_end() -> None:
    feed = Feed()
    with feed.subscribe() as slow, feed.subscribe() as quick:
        for number in range(20 * MOST_PENDING):
            feed.publish(Kind.MODEL, f"m{number % 3}", {"state": str(number)})
            assert await read(quick) == [(f"m{number % 3}", str(number))]
            assert len(slow._pending) <= MOST_PENDING
        seen = await read(slow)
        assert len(seen) <= MOST_PENDING and seen == sorted(seen, key=lambda item: int(item[1]))
        assert dict(seen) == {event.name: event.data["state"] for event in feed.latest}
        feed.publish(Kind.MODEL, "m0", {"state": "next"})
        assert await read(slow) == [("m0", "next")]


async def test_what_is_over_is_told_also_to_one_who_does_not_read() -> None:
    feed = Feed()
    with feed.subscribe() as slow:
        for number in range(MOST_PENDING):
            feed.publish(Kind.LOAD, "m", {"share": number})
        feed.publish(Kind.LOAD, "m", {"share": None}, over=True)
        assert (await slow.events())[-1].data == {"share": None}


async def test_a_subscription_ends_with_its_context_and_with_the_feed() -> None:
    feed = Feed()
    with feed.subscribe() as subscription:
        waiting = asyncio.ensure_future(subscription.events())
        await asyncio.sleep(0)
        feed.close()
        assert await waiting == [] and await subscription.events() == []
    assert feed._subscriptions == set()
