"""A burst: what a fast server sends at once is handled in parts, and between them the loop serves others."""

from __future__ import annotations

import asyncio
import gzip
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import pytest

from llama_smart_proxy.backends.http.exchange import UpstreamResponse
from tests.integration.test_connection import POST, pooled
from tests.support.harness import until
from tests.support.toxic import LAST_CHUNK, chunk, head, plain, token

FRAME = token("x" * 64)
FRAMES = 250
BODY = FRAME * FRAMES
STREAMS = 4
WORK_S = 0.0003
"""Time that a frame takes: of this only, not of the machine, depends what comes in one iteration of the loop."""
MOST = 40
"""Frames in one iteration: 5 ms of them, and the part in which these are over."""
CHUNKED = [("Transfer-Encoding", "chunked")]
ANSWERS = {
    "a chunk each": head(headers=CHUNKED) + chunk(FRAME) * FRAMES + LAST_CHUNK,
    "one chunk": head(headers=CHUNKED) + chunk(BODY) + LAST_CHUNK,
    "with a length": plain(BODY),
    "compressed": plain(gzip.compress(BODY), headers=[("Content-Encoding", "gzip")]),
}


class Busy:
    """Takes an answer, and time for each frame; `taken` counts frames by the iteration of the loop."""

    def __init__(self) -> None:
        self.iteration = 0
        self.taken: Counter[int] = Counter()
        self._over = False

    @contextmanager
    def counting(self) -> Iterator[None]:
        self._tick()
        yield
        self._over = True

    def _tick(self) -> None:
        self.iteration += 1
        if not self._over:
            asyncio.get_running_loop().call_soon(self._tick)

    def work(self, data: bytes) -> None:
        frames = data.count(b"\n\n")
        time.sleep(frames * WORK_S)
        self.taken[self.iteration] += frames


class Sink:
    """One answer, pushed."""

    def __init__(self, busy: Busy) -> None:
        self.body = b""
        self._busy = busy

    def feed(self, data: bytes) -> bool:
        self._busy.work(data)
        self.body += data
        return True

    async def drained(self) -> None:
        """Never full."""


async def pushed(response: UpstreamResponse, busy: Busy) -> bytes:
    sink = Sink(busy)
    await response.pipe(sink)
    return sink.body


async def pulled(response: UpstreamResponse, busy: Busy) -> bytes:
    body = b""
    while data := await response.piece():
        busy.work(data)
        body += data
    return body


Read = Callable[[UpstreamResponse, Busy], Awaitable[bytes]]


@pytest.mark.parametrize("read", [pushed, pulled])
@pytest.mark.parametrize("answer", ANSWERS)
async def test_the_loop_goes_on_between_the_parts_of_bursts(answer: str, read: Read) -> None:
    busy = Busy()

    async def one() -> bytes:
        async with pool.request(POST) as response:
            return await read(response, busy)

    async with pooled(ANSWERS[answer]) as (pool, _):
        with busy.counting():
            bodies = await asyncio.gather(*(one() for _ in range(STREAMS)))
    assert bodies == [BODY] * STREAMS
    assert max(busy.taken.values()) <= MOST, busy.taken.most_common(3)


class Stopping:
    """Takes of an answer so many bytes that it needs."""

    def __init__(self, response: UpstreamResponse, needed: int) -> None:
        self._response = response
        self._needed = needed

    def feed(self, data: bytes) -> bool:
        self._needed -= len(data)
        if self._needed <= 0:
            self._response.stop()
        return True

    async def drained(self) -> None:
        """Never full."""


@pytest.mark.parametrize("needed", [1, len(BODY) // 2, len(BODY)])
@pytest.mark.parametrize("answer", ANSWERS)
async def test_a_connection_lives_on_whose_reader_needed_only_a_part_of_a_burst(answer: str, needed: int) -> None:
    async with pooled(ANSWERS[answer]) as (pool, upstream):
        for _ in range(2):
            async with pool.request(POST) as response:
                await response.pipe(Stopping(response, needed))
            await until(lambda: response.complete and not pool._active)
        assert len(upstream.links) == 1
