"""Answers in one dialect from a server that speaks another.

The server is always asked for a stream. Each piece of it is read, translated and written to the client within the
callback that received it, as on the relay; a client that wants no stream gets the same chunks folded into one body.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import orjson
from aiohttp import web

from llama_smart_proxy.backends.base import Model, UpstreamRequest
from llama_smart_proxy.backends.http.connection import ConnectionPool
from llama_smart_proxy.backends.http.exchange import UpstreamResponse
from llama_smart_proxy.proxy.chat import ChatRequest, Fold, Json, Timing
from llama_smart_proxy.proxy.dialects.base import Face, Reader, Wire, Writer
from llama_smart_proxy.proxy.dialects.framing import FrameTooLong, Splitter
from llama_smart_proxy.proxy.dialects.openai import error_details, error_text
from llama_smart_proxy.proxy.errors import ProxyError, UpstreamFailed, UpstreamRefused
from llama_smart_proxy.proxy.http.body import serialise, to_bytes
from llama_smart_proxy.proxy.stream.relay import (
    Sink,
    ask,
    begin_stream,
    finish,
    frame_too_long,
    incomplete,
    may_try_again,
)

logger = logging.getLogger(__name__)

ERROR_LIMIT = 1024 * 1024
"""Largest error body of a server that is read for its words."""
WORDS = 2000
"""Most characters of a server's error that a client gets to see; some send whole web pages."""
ANSWER_LIMIT = 64 * 1024 * 1024
"""Largest answer that is taken whole; thousands of embeddings are large."""
OFF_LOOP_BYTES = 1024 * 1024
"""Larger ones are parsed in a thread, so that other streams go on."""
JSON_HEADERS = [("Content-Type", "application/json")]

Epilogue = Callable[[str, ConnectionPool], Awaitable[Json]]
"""Asked, when the answer is complete, for what its last frame tells besides. Gets the text of the answer and the
server's connections: the server is still held, so a second lease might wait for the first one's end for ever."""


class Translation:
    """One answer on its way: bytes of the server in, chunks out to `take`, which returns what to send now."""

    def __init__(self, splitter: Splitter, reader: Reader, take: Callable[[Json], bytes]) -> None:
        self._splitter = splitter
        self._reader = reader
        self._take = take
        self.failure: ProxyError | None = None

    @property
    def complete(self) -> bool:
        """Whether the answer has come to its end, so that it does not matter how its connection ends."""
        return self._reader.done and self.failure is None

    def feed(self, data: bytes) -> bytes:
        """The client's bytes for these bytes of the server. After a failure, which `failure` tells, nothing."""
        if self.failure is not None:
            return b""
        try:
            return self._frames(self._splitter.push(data))
        except FrameTooLong:
            self.failure = frame_too_long()
        return b""

    def finish(self) -> bytes:
        """The same for a last frame whose line end was spared; `failure` is set if the answer is incomplete."""
        last = self._frames(self._splitter.rest) if self.failure is None else b""
        if self.failure is None and not self._reader.done:
            self.failure = incomplete()
        return last

    def _frames(self, whole: bytes) -> bytes:
        written = []
        try:
            for frame in self._splitter.frames(whole):
                chunk = self._reader.read(frame)
                if chunk is not None:
                    written.append(self._take(chunk))
        except UpstreamFailed as exc:
            self.failure = exc
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as exc:
            logger.warning("an answer cannot be understood: %s: %s", type(exc).__name__, exc)
            self.failure = UpstreamFailed("the model server's answer cannot be understood", code="upstream_error")
        return b"".join(written)


@dataclass(slots=True)
class Exchange:
    """One request in the dialect of `face`, answered by a server that is spoken to over `wire`."""

    http: web.Request
    face: Face
    wire: Wire
    request: ChatRequest
    timing: Timing
    stall_s: float
    epilogue: Epilogue | None = None

    async def run(self, backend: Model, headers: Sequence[tuple[str, str]]) -> web.StreamResponse:
        """Ask `backend` and answer the client.

        Errors are as on the relay: raised while the client has no byte, told in-stream in the client's dialect later.
        """
        path, body = self.wire.encode(self.request)
        prepared = backend.prepare(body)
        call = UpstreamRequest("POST", path, await to_bytes(self.http, body), headers, prepared=prepared)
        return await ask(self.http, backend, call, self._answer)

    async def _answer(self, upstream: UpstreamResponse) -> web.StreamResponse:
        self.timing.sent_s = upstream.sent_s
        if upstream.status != 200:
            raise await refusal(upstream)
        writer = self.face.writer(self.request, self.timing)
        if not self.request.stream:
            return await self._whole(upstream, writer)
        await upstream.first_piece()  # headers leave with the first byte: until then a failure is a true status code
        if upstream.empty:
            raise incomplete()
        return await self._stream(upstream, writer)

    async def _stream(self, upstream: UpstreamResponse, writer: Writer) -> web.StreamResponse:
        head = [("content-type", writer.content_type), ("cache-control", "no-cache")]
        stream = await begin_stream(self.http, 200, head)
        said: list[str] = []

        def take(chunk: Json) -> bytes:
            said.append(_text_of_first(chunk))
            return writer.chunk(chunk)

        translation = self._translation(writer.chunk if self.epilogue is None else take)
        sink = _Sink(self.http, self.stall_s, translation, chunked=stream.chunked)
        failure = await sink.take(upstream)
        if failure is None and self.epilogue is not None:
            self.timing.extra = await self.epilogue("".join(said), upstream.pool)
        try:
            last = writer.end() if failure is None else b""
        except UpstreamFailed as exc:
            failure = exc
        if failure is not None:
            logger.warning("stream broken off: %s", failure)
            stream.cut = self.face.dialect.cuts
            last = writer.error(failure)
        sink.say(last)
        return await finish(self.http, stream, self.stall_s)

    async def _whole(self, upstream: UpstreamResponse, writer: Writer) -> web.StreamResponse:
        fold = Fold()
        translation = self._translation(fold.add)
        try:
            await upstream.pipe(_Gather(translation))
        except UpstreamFailed:
            if not translation.complete:
                raise
        translation.finish()
        if translation.failure is not None:
            raise translation.failure
        completion = fold.completion()
        if self.epilogue is not None:
            said = completion["choices"][0]["message"].get("content") or ""
            self.timing.extra = await self.epilogue(said, upstream.pool)
        return web.Response(body=writer.reply(completion), content_type="application/json")

    def _translation(self, take: Callable[[Json], bytes]) -> Translation:
        return Translation(self.wire.splitter(), self.wire.reader(self.request), take)


async def question(backend: Model, path: str, body: Json, *, slot: bool = False) -> Json:
    """The JSON object that a small request brings. It is asked once more of a server that breaks off.

    Raises: UpstreamRefused with the server's words, UpstreamFailed.
    """
    prepared = backend.prepare(body)
    call = UpstreamRequest("POST", path, serialise(body), JSON_HEADERS, slot, prepared=prepared)
    try:
        return await _question(backend, call)
    except UpstreamFailed as exc:
        if not may_try_again(exc):
            raise
    return await _question(backend, call)


async def _question(backend: Model, call: UpstreamRequest) -> Json:
    async with backend.open(call) as upstream:
        if upstream.status != 200:
            raise await refusal(upstream)
        answer = await upstream.read(ANSWER_LIMIT)
    if answer is not None and len(answer) > OFF_LOOP_BYTES:
        return await asyncio.get_running_loop().run_in_executor(None, understood, answer)
    return understood(answer)


def understood(body: bytes | None) -> Json:
    """The JSON object that a server answered. Raises: UpstreamFailed if it is none."""
    with suppress(orjson.JSONDecodeError):
        answer = orjson.loads(body or b"")
        if isinstance(answer, dict):
            return answer
    raise UpstreamFailed("the model server's answer cannot be understood", code="upstream_error")


async def refusal(upstream: UpstreamResponse) -> ProxyError:
    """The error for an answer that is none, in the server's own words."""
    body = await upstream.read(ERROR_LIMIT) or b""
    words, details = body.decode(errors="replace").strip(), Json()
    with suppress(orjson.JSONDecodeError):
        said = orjson.loads(body)
        words, details = error_text(said), error_details(said)
    words = words[:WORDS] or f"the model server answered with status {upstream.status}"
    return UpstreamRefused(words, status=upstream.status if upstream.status >= 400 else 502, details=details)


def _text_of_first(chunk: Json) -> str:
    """What the chunk adds to the first answer's text."""
    for choice in chunk.get("choices") or ():
        if choice.get("index", 0) == 0:
            return choice.get("delta", {}).get("content") or ""
    return ""


class _Gather:
    """A sink for an answer that is folded: nothing leaves, so nobody is waited for."""

    def __init__(self, translation: Translation) -> None:
        self._translation = translation
        self._size = 0

    def feed(self, data: bytes) -> bool:
        self._size += len(data)
        if self._size > ANSWER_LIMIT:
            limit = f"{ANSWER_LIMIT // 2**20} MiB"
            self._translation.failure = UpstreamFailed(f"the answer is over {limit}", code="upstream_error")
        self._translation.feed(data)
        return self._translation.failure is None

    async def drained(self) -> None:
        assert self._translation.failure is not None
        raise self._translation.failure


class _Sink(Sink):
    """Writes the translation of what arrives."""

    __slots__ = ("_translation",)

    def __init__(self, http: web.Request, stall_s: float, translation: Translation, *, chunked: bool) -> None:
        super().__init__(http, stall_s, chunked=chunked)
        self._translation = translation

    def feed(self, data: bytes) -> bool:
        room = self.say(self._translation.feed(data))
        return room and self._translation.failure is None

    def say(self, data: bytes) -> bool:
        """Write to the client what is no translation."""
        return super().feed(data) if data else True

    async def drained(self) -> None:
        if self._translation.failure is not None:
            raise self._translation.failure
        await super().drained()

    async def take(self, upstream: UpstreamResponse) -> ProxyError | None:
        """Pass on the whole answer; what went wrong, if anything did."""
        try:
            await upstream.pipe(self)
        except ProxyError as exc:
            if not self._translation.complete:
                return exc
        self.say(self._translation.finish())
        return self._translation.failure
