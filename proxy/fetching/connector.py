"""The connections of a fetcher: to permitted addresses, and from servers that may send anything at any speed."""

from __future__ import annotations

from functools import partial
from typing import Any

from aiohttp import ServerDisconnectedError, TCPConnector
from aiohttp.abc import AbstractResolver
from aiohttp.client_proto import ResponseHandler

from llama_smart_proxy.proxy.fetching.guard import Guard

MOST_HEADS = 20
"""Responses to one request: one, and before that any number of interim ones (1xx), which aiohttp reads without a pause
for others as long as there are any."""
SLICE = 4096
"""Bytes that are parsed at once, so that a flood is noticed at its beginning."""
FREE_BYTES = 64 * 1024
MOST_PER_BYTE = 2
"""Beyond the first, so many bytes are received at most for one of the body: chunks of one byte cost as much each as
chunks of a thousand."""


class Careful(ResponseHandler):
    """Reads the answer to one request. A server that sends one head after the other, or tiny chunks, is disconnected:
    others would wait while these are parsed."""

    _heads = 0
    _received = 0
    _ended = False

    def data_received(self, data: bytes) -> None:
        for start in range(0, len(data) or 1, SLICE):  # none: aiohttp continues with what it holds
            if self._ended:
                return
            piece = data[start : start + SLICE]
            super().data_received(piece)
            self._received += len(piece)
            body = self._payload.total_bytes if self._payload is not None else 0
            if self._received > FREE_BYTES + MOST_PER_BYTE * body:
                self._end()

    def feed_data(self, data: Any, size: int = 0) -> None:
        self._heads += 1
        if self._heads > MOST_HEADS:
            self._end()
        else:
            super().feed_data(data, size)

    def _end(self) -> None:
        if not self._ended:
            self._ended = True
            if self._payload is not None:
                self._payload.set_exception(ServerDisconnectedError())
            self.set_exception(ServerDisconnectedError())
            self.abort()


class Connector(TCPConnector):
    """Connects to the addresses that `guard` permits, for one request each."""

    def __init__(self, guard: Guard, resolver: AbstractResolver) -> None:
        super().__init__(socket_factory=guard, resolver=resolver, use_dns_cache=False, force_close=True)
        self._factory = partial(Careful, loop=self._loop)  # type: ignore[assignment]  # only called
