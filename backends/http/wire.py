"""One socket to a model server.

A token passes straight on to the answer in progress. Of a burst, which may be thousands of tokens in one read, the rest
is held, and reading paused: the reader of the answer passes it on part by part, in turns with all others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, cast

from llama_smart_proxy.backends.http.turns import turns

if TYPE_CHECKING:
    from llama_smart_proxy.backends.http.exchange import UpstreamResponse

PART = 2 * 1024
"""Bytes that are passed on at once in any case: a few tokens."""
DIRECT = 16 * 1024
"""Most bytes that are passed on at once: an answer that is not streamed is seldom longer."""


class Connection(asyncio.Protocol):
    """One socket and the answer in progress on it. All methods run in the event loop."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.response: UpstreamResponse | None = None
        self.idle_until = 0.0
        self.held = b""
        """What was read and not passed on, from `_at` on."""
        self._at = 0
        self._ending: Callable[[], None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's transports do not inherit from asyncio's

    def send(self, response: UpstreamResponse, data: bytes) -> None:
        """Send the request `data`; the answer is passed to `response`."""
        self.response = response
        if self.transport is None:
            response._connection_lost(None)
        else:
            # In the next iteration of the loop: requests received together are sent together, and the server wakes up
            # once for all of them.
            response._loop.call_soon(self._write, data)

    def _write(self, data: bytes) -> None:
        if self.transport is not None:
            self.transport.write(data)

    def data_received(self, data: bytes) -> None:
        if self.response is None:
            self.abort()  # unsolicited bytes: the next answer on this connection would be unreliable
        elif self.held or (len(data) > PART and (len(data) > DIRECT or turns().over())):
            self.held, self._at = self.held[self._at :] + data, 0
            self.response._hold()
        else:
            self.response._feed(data)

    def pass_on(self, size: int = PART) -> None:
        """Pass on so many bytes of what is held, and its end after the last of them."""
        if self.response is None:
            return
        data = self.held[self._at : self._at + size]
        self._at += size
        if self._at >= len(self.held):
            self.held, self._at = b"", 0
        self.response._feed(data)
        if not self.held and self._ending is not None:
            ending, self._ending = self._ending, None
            ending()

    def eof_received(self) -> None:
        if self.response is not None:
            self._end(self.response._eof_received)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        if self.response is not None:
            self._end(partial(self.response._connection_lost, exc))

    def _end(self, ending: Callable[[], None]) -> None:
        if self.held:
            self._ending = ending
        else:
            ending()

    @property
    def open(self) -> bool:
        return self.transport is not None and not self.transport.is_closing()

    @property
    def idle(self) -> bool:
        """Whether it can be reused: open, with nothing left of the last answer, and the last request was sent entirely.
        (A server may answer before it has read the whole request, and stop reading.)"""
        return (
            self.open and not self.held and self.transport is not None and self.transport.get_write_buffer_size() == 0
        )

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()
