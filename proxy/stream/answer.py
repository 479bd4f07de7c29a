"""The path of chunks: a model's answer, through no agent or several, to a client of any API.

Without agents in between chunks are pushed: decoded, encoded and written within the callback that received their bytes.
Agents pull, each at its own pace. Either way a client that asked for no stream gets the same chunks folded into one
body.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from aiohttp import web

from llama_smart_proxy.backends.base import Model, UpstreamRequest
from llama_smart_proxy.backends.http.connection import ConnectionPool
from llama_smart_proxy.backends.http.exchange import UpstreamResponse
from llama_smart_proxy.proxy.chat import ChatRequest, Chunk, Fold, Json, RequestRecord, fold
from llama_smart_proxy.proxy.dialects.base import ClientCodec, UpstreamCodec
from llama_smart_proxy.proxy.errors import ProxyError, UpstreamFailed
from llama_smart_proxy.proxy.http.headers import RECORD
from llama_smart_proxy.proxy.http.response import ResponseWriter
from llama_smart_proxy.proxy.stream.encoder import StreamEncoder
from llama_smart_proxy.proxy.stream.upstream import Amend, Attempts, StreamDecoder, refusal, unreadable

logger = logging.getLogger(__name__)

Epilogue = Callable[[str, ConnectionPool], Awaitable[Json]]
"""Called when the answer is complete, for what its last frame has besides. Gets the text of the answer and the server's
connections: the server is still held, so a second lease might wait for the end of the first one for ever."""
UNENCODABLE = (AttributeError, KeyError, TypeError, ValueError)
"""What is raised where something is encoded that is not of an API's shape."""


class ChunkSink(Protocol):
    """Takes chunks as they arrive."""

    @property
    def begun(self) -> bool:
        """Whether the client has got anything, so that the answer cannot be requested again."""

    async def start(self, chunks: list[Chunk]) -> None:
        """Take the first ones; after a failure, those of another try."""

    def take(self, chunks: list[Chunk]) -> bool:
        """Take more now; False asks for a pause, until `drained()` returns."""

    async def drained(self) -> None: ...


@dataclass(slots=True)
class ModelAnswer:
    """One answer of a model's server, in chunks: requested when it is read, and read once, by `push` or by `chunks`.

    `opened` is called when the server answers, `closed` when it is not held any more. `limit` is the most bytes that
    are read. `tail` and `count` are those of `StreamDecoder`, once all was read.

    Raises, from both: UpstreamRefused with the server's own message, UpstreamFailed, and what opening the model raises.
    """

    model: Model
    request: UpstreamRequest
    codec: UpstreamCodec
    chat: ChatRequest
    record: RequestRecord | None = None
    verbatim: bool = False
    epilogue: Epilogue | None = None
    amend: Amend | None = None
    opened: Callable[[], None] | None = None
    closed: Callable[[], None] | None = None
    limit: int | None = None
    tail: bytes = b""
    count: int = 0

    async def push(self, sink: ChunkSink) -> None:
        """Hand all chunks to `sink`."""
        async for attempt in Attempts(self.model, self.request, lambda: sink.begun, amend=self.amend):
            async with attempt as upstream:
                decoder = await self._decoder(upstream)
                chunks: list[Chunk] = []
                more = True
                while more and not chunks and decoder.failure is None:
                    more, chunks = await _next(upstream, decoder)
                if chunks:
                    try:
                        await sink.start(chunks)
                    except UNENCODABLE as exc:
                        decoder.failure = unreadable(exc)
                if more and decoder.failure is None:
                    await _Pusher(decoder, sink).push(upstream)
                await self._end(upstream, decoder)

    async def chunks(self) -> AsyncGenerator[Chunk, None]:
        """All chunks, at the pace of the caller."""
        attempts = Attempts(self.model, self.request, amend=self.amend)
        try:
            async for attempt in attempts:
                async with attempt as upstream:
                    decoder = await self._decoder(upstream)
                    data = b"..."
                    while data and decoder.failure is None:  # not by `_next`: this runs for every token
                        try:
                            data = await upstream.piece()
                        except UpstreamFailed as exc:
                            data = b""
                            decoder.broke_off(exc)
                        for chunk in decoder.feed(data) if data else decoder.finish():
                            attempts.again = False
                            yield chunk
                    await self._end(upstream, decoder)
        finally:
            if self.closed is not None:
                self.closed()

    async def _decoder(self, upstream: UpstreamResponse) -> StreamDecoder:
        if upstream.status != 200:
            raise await refusal(upstream)
        if self.record is not None:
            self.record.sent_s = upstream.sent_s
        if self.opened is not None:
            self.opened()
        return StreamDecoder(
            self.codec, self.chat, verbatim=self.verbatim, keeps_text=self.epilogue is not None, limit=self.limit
        )

    async def _end(self, upstream: UpstreamResponse, decoder: StreamDecoder) -> None:
        record = self.record
        if record is not None:
            record.counted, record.last_byte_s = decoder.usage, time.monotonic()
        if decoder.failure is not None:
            raise decoder.failure
        if self.epilogue is not None and record is not None:
            record.extra = await self.epilogue("".join(decoder.texts or ()), upstream.pool)
        self.tail, self.count = decoder.tail, decoder.count


async def _next(upstream: UpstreamResponse, decoder: StreamDecoder) -> tuple[bool, list[Chunk]]:
    """Whether there may be more, and the chunks of the next piece."""
    try:
        data = await upstream.piece()
    except UpstreamFailed as exc:
        decoder.broke_off(exc)
        data = b""
    return bool(data), decoder.feed(data) if data else decoder.finish()


class _Pusher:
    """Takes bytes as they arrive, and hands on the chunks that they are."""

    __slots__ = ("_decode", "_decoder", "_sink", "_take")

    def __init__(self, decoder: StreamDecoder, sink: ChunkSink) -> None:
        self._decoder = decoder
        self._sink = sink
        self._decode = decoder.feed
        self._take = sink.take

    async def push(self, upstream: UpstreamResponse) -> None:
        """All that is left; `decoder.failure` is set if something is wrong with it."""
        try:
            await upstream.pipe(self)
        except ProxyError as exc:
            self._decoder.broke_off(exc)
        self._hand_on(self._decoder.finish())

    def feed(self, data: bytes) -> bool:
        return self._hand_on(self._decode(data)) and self._decoder.failure is None

    async def drained(self) -> None:
        if self._decoder.failure is not None:
            raise self._decoder.failure
        await self._sink.drained()

    def _hand_on(self, chunks: list[Chunk]) -> bool:
        try:
            return self._take(chunks)
        except ProxyError as exc:
            self._decoder.failure = exc
        except UNENCODABLE as exc:
            self._decoder.failure = unreadable(exc)
        return False


async def respond(
    http: web.BaseRequest,
    codec: ClientCodec,
    chat: ChatRequest,
    answer: ModelAnswer | None,
    layered: AsyncIterator[Chunk] | None,
    *,
    stall_s: float,
) -> web.StreamResponse:
    """Send an answer to the client of `http`, in its API: the one of `answer`, or what agents made of it, `layered`, or
    one that no model gave (then `answer` is None).

    A failure before the client has a byte is raised; a later one is reported in the stream.
    """
    writer = codec.writer(chat, http[RECORD])
    if not chat.stream:
        if layered is not None:
            whole = (await fold(layered)).data
        else:
            assert answer is not None
            folded = _Folded()
            await answer.push(folded)
            whole = folded.fold.completion()
        return web.Response(body=writer.reply(whole), content_type="application/json")
    encoder = StreamEncoder(writer, codec.dialect, several=chat.body.get("n") not in (None, 1))
    written = _Written(encoder, ResponseWriter(http, stall_s), writer.content_type)
    if layered is not None:
        return await written.all_of(partial(_pull, layered), answer, cuts=codec.dialect.cuts)
    assert answer is not None
    return await written.all_of(answer.push, answer, cuts=codec.dialect.cuts)


async def _pull(chunks: AsyncIterator[Chunk], sink: _Written) -> None:
    async for chunk in chunks:
        if not sink.begun:
            await sink.start([chunk])
        elif not sink.write(chunk):
            await sink.drained()


class _Folded:
    """Collects an answer for a client that asked for no stream."""

    begun = False

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
        """Nothing leaves, so there is nothing to wait for."""


class _Written:
    """Writes an answer as a stream. Headers leave with the first chunk: until then a failure is a true status code."""

    __slots__ = ("_encode", "_encoder", "_head", "response")

    def __init__(self, encoder: StreamEncoder, response: ResponseWriter, content_type: str) -> None:
        self._encoder = encoder
        self._encode = encoder.take
        self._head = [("content-type", content_type), ("cache-control", "no-cache")]
        self.response = response

    @property
    def begun(self) -> bool:
        return self.response.begun

    async def all_of(
        self, read: Callable[[_Written], Awaitable[None]], answer: ModelAnswer | None, *, cuts: bool
    ) -> web.StreamResponse:
        """The response, once `read` has handed over everything and the client has it."""
        failed = False
        try:
            await read(self)
            last = self._encoder.end(answer.tail, answer.count) if answer is not None else self._encoder.end(b"")
            if not self.begun:
                await self.response.begin(200, self._head)
        except (ProxyError, *UNENCODABLE) as exc:
            if not self.begun:
                raise
            failed = True
            last = self._encoder.error(_reported(exc))
        if last:
            self.response.feed(last)
        return await self.response.finish(cut=failed and cuts)

    async def start(self, chunks: list[Chunk]) -> None:
        data = b"".join(map(self._encode, chunks))
        await self.response.begin(200, self._head)
        self.response.record.first_byte_s = time.monotonic()
        if data and not self.response.feed(data):
            await self.response.drained()

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
        logger.warning("stream broken off: %s", exc)
        return exc
    logger.warning("stream broken off: %s", exc, exc_info=exc)
    return ProxyError("internal error", code="agent_failed")
