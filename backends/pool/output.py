"""What the servers of one model print, for those who read it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from llama_smart_proxy.backends.pool.logring import LINES, LogRing

NEXT = "--- the next process of this model ---"
"""Stands between the lines of two processes."""


class Output:
    """The output of a model's servers, one after another, of which the last one is kept. What reads it holds no lines
    of its own, so that a slow reader costs nothing, and misses what the ring does not keep."""

    def __init__(self) -> None:
        self._ring: LogRing | None = None
        self._readers: set[asyncio.Event] = set()

    def renew(self, ring: LogRing) -> None:
        """A process starts, whose output `ring` keeps."""
        if self._ring is not None:
            self._ring.on_lines = None
        ring.on_lines = self._wake
        self._ring = ring
        self._wake()

    def tail(self, lines: int = LINES) -> list[str]:
        """The last lines of the last process, at most `LINES`."""
        return self._ring.tail(lines) if self._ring is not None else []

    @contextmanager
    def follow(self) -> Iterator[Follower]:
        """The lines that come from now on, within the context, also those of later processes."""
        some = asyncio.Event()
        self._readers.add(some)
        try:
            yield Follower(self, some)
        finally:
            self._readers.discard(some)

    def _wake(self) -> None:
        for some in self._readers:
            some.set()


class Follower:
    """One reader of an `Output`."""

    def __init__(self, output: Output, some: asyncio.Event) -> None:
        self._output = output
        self._some = some
        self._ring = output._ring
        self._position = self._ring.added if self._ring is not None else 0

    async def lines(self) -> list[str]:
        """The lines since the last call, once there are any; with a line in place of those that are lost. May be
        cancelled without loss."""
        while True:
            await self._some.wait()
            self._some.clear()
            if found := self._read():
                return found

    def _read(self) -> list[str]:
        newest, found = self._output._ring, []
        if self._ring is not newest:
            if self._ring is not None:
                found = [*self._new(self._ring, over=True), NEXT]
            self._ring, self._position = newest, 0
        return found + (self._new(newest) if newest is not None else [])

    def _new(self, ring: LogRing, *, over: bool = False) -> list[str]:
        lost, lines = ring.since(self._position, over=over)
        self._position = ring.added
        return [f"[{lost} lines are lost]", *lines] if lost else lines
