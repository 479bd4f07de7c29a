"""The hot path: an upstream answer to the client, byte for byte.

A streamed answer is written to the client's transport inside the very callback that received it; no task wakes for a
token. When the client reads slower than the model writes, the upstream socket is left unread until the client caught
up, so memory for one slow reader stays near one socket buffer.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import socket
import struct
import termios
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextlib import suppress
from typing import Any

from aiohttp import HttpVersion10, HttpVersion11, web
from multidict import CIMultiDict

from llama_smart_proxy.backends.base import Management, Model, UpstreamRequest
from llama_smart_proxy.backends.http.exchange import BUFFER_LIMIT, UpstreamResponse
from llama_smart_proxy.proxy.dialects import Dialect
from llama_smart_proxy.proxy.dialects.framing import EventSplitter, FrameTooLong, LineSplitter, Splitter
from llama_smart_proxy.proxy.errors import ProxyError, UpstreamFailed
from llama_smart_proxy.proxy.http.headers import ANSWERED, downstream_headers, own_headers, shown_path

logger = logging.getLogger(__name__)

PLAIN_LIMIT = 1024 * 1024
"""Answers up to this size are read whole before the first byte leaves, so that one cut short is still a true 502."""


async def ask(
    http: web.Request,
    backend: Model | Management,
    call: UpstreamRequest,
    answer: Callable[[UpstreamResponse], Awaitable[web.StreamResponse]],
) -> web.StreamResponse:
    """Open `call` and have `answer` pass on what comes. While the client has no byte yet, a server that broke off gets
    one more chance: by then its instance is gone, and the second try meets a fresh one."""
    try:
        async with backend.open(call) as upstream:
            return await answer(upstream)
    except UpstreamFailed as exc:
        if not may_try_again(exc) or http.writer.output_size > 0:
            raise
        logger.warning("%s before the first byte: %s; trying once more", shown_path(http), exc)
    async with backend.open(call) as upstream:
        return await answer(upstream)


SAID = frozenset({"upstream_error", "upstream_frame_too_long", "pull_failed"})
"""Codes of failures that a server told, or that its answer is. Asked again it would say the same."""


def may_try_again(exc: UpstreamFailed) -> bool:
    """Whether the server broke off, or could not be reached, so that a second try may well succeed."""
    return exc.status == 502 and exc.code not in SAID


async def relay(
    http: web.Request, upstream: UpstreamResponse, dialect: Dialect, *, stall_s: float
) -> web.StreamResponse:
    """Answer `http` with `upstream`.

    A failure before the client got a byte is raised (`UpstreamFailed`), so the caller may try again; a later one is
    told in-stream in `dialect`, or, where the body has no form for that, by cutting the connection. A client that takes
    no byte for `stall_s` seconds is disconnected.
    """
    bodiless = upstream.status in (204, 304) or http.method == "HEAD"
    splitter = None if bodiless else _STREAMS.get(upstream.header("content-type").partition(";")[0].strip())
    if splitter is not None:
        await upstream.first_piece()  # headers leave with the first byte: until then a failure is a true status code
        return await _relay_frames(http, upstream, dialect, splitter(), stall_s)
    body = await upstream.read(PLAIN_LIMIT)
    if body is None:
        return await _relay_large(http, upstream, stall_s)
    return WholeAnswer(http, upstream, body, stall_s)


_STREAMS: dict[str, Callable[[], Splitter]] = {
    "text/event-stream": EventSplitter,
    "application/x-ndjson": LineSplitter,
}


class WholeAnswer(web.StreamResponse):
    """An upstream answer that is there as a whole. It leaves in one write, which takes a quarter of the CPU time of
    aiohttp's own response class."""

    def __init__(self, http: web.Request, upstream: UpstreamResponse, body: bytes, stall_s: float) -> None:
        super().__init__(status=upstream.status)
        self._http = http
        self._upstream = upstream
        self._bytes = body
        self._stall_s = stall_s

    @property
    def keep_alive(self) -> bool:
        return self._http.keep_alive

    async def prepare(self, request: web.BaseRequest) -> None:
        """Nothing: the head leaves together with the body."""

    async def write_eof(self, data: bytes = b"") -> None:
        transport = self._http.transport
        if transport is None:
            raise ConnectionResetError("the client has left")
        data = self._head() + self._bytes
        if self.keep_alive and len(data) + transport.get_write_buffer_size() <= BUFFER_LIMIT:
            # at the end of this turn of the loop: answers that came together leave together
            asyncio.get_running_loop().call_soon(_write, transport, data)
            return
        transport.write(data)
        await patiently(self._http, self._http.writer.drain(), self._stall_s)

    def _head(self) -> bytes:
        headers = downstream_headers(self._upstream.headers)
        headers += own_headers(self._http)
        if self._http.method == "HEAD":
            headers.append(("content-length", self._upstream.header("content-length", "0")))
        elif self.status not in (204, 304):
            headers.append(("content-length", str(len(self._bytes))))
        if not self.keep_alive:
            headers.append(("connection", "close"))
        elif self._http.version == HttpVersion10:
            headers.append(("connection", "keep-alive"))
        lines = "".join([f"{name}: {value}\r\n" for name, value in headers])
        return f"HTTP/1.1 {self.status} {self.reason}\r\n{lines}\r\n".encode()


def _write(transport: asyncio.Transport, data: bytes) -> None:
    if not transport.is_closing():
        transport.write(data)


async def _relay_frames(
    http: web.Request, upstream: UpstreamResponse, dialect: Dialect, splitter: Splitter, stall_s: float
) -> web.StreamResponse:
    answer = await begin_stream(http, upstream.status, downstream_headers(upstream.headers))
    sink = _FrameSink(http, stall_s, splitter, chunked=answer.chunked)
    failure: ProxyError | None = None
    try:
        await upstream.pipe(sink)
    except UpstreamFailed as exc:
        failure = exc
    answer.cut = sink.end(dialect, failure) and dialect.cuts
    return await finish(http, answer, stall_s)


async def _relay_large(http: web.Request, upstream: UpstreamResponse, stall_s: float) -> web.StreamResponse:
    length = upstream.header("content-length")
    answer = await begin_stream(http, upstream.status, downstream_headers(upstream.headers), length=length)
    try:
        await upstream.pipe(Sink(http, stall_s, chunked=answer.chunked))
    except UpstreamFailed as exc:
        logger.warning("a large answer was cut short: %s", exc)
        _reset(http)
    return await finish(http, answer, stall_s)


class Stream(web.StreamResponse):
    """An answer under way. One that is `cut` ends by closing the connection where the last chunk should be."""

    def __init__(self, http: web.Request, status: int, headers: Iterable[tuple[str, str]]) -> None:
        super().__init__(status=status, headers=CIMultiDict(headers))
        self.cut = False
        self._http = http

    async def write_eof(self, data: bytes = b"") -> None:
        transport = self._http.transport
        if self.cut and transport is not None:
            transport.close()  # what was written still leaves
        else:
            await super().write_eof(data)


async def begin_stream(
    http: web.Request, status: int, headers: Iterable[tuple[str, str]], *, length: str = ""
) -> Stream:
    """Send the head of an answer to `http`, whose body follows piece by piece."""
    answer = Stream(http, status, headers)
    answer.headers.extend(own_headers(http))
    answer.headers["X-Accel-Buffering"] = "no"  # nginx in front of us must not hold tokens back
    if length:
        answer.content_length = int(length)
    elif http.version >= HttpVersion11:
        answer.enable_chunked_encoding()
    else:
        answer.force_close()  # HTTP/1.0 marks the end of such a body by closing
    await answer.prepare(http)
    return answer


async def finish(http: web.Request, answer: Stream, stall_s: float) -> Stream:
    """Send what is left of an answer whose body is complete. A client that leaves now has missed nothing."""
    http[ANSWERED] = answer.status
    await patiently(http, answer.write_eof(), stall_s)
    return answer


class Sink:
    """Writes pieces to the client's transport; `chunked`: framed as HTTP/1.1 chunks."""

    __slots__ = ("_chunked", "_http", "_stall_s", "_transport", "_unsent", "_write")

    def __init__(self, http: web.Request, stall_s: float, *, chunked: bool) -> None:
        transport = http.transport
        if transport is None:
            raise ConnectionResetError("the client has left")
        self._http = http
        self._transport = transport
        self._chunked = chunked
        self._stall_s = stall_s
        self._write = transport.write
        self._unsent = transport.get_write_buffer_size

    def feed(self, data: bytes) -> bool:
        try:
            self._write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)
        except RuntimeError:  # uvloop's word for a transport that is closed
            raise ConnectionResetError("the client has left") from None
        return self._unsent() <= BUFFER_LIMIT

    async def drained(self) -> None:
        """Wait until the client has caught up; cut it off when it takes nothing for `stall_s` seconds."""
        await patiently(self._http, self._http.writer.drain(), self._stall_s)


class _FrameSink(Sink):
    """Passes on whole frames only, so that an error can be told in-stream at any moment."""

    __slots__ = ("_failure", "_last", "_splitter")

    def __init__(self, http: web.Request, stall_s: float, splitter: Splitter, *, chunked: bool) -> None:
        super().__init__(http, stall_s, chunked=chunked)
        self._splitter = splitter
        self._last = b""
        self._failure: UpstreamFailed | None = None

    def feed(self, data: bytes) -> bool:
        try:
            whole = self._splitter.push(data)
        except FrameTooLong:
            self._failure = frame_too_long()
            return False
        if whole:
            if self._splitter.says_something(whole):
                self._last = whole
            self._write(b"%x\r\n%b\r\n" % (len(whole), whole) if self._chunked else whole)
        return self._unsent() <= BUFFER_LIMIT

    async def drained(self) -> None:
        if self._failure is not None:
            raise self._failure
        await super().drained()

    def end(self, dialect: Dialect, failure: ProxyError | None) -> bool:
        """Write what the client still has to be told after the last frame: nothing, after a proper ending. Whether the
        answer failed."""
        if failure is None and dialect.is_end(self._splitter.rest):
            self._last = self._splitter.rest  # a clean end, the last line end spared
            super().feed(self._last)
        if dialect.is_end(self._last):
            return False
        closing = dialect.ending
        if not dialect.is_error(self._last):
            failure = failure or incomplete()
            logger.warning("stream broken off: %s", failure)
            closing = dialect.error_event(failure) + closing
        if closing:
            super().feed(closing)
        return True


def frame_too_long() -> UpstreamFailed:
    """The error for a frame that does not end."""
    return UpstreamFailed("the model server sent an event over 8 MiB", code="upstream_frame_too_long")


def incomplete() -> UpstreamFailed:
    """The error for a stream that ends properly, but too early."""
    return UpstreamFailed("the model server ended its answer before it was complete", code="upstream_incomplete")


async def patiently(http: web.Request, flushing: Coroutine[Any, Any, None], stall_s: float) -> None:
    """Await `flushing`, which waits for the client of `http` to read, for as long as it does read.

    Raises: ConnectionResetError, having disconnected a client that took no byte for `stall_s` seconds.
    """
    transport = http.transport
    flushed = asyncio.ensure_future(flushing)
    try:
        left = _untaken(transport)
        while not (await asyncio.wait({flushed}, timeout=stall_s))[0]:
            left, before = _untaken(transport), left
            if left >= before:
                logger.info("a client took no byte for %g s: disconnected", stall_s)
                if transport is not None:
                    transport.abort()
                raise ConnectionResetError("the client stopped reading")
        flushed.result()
    finally:
        flushed.cancel()


def _untaken(transport: asyncio.Transport | None) -> int:
    """Bytes the client has not acknowledged: ours, and the kernel's. Ours alone stand still for minutes while a slow
    reader works through a socket buffer of megabytes."""
    if transport is None:
        return 0
    waiting = transport.get_write_buffer_size()
    sock = transport.get_extra_info("socket")
    with suppress(OSError, ValueError, AttributeError):
        (queued,) = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0" * 4))
        waiting += queued
    return waiting


def _reset(http: web.Request) -> None:
    """Cut the connection so that no client takes it for the end of the answer, as HTTP/1.0 takes a mere close."""
    transport = http.transport
    if transport is not None:
        sock = transport.get_extra_info("socket")
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()
