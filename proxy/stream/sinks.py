"""Where the chunks of an answer go: into a stream for the client, or into one body."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Protocol

from aiohttp import web

from llama_smart_proxy.proxy.chat import Chunk, Fold
from llama_smart_proxy.proxy.chat.chunk import has_content
from llama_smart_proxy.proxy.errors import ProxyError, let_go
from llama_smart_proxy.proxy.http.response import ResponseWriter
from llama_smart_proxy.proxy.stream.encoder import StreamEncoder

if TYPE_CHECKING:
    from llama_smart_proxy.proxy.stream.answer import ModelAnswer

logger = logging.getLogger(__name__)

UNENCODABLE = (AttributeError, KeyError, TypeError, ValueError)
"""Raised on encoding a value that does not have the shape the API requires."""


class ChunkSink(Protocol):
    """Accepts chunks as they arrive."""

    @property
    def begun(self) -> bool:
        """Whether the client has received any of the answer, so that the request cannot be retried."""

    @property
    def waiting(self) -> bool:
        """Whether text is awaited: chunks are given to `start`."""

    async def start(self, chunks: list[Chunk]) -> None:
        """Take the first chunks. Called again while it is `waiting`, and after a failed attempt that is retried."""

    def take(self, chunks: list[Chunk]) -> bool:
        """Take more chunks; returns False to pause the source until `drained()` returns."""

    async def drained(self) -> None: ...


class FoldSink:
    """Collects an answer for a client that requested no stream."""

    begun = waiting = False

    def __init__(self) -> None:
        self.fold = Fold()

    async def start(self, chunks: list[Chunk]) -> None:
        self.fold = Fold()
        self.take(chunks)

    def take(self, chunks: list[Chunk]) -> bool:
        for chunk in chunks:
            self.fold.add(chunk.seen)
        return True

    async def drained(self) -> None:
        """Nothing to wait for: `take` never pauses."""


class StreamSink:
    """Writes an answer as a stream. Headers follow with the first chunk, unless the client has waited for too long;
    until then a failure sets the status."""

    __slots__ = ("_encode", "_encoder", "_head", "response")

    def __init__(self, encoder: StreamEncoder, response: ResponseWriter, content_type: str) -> None:
        self._encoder = encoder
        self._encode = encoder.take
        self._head = [("content-type", content_type), ("cache-control", "no-cache")]
        self.response = response

    @property
    def begun(self) -> bool:
        return self.response.begun

    @property
    def waiting(self) -> bool:
        return self.response.waiting

    async def send(
        self, read: Callable[[StreamSink], Awaitable[None]], answer: ModelAnswer | None, *, cuts: bool
    ) -> web.StreamResponse:
        """Run `read`, which passes all chunks to this sink, and return the response once the client has it."""
        failed = False
        try:
            await read(self)
            last = self._encoder.end(answer.tail, answer.count) if answer is not None else self._encoder.end(b"")
            self.response.open(200, self._head)
        except (ProxyError, *UNENCODABLE) as exc:
            if not self.response.opened:
                raise
            failed = True
            reported = _reported(exc)
            self.response.record.error = reported.code
            last = self._encoder.error(reported)
            let_go(exc)
        except asyncio.CancelledError as exc:
            cancelled = self.response.record.cancellation(exc)
            if not self.response.opened:
                raise cancelled from None
            failed = True
            last = self._encoder.error(cancelled)
        if self.response.waiting:
            self.response.begin()
        if last:
            self.response.feed(last)
        return await self.response.finish(cut=failed and cuts)

    async def start(self, chunks: list[Chunk]) -> None:
        data, response = b"".join(map(self._encode, chunks)), self.response
        response.open(200, self._head)
        response.begun = response.begun or any(chunk.seen for chunk in chunks)  # and not only a comment of the server
        if any(has_content(chunk.choice) for chunk in chunks):
            response.begin()
            response.record.first_byte_s = response.record.first_byte_s or time.monotonic()
        if data and not response.feed(data):
            await response.drained()

    def take(self, chunks: list[Chunk]) -> bool:
        if len(chunks) == 1:  # nearly always
            return self.write(chunks[0])
        data = b"".join(map(self._encode, chunks))
        return self.response.feed(data) if data else True

    def write(self, chunk: Chunk) -> bool:
        """Take one chunk."""
        data = self._encode(chunk)
        return self.response.feed(data) if data else True

    async def drained(self) -> None:
        await self.response.drained()


def _reported(exc: BaseException) -> ProxyError:
    if isinstance(exc, ProxyError):
        logger.warning("stream aborted: %s", exc)
        return exc
    logger.warning("stream aborted: %s", exc, exc_info=exc)
    return ProxyError("internal error", code="agent_failed")
