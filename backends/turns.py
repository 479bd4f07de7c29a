"""A limit on how many requests a server of others gets at one time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from llama_smart_proxy.backends.base import UpstreamRequest
from llama_smart_proxy.backends.http.exchange import UpstreamResponse
from llama_smart_proxy.backends.journal import StepKind, noted
from llama_smart_proxy.backends.progress import described, waiting
from llama_smart_proxy.proxy.errors import Overloaded


class Turns:
    """The server `name` gets at most `most` requests that generate at one time; the others wait in their order, each
    for `limit_s` seconds at most."""

    def __init__(self, name: str, most: int, limit_s: float) -> None:
        self._name = name
        self._limit_s = limit_s
        self._free = asyncio.Semaphore(most)

    @asynccontextmanager
    async def take(
        self, request: UpstreamRequest, opening: AbstractAsyncContextManager[UpstreamResponse]
    ) -> AsyncIterator[UpstreamResponse]:
        """The answer that `opening` returns, once it is the turn of the request. Raises: as `opening`; `Overloaded`
        (codes `queue_timeout`, `no_slot_now`)."""
        if self._free.locked():
            await self._wait(request)
        else:
            await self._free.acquire()  # at once
        try:
            async with opening as response:
                yield response
        finally:
            self._free.release()

    async def _wait(self, request: UpstreamRequest) -> None:
        if not request.wait:
            message = f"The server {self._name} has no free slot now, and this call must not wait."
            raise Overloaded(message, code="no_slot_now")
        now = asyncio.get_running_loop().time
        shown = described(request.progress, lambda: waiting(f"Waiting for {self._name}", now))
        try:
            with shown, noted(request.journal, StepKind.QUEUE, self._name):
                async with asyncio.timeout(self._limit_s):
                    await self._free.acquire()
        except TimeoutError:
            message = f"The server {self._name} was not free within {self._limit_s:g} s."
            raise Overloaded(message, code="queue_timeout") from None
