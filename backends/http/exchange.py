"""One answer of a model server, from its first byte to its last.

`aiohttp.ClientSession` is not used because its body reader wakes a task for every piece, and that task switch is most
of the cost of a relayed token. Here a piece passes from the socket through the C parser into a `Sink` within one
callback; a task runs only when a request begins, ends, or waits for a slow reader.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import httptools

from llama_smart_proxy.backends.http.inflate import Inflater
from llama_smart_proxy.backends.http.sink import Sink
from llama_smart_proxy.backends.http.turns import breathe
from llama_smart_proxy.backends.http.wire import PART, Connection
from llama_smart_proxy.proxy.errors import UpstreamFailed

if TYPE_CHECKING:
    from llama_smart_proxy.backends.http.connection import ConnectionPool

HEAD_LIMIT = 64 * 1024
"""Most bytes accepted between two pieces of a body: headers and informational answers, sizes of chunks, trailers."""
HEAD_S = 60.0
"""Seconds that a head may take from its first byte on."""
MAX_INFORMATIONAL = 8
"""Informational answers (1xx) before the head; of more, each counts as a part of the head."""
MAX_BLANKS = 4 * 1024
"""Blank bytes that may come before an answer shows what it is."""
COMMENT = b":"
"""First byte of comments in a stream, which llama-server also sends while it generates nothing (its pings)."""
BUFFER_LIMIT = 64 * 1024
"""Body bytes buffered for a reader that is not ready before reading from the socket is paused."""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds to wait for a connection, for the first byte of a body, and between two pieces of one. Headers and
    framing end no wait."""

    connect_s: float = 5.0
    first_byte_s: float = 600.0
    idle_s: float = 120.0


class UpstreamResponse:
    """An answer in progress. Its reader calls exactly one of `read`, `pipe` and (repeatedly) `piece`, optionally after
    `first_piece`.

    `status` and `headers` (in order, names in lower case) are set when the connection pool returns it; `sent_s` is when
    the request was sent (`time.monotonic()`), and `pool` has connections to the same server. All reading methods raise
    `UpstreamFailed` when the server disconnects, truncates the answer, or exceeds a timeout.
    """

    def __init__(self, pool: ConnectionPool, connection: Connection, method: str, timeouts: Timeouts) -> None:
        self.pool = pool
        self.status = 0
        self.headers: list[tuple[str, str]] = []
        self._body_started = False
        self.complete = False
        self.reusable = False
        self._connection = connection
        self._bodiless = method == "HEAD"
        self._timeouts = timeouts
        self._parser = httptools.HttpResponseParser(self)
        self._loop = asyncio.get_running_loop()
        self._unframed = 0  # bytes since the last one of a body
        self._head_done = False
        self._head_since = 0.0
        self._informational = 0
        self._framed = False  # the body has a length or is chunked
        self._error: UpstreamFailed | None = None
        self._pieces: list[bytes] = []
        self._buffered = 0
        self._sink: Sink | None = None
        self.generates = True  # the answer: its parts show that the server works
        self._sink_full = False
        self._paused = False
        self.sent_s = time.monotonic()  # more precise than the loop's clock of milliseconds
        self._received_at = self._loop.time()
        self._waiter: asyncio.Future[None] | None = None
        self._inflater: Inflater | None = None
        self.stopped = False
        """Whether the reader needs no more of the body."""
        self.when_over: Callable[[], None] | None = None
        """Called once when the answer is complete or has failed, if it was stopped before."""

    # -- called by the reader --------------------------------------------------------------------------------------

    def header(self, name: str, default: str = "") -> str:
        """The first header called `name` (given in lower case)."""
        for key, value in self.headers:
            if key == name:
                return value
        return default

    async def head(self) -> None:
        """Return when status and headers are received."""
        while not self._head_done and not self._is_done():
            await self._event()

    async def first_piece(self, *, blanks: bool = True) -> None:
        """Return when a body byte is available, without `blanks` another one than those, or the body has ended without
        one; or when there are `MAX_BLANKS` bytes."""
        while not self._pieces or not (blanks or self._buffered >= MAX_BLANKS or self.peek().strip()):
            if self._is_done():  # only now: what arrived before a failure counts
                return
            await self._event()

    def peek(self) -> bytes:
        """The body bytes that have arrived and were not read yet; they stay unread."""
        return b"".join(self._pieces)

    def skip(self, start: bytes) -> None:
        """Drop `start` if the unread bytes begin with it."""
        if self._pieces and (data := self.peek()).startswith(start):
            self._pieces[:] = [data[len(start) :]]

    async def read(self, limit: int) -> bytes | None:
        """The whole body; None if it exceeds `limit` bytes (then `pipe` can be called for all of it)."""
        while not self._is_done():
            if self._buffered > limit:
                return None
            await self._event()
        body = b"".join(self._pieces)
        self._pieces.clear()
        return body

    async def piece(self) -> bytes:
        """Wait for body bytes and return all since the last call, or the first of them if there are many; empty at the
        end. The reader sets the pace: reading from the socket is paused while the buffer is full."""
        pieces = self._pieces
        while not pieces and not self._is_done():
            await self._event()
        if self._buffered > PART and len(pieces) > 1:
            await breathe()
            return self._pop()
        self._buffered = 0
        if len(pieces) == 1:
            return pieces.pop()
        data = b"".join(pieces)
        pieces.clear()
        return data

    def _pop(self) -> bytes:
        piece = self._pieces.pop(0)
        self._buffered -= len(piece)
        return piece

    async def pipe(self, sink: Sink) -> None:
        """Push the body into `sink` as it arrives, until it ends."""
        self._sink = sink
        while self._sink_full or self._pieces or not self._is_done():
            if self._sink_full:
                self._pause()
                await sink.drained()
                self._sink_full = False
            elif self._pieces:
                if self._buffered > PART:
                    await breathe()
                self._sink_full = not sink.feed(self._pop())
            else:
                await self._event()

    def stop(self) -> None:
        """The body has all that its reader needs: reads return what has arrived, and then its end. What still follows
        is discarded."""
        self.stopped = True
        self._wake()

    @property
    def begun(self) -> bool:
        """Whether any of its body has arrived."""
        return self._body_started

    @property
    def broken(self) -> bool:
        """Whether the exchange has failed."""
        return self._error is not None

    def detach(self, *, lingering: bool = False) -> None:
        """Drop references after the last read. Parser and response form a cycle, as do errors through their tracebacks,
        and the sink refers to the client's request: megabytes would otherwise stay until the next garbage
        collection. If it is `lingering`, its end is still awaited."""
        if not lingering:
            del self._parser
        self._error = None
        self._sink = None
        self._pieces.clear()

    # -- waiting ---------------------------------------------------------------------------------------------------

    def _is_done(self) -> bool:
        if self._error is not None and not self.stopped:
            raise self._error
        return self.complete or self.stopped

    async def _event(self) -> None:
        """Wait for the next change worth a task switch, or for a turn to pass on more of a burst."""
        if self._connection.held:
            await breathe()
            self._connection.pass_on()
            return
        self.resume()
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def check_timeout(self, now: float) -> None:
        """Fail if no piece of a body came for too long, unless reading was paused. Called now and then: no timers."""
        limit_s = self._timeouts.idle_s if self._body_started else self._timeouts.first_byte_s
        if now - self._received_at >= limit_s and not self._paused:
            self.fail(f"the model server sent nothing for {limit_s:g} s", status=504, code="upstream_timeout")
        elif self._head_since and now - self._head_since >= HEAD_S:
            self.fail(f"the model server's headers took over {HEAD_S:g} s", status=504, code="upstream_timeout")

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def fail(self, message: str, *, status: int = 502, code: str = "upstream_disconnected") -> None:
        """Abort: the reader gets an `UpstreamFailed`. No effect if the answer is complete."""
        if self._error is None and not self.complete:
            self._error = UpstreamFailed(message, status=status, code=code)
            self._connection.abort()
            self._over()

    def _pause(self) -> None:
        if not self._paused and self._connection.open:
            assert self._connection.transport is not None
            self._connection.transport.pause_reading()
            self._paused = True

    def resume(self) -> None:
        """Resume reading from the socket."""
        if self.stopped and self._connection.held:
            self._connection.pass_on(len(self._connection.held))  # which drops it
        if self._paused and self._connection.open:
            assert self._connection.transport is not None
            self._connection.transport.resume_reading()
            self._received_at = self._loop.time()
            self._paused = False

    # -- called by the connection ----------------------------------------------------------------------------------

    def _hold(self) -> None:
        """There is more than can be passed on now."""
        self._pause()
        self._wake()

    def _feed(self, data: bytes) -> None:
        if self.complete:
            self.reusable = False  # bytes after the end
            return
        self._unframed += len(data)
        if not self._head_done and not self._head_since:
            self._head_since = self._loop.time()
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            if self.complete:
                self.reusable = False
            else:
                self.fail(f"the model server's answer is not HTTP: {type(exc).__name__}")
            return
        if self._unframed > HEAD_LIMIT and not self.complete:
            self.fail(f"the model server's {'chunk sizes or trailers' if self._head_done else 'headers'} are too large")

    def _eof_received(self) -> None:
        """The server has closed its side: the regular end of a body without length and chunks, else an error."""
        if self._head_done and not self._framed:
            self._finish(reusable=False)
        else:
            self.fail("the model server closed the connection before its answer was complete")

    def _connection_lost(self, exc: Exception | None) -> None:
        self.reusable = False
        reason = "was reset" if exc is not None else "was closed before its answer was complete"
        self.fail(f"the connection to the model server {reason}")

    # -- called by httptools ---------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self.complete:
            self.reusable = False  # an unsolicited answer

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._head_done:
            return  # a trailer, or the head of an unsolicited answer
        key = name.decode("latin-1").lower()
        if key in ("content-length", "transfer-encoding"):
            self._framed = True
        self.headers.append((key, value.decode("utf-8", "replace")))

    def on_headers_complete(self) -> None:
        if self.complete:
            return
        self.status = self._parser.get_status_code()
        if 100 <= self.status < 200:
            self._informational += 1
            if self._informational <= MAX_INFORMATIONAL:
                self._head_since = 0.0
            self.headers.clear()
            self._framed = False
            return
        self._head_done = True
        self._head_since = 0.0
        self._received_at = self._loop.time()
        encoding = self.header("content-encoding").strip().lower()
        if encoding not in ("", "identity"):
            self._decode(encoding)
        if self._bodiless or self.status in (204, 304):
            # RFC 9112 6.3: such an answer ends with its headers in any case. The parser does not support HEAD
            # and would wait for a body, so this connection is not reused.
            self._finish(reusable=False)
        else:
            self._wake()

    def on_body(self, data: bytes) -> None:
        if self.complete or self.stopped or self._error is not None:
            return
        self._body_started = True
        self._received_at = self._loop.time()
        self._unframed = 0
        if self.generates and data[:1] != COMMENT:
            self.pool.advanced_at = self._received_at
        if self._inflater is not None:
            try:
                data = self._inflater.inflate(data)
            except ValueError as exc:
                self.fail(f"the model server's answer cannot be decompressed: {exc}", code="upstream_error")
                return
            if len(data) > PART:  # it may be all of an answer
                self._pieces += [data[at : at + PART] for at in range(0, len(data), PART)]
                self._buffered += len(data)
                self._hold()
                return
            if not data:
                return
        if self._sink is not None and not self._pieces:
            if not self._sink.feed(data) and not self._sink_full:
                self._sink_full = True
                self._pause()
                self._wake()
            return
        self._pieces.append(data)
        self._buffered += len(data)
        if self._buffered > BUFFER_LIMIT:
            self._pause()
        self._wake()

    def on_message_complete(self) -> None:
        if self._head_done and not self.complete and self._error is None:
            self._finish(reusable=self._framed and self._parser.should_keep_alive())

    def _decode(self, encoding: str) -> None:
        """Decompress the body: its readers, and clients, requested no compression."""
        if encoding not in Inflater.ENCODINGS:
            self.fail(f"the model server's answer is compressed with {encoding[:20]!r}", code="upstream_error")
            return
        self._inflater = Inflater()
        self.headers = [pair for pair in self.headers if pair[0] not in ("content-encoding", "content-length")]

    def _finish(self, *, reusable: bool) -> None:
        self.complete, self.reusable = True, reusable
        self._over()

    def _over(self) -> None:
        self._wake()
        if self.when_over is not None:
            self._loop.call_soon(self.when_over)
            self.when_over = None
