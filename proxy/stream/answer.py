"""The path of chunks: a model's answer, through any number of agents, to a client of any API.

Without agents, chunks are pushed: decoded, encoded and written within the callback that received their bytes. Agents
pull chunks at their own pace. In both cases a client that requested no stream gets the chunks folded into one body.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from aiohttp import web

from llama_smart_proxy.backends.base import Model, UpstreamRequest
from llama_smart_proxy.backends.http.connection import ConnectionPool
from llama_smart_proxy.backends.http.exchange import UpstreamResponse
from llama_smart_proxy.proxy.chat import ChatRequest, Chunk, Fold, Json, RequestRecord
from llama_smart_proxy.proxy.dialects.base import ClientCodec, UpstreamCodec
from llama_smart_proxy.proxy.errors import ProxyError, UpstreamFailed
from llama_smart_proxy.proxy.http.response import ResponseWriter
from llama_smart_proxy.proxy.stream.decoder import Progressed, StreamDecoder
from llama_smart_proxy.proxy.stream.encoder import StreamEncoder
from llama_smart_proxy.proxy.stream.sinks import UNENCODABLE, ChunkSink, FoldSink, StreamSink
from llama_smart_proxy.proxy.stream.upstream import ANSWER_LIMIT, Amend, Attempts, refusal, succeeded, unreadable

Finalizer = Callable[[str, ConnectionPool], Awaitable[Json]]
"""Called when the answer is complete, returns extra fields for its last frame. Gets the text of the answer and the
server's connections: the slot is still held, so acquiring a second one could deadlock."""
Usage = Callable[[], Awaitable[Json | None]]
"""Called when an answer is complete, returns its token counts in OpenAI's shape; None if they are not known."""
COUNTS_S = 0.5
"""Time limit in seconds for what a server sends after the end of the text."""


@dataclass(slots=True)
class ModelAnswer:
    """One answer of a model's server, in chunks: requested when read, and read once, with `push` or `chunks`.

    `opened` is called when the server answers, `closed` when its slot is released. `limit` is the maximum number of
    bytes. `tail` and `count` are those of `StreamDecoder`, set once all was read. `usage` are the token counts that the
    server sent; `stopped_after` is set if the caller stopped reading before that: the number of chunks with content.
    `progressed` is that of `StreamDecoder`.

    Both methods raise: UpstreamRefused with the server's own message, UpstreamFailed, and as `Model.open`.
    """

    model: Model
    request: UpstreamRequest
    codec: UpstreamCodec
    chat: ChatRequest
    record: RequestRecord | None = None
    verbatim: bool = False
    finalizer: Finalizer | None = None
    amend: Amend | None = None
    progressed: Progressed | None = None
    opened: Callable[[], None] | None = None
    closed: Callable[[], None] | None = None
    limit: int | None = None
    tail: bytes = b""
    count: int = 0
    usage: Json | None = None
    stopped_after: int | None = None

    async def push(self, sink: ChunkSink) -> None:
        """Pass all chunks to `sink`."""
        if self.request.task is not None:
            self.request.task.whole = not self.chat.stream
        async for attempt in Attempts(self.model, self.request, lambda: sink.begun, amend=self.amend):
            async with attempt as upstream:
                decoder = await self._decoder(upstream)
                more = True
                started = False
                while more and (sink.waiting or not started) and decoder.failure is None:
                    more, chunks = await _next(upstream, decoder)
                    if chunks:
                        started = True
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
        chunk: Chunk | None = None
        empty = 0  # chunks without content in front
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
                            decoder.connection_failed(exc)
                        for chunk in decoder.feed(data) if data else decoder.finish():
                            if attempts.again:
                                attempts.again = False
                                empty = not (chunk.text or chunk.reasoning or chunk.tool_calls)
                            try:
                                yield chunk
                            except GeneratorExit:
                                await self._stopped(upstream, decoder, chunk, empty)
                                raise
                    await self._end(upstream, decoder)
        finally:
            if self.closed is not None:
                self.closed()

    async def _stopped(self, upstream: UpstreamResponse, decoder: StreamDecoder, last: Chunk, empty: int) -> None:
        """The caller does not read on after the chunk `last`. If the server has ended its answer with that, its counts
        follow at once, and are read."""
        if last.choice.get("finish_reason"):
            with suppress(TimeoutError, ProxyError):
                async with asyncio.timeout(COUNTS_S):
                    while not decoder.done and decoder.failure is None and (data := await upstream.piece()):
                        decoder.feed(data)
        self.usage = decoder.usage
        self.stopped_after = None if decoder.done else decoder.count - empty
        if self.record is not None:
            self.record.counted = decoder.usage

    async def _decoder(self, upstream: UpstreamResponse) -> StreamDecoder:
        if not succeeded(upstream.status):
            raise await refusal(upstream)
        if self.record is not None:
            self.record.sent_s = upstream.sent_s
        if self.opened is not None:
            self.opened()
        return StreamDecoder(
            self.codec,
            self.chat,
            verbatim=self.verbatim,
            keep_text=self.finalizer is not None,
            limit=self.limit,
            ended=upstream.stop,
            progressed=self.progressed,
        )

    async def _end(self, upstream: UpstreamResponse, decoder: StreamDecoder) -> None:
        record = self.record
        if record is not None:
            record.counted, record.last_byte_s = decoder.usage, time.monotonic()
        if decoder.failure is not None:
            raise decoder.failure
        if self.finalizer is not None and record is not None:
            record.extra = await self.finalizer("".join(decoder.texts or ()), upstream.pool)
        self.tail, self.count, self.usage = decoder.tail, decoder.count, decoder.usage


async def _next(upstream: UpstreamResponse, decoder: StreamDecoder) -> tuple[bool, list[Chunk]]:
    """Whether more may follow, and the chunks of the next piece."""
    try:
        data = await upstream.piece()
    except UpstreamFailed as exc:
        decoder.connection_failed(exc)
        data = b""
    return bool(data), decoder.feed(data) if data else decoder.finish()


class _Pusher:
    """Decodes bytes as they arrive, and passes the chunks to the sink."""

    __slots__ = ("_decode", "_decoder", "_sink", "_take")

    def __init__(self, decoder: StreamDecoder, sink: ChunkSink) -> None:
        self._decoder = decoder
        self._sink = sink
        self._decode = decoder.feed
        self._take = sink.take

    async def push(self, upstream: UpstreamResponse) -> None:
        """Pass on the rest of the answer; sets `decoder.failure` if it is invalid or incomplete."""
        try:
            await upstream.pipe(self)
        except ProxyError as exc:
            self._decoder.connection_failed(exc)
        self._deliver(self._decoder.finish())

    def feed(self, data: bytes) -> bool:
        return self._deliver(self._decode(data)) and self._decoder.failure is None

    async def drained(self) -> None:
        if self._decoder.failure is not None:
            raise self._decoder.failure
        await self._sink.drained()

    def _deliver(self, chunks: list[Chunk]) -> bool:
        try:
            return self._take(chunks)
        except ProxyError as exc:
            self._decoder.failure = exc
        except UNENCODABLE as exc:
            self._decoder.failure = unreadable(exc)
        return False


async def respond(
    response: ResponseWriter,
    codec: ClientCodec,
    chat: ChatRequest,
    answer: ModelAnswer | None,
    layered: AsyncIterator[Chunk] | None,
    usage: Usage | None = None,
) -> web.StreamResponse:
    """Send an answer to the client of `response` in its API: `layered`, the output of agents, if it is given, else
    `answer` itself. `answer` is None if no model is involved. `usage` returns the token counts for a `layered` without
    any.

    A failure before the headers is raised; a later one is reported in the stream.
    """
    writer = codec.writer(chat, response.record)
    if not chat.stream:
        if layered is not None:
            whole = await _folded(layered, usage)
        else:
            assert answer is not None
            folded = FoldSink()
            await answer.push(folded)
            whole = folded.fold.completion()
        return web.Response(body=writer.reply(whole), content_type="application/json")
    encoder = StreamEncoder(writer, codec.dialect, several=chat.body.get("n") not in (None, 1))
    written = StreamSink(encoder, response, writer.content_type)
    if layered is not None:
        return await written.send(partial(_pull, layered, usage), answer, cuts=codec.dialect.cuts)
    assert answer is not None
    return await written.send(answer.push, answer, cuts=codec.dialect.cuts)


async def respond_unstreamed(
    response: ResponseWriter, codec: ClientCodec, chat: ChatRequest, upstream: UpstreamResponse
) -> web.StreamResponse:
    """Send an answer that `upstream`, a server of the client's API, did not stream to the client as a stream."""
    server = codec.same_api
    assert server is not None
    decoder = StreamDecoder(server, chat)
    chunks = decoder.feed(await upstream.read(ANSWER_LIMIT) or b"") + decoder.finish()
    if decoder.failure is not None:
        raise decoder.failure

    async def made() -> AsyncIterator[Chunk]:
        for chunk in chunks:
            yield chunk

    return await respond(response, codec, chat, None, made())


async def _pull(chunks: AsyncIterator[Chunk], usage: Usage | None, sink: StreamSink) -> None:
    response = sink.response
    async for chunk in chunks:
        if usage is not None and chunk.usage is not None and _is_total(chunk):
            usage = None
        if response.waiting:
            await sink.start([chunk])
        elif not sink.write(chunk):
            await sink.drained()
    if usage is not None and (counts := await usage()) is not None:
        last = Chunk({"choices": [], "usage": counts})
        if response.waiting:
            await sink.start([last])
        elif not sink.write(last):
            await sink.drained()


async def _folded(chunks: AsyncIterator[Chunk], usage: Usage | None) -> Json:
    folded = Fold()
    async for chunk in chunks:
        if chunk.usage is not None and _is_total(chunk):
            usage = None
        folded.add(chunk.seen)
    if usage is not None and (counts := await usage()) is not None:
        folded.add({"usage": counts})
    return folded.completion()


def _is_total(chunk: Chunk) -> bool:
    """Whether counts in this chunk are those of the whole answer: some servers send counts from the beginning on."""
    return bool(chunk.finish_reason or not chunk.choice)
