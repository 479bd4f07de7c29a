"""What those get who read the output of a model's servers."""

from __future__ import annotations

import asyncio

import pytest

from llama_smart_proxy.backends.pool.logring import LINES, LOOKED_AT, LogRing
from llama_smart_proxy.backends.pool.output import NEXT, Follower, Output


async def test_a_follower_gets_each_line_once_it_is_whole_and_no_earlier_one() -> None:
    output, ring = Output(), LogRing()
    output.renew(ring)
    ring.feed(b"before\nha")
    with output.follow() as follower:
        ring.feed(b"lf\n\nmore\n")
        assert await follower.lines() == ["half", "more"]
        waiting = asyncio.ensure_future(follower.lines())
        await asyncio.sleep(0)
        ring.feed(b"no end")
        await asyncio.sleep(0)
        assert not waiting.done()
        ring.feed(b"\n")
        assert await waiting == ["no end"]
    assert output.tail(2) == ["more", "no end"]


async def test_a_follower_goes_on_with_the_next_process_and_has_the_last_words_of_the_one_before() -> None:
    output, first, second = Output(), LogRing(), LogRing()
    output.renew(first)
    with output.follow() as follower:
        first.feed(b"one\nlast words")
        output.renew(second)
        second.feed(b"two\n")
        assert await follower.lines() == ["one", "last words", NEXT, "two"]
        second.feed(b"three\n")
        assert await follower.lines() == ["three"]
        assert output.tail() == ["two", "three"]


@pytest.mark.parametrize("pieces", [1, 7, 1000])
async def test_a_slow_follower_loses_the_oldest_lines_and_gets_their_number(pieces: int) -> None:
    output, ring = Output(), LogRing()
    output.renew(ring)
    lines = [b"%d\n" % number for number in range(1000)]
    with output.follow() as follower:
        for start in range(pieces):
            ring.feed(b"".join(lines[start * 1000 // pieces : (start + 1) * 1000 // pieces]))
        assert await follower.lines() == ["[800 lines are lost]", *(str(number) for number in range(800, 1000))]


async def test_a_flood_costs_a_follower_no_more_memory_than_the_ring_has() -> None:
    output, ring = Output(), LogRing()
    output.renew(ring)
    with output.follow() as follower:
        for _ in range(20):
            ring.feed(b"x\n" * LOOKED_AT)
        [note, *kept] = await follower.lines()
        assert note == f"[{20 * LOOKED_AT - LINES} lines are lost]" and len(kept) == LINES


async def test_secrets_are_blanked_for_followers_too() -> None:
    output, ring = Output(), LogRing(lambda text: text.replace("sesame", "***"))
    output.renew(ring)
    with output.follow() as follower:
        ring.feed(b"open sesame\n")
        assert await follower.lines() == ["open ***"]
    assert output.tail() == ["open ***"]


async def test_a_follower_that_is_cancelled_loses_nothing() -> None:
    output, ring = Output(), LogRing()
    output.renew(ring)
    with output.follow() as follower:
        waiting = asyncio.ensure_future(follower.lines())
        await asyncio.sleep(0)
        ring.feed(b"0\n")
        waiting.cancel()  # it is about to get that line
        await asyncio.wait({waiting})
        ring.feed(b"1\n")
        assert waiting.cancelled() and await follower.lines() == ["0", "1"]


def test_one_that_has_left_is_forgotten() -> None:
    output = Output()
    with output.follow() as follower:
        assert isinstance(follower, Follower) and len(output._readers) == 1
    assert not output._readers
