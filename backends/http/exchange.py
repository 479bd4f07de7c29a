"""One answer of a model server, from its first byte to its last.

Why not an `aiohttp.ClientSession`: its body reader wakes a task for every piece, and that task switch is most of what a
relayed token costs. Here a piece travels from the socket through the C parser into a `Sink` within one callback; a task
runs only when a request begins, ends, or has to wait for a slow reader.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import httptools

from llama_smart_proxy.proxy.errors import UpstreamFailed

if TYPE_CHECKING:
    from llama_smart_proxy.backends.http.connection import ConnectionPool

HEAD_LIMIT = 64 * 1024
"""Most bytes of status line and headers accepted from a server."""
BUFFER_LIMIT = 64 * 1024
"""Body bytes held for a reader that is not ready before the socket is no longer read."""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds to wait for a connection, for the first byte of an answer, and between two bytes of one."""

    connect_s: float = 5.0
    first_byte_s: float = 600.0
    idle_s: float = 120.0


class Sink(Protocol):
    """Takes body bytes as they arrive."""

    def feed(self, data: bytes) -> bool:
        """Take `data` now; False asks for a pause, until `drained()` returns."""

    async def drained(self) -> None:
        """Return once more can be taken."""


class Connection(asyncio.Protocol):
    """One socket and the answer under way on it. Every method runs in the event loop."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.response: UpstreamResponse | None = None
        self.idle_until = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's transports do not inherit from asyncio's

    def send(self, response: UpstreamResponse, data: bytes) -> None:
        """Begin an exchange: `data` goes out, and what comes back goes to `response`."""
        self.response = response
        if self.transport is None:
            response._at_loss(None)
        else:
            # At the end of this turn of the loop: requests that came together leave together, and the server is woken
            # up once for all of them.
            response._loop.call_soon(self._write, data)

    def _write(self, data: bytes) -> None:
        if self.transport is not None:
            self.transport.write(data)

    def data_received(self, data: bytes) -> None:
        if self.response is None:
            self.abort()  # bytes nobody asked for: the next answer on this connection could not be trusted
        else:
            self.response._feed(data)

    def eof_received(self) -> None:
        if self.response is not None:
            self.response._at_eof()

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        if self.response is not None:
            self.response._at_loss(exc)

    @property
    def open(self) -> bool:
        return self.transport is not None and not self.transport.is_closing()

    @property
    def idle(self) -> bool:
        """Whether it could carry another request: open, and the last one has left entirely. (A server may answer before
        it has read all, and read no more.)"""
        return self.open and self.transport is not None and self.transport.get_write_buffer_size() == 0

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()


class UpstreamResponse:
    """An answer under way. Its reader calls exactly one of `read`, `pipe` and (over and over) `piece`, after
    `first_piece` if it likes.

    `status` and `headers` (in order, names lower-cased) are set once the connection pool hands it out; `sent_s` is when
    the request left (`time.monotonic()`), and `pool` leads to the same server. All reading
    methods raise `UpstreamFailed` when the server breaks off, truncates, or falls silent.
    """

    def __init__(self, pool: ConnectionPool, connection: Connection, method: str, timeouts: Timeouts) -> None:
        self.pool = pool
        self.status = 0
        self.headers: list[tuple[str, str]] = []
        self.answered = False
        self.complete = False
        self.reusable = False
        self._connection = connection
        self._bodiless = method == "HEAD"
        self._timeouts = timeouts
        self._parser = httptools.HttpResponseParser(self)
        self._loop = asyncio.get_running_loop()
        self._head_bytes = 0
        self._head_done = False
        self._framed = False  # the body's end is marked, by a length or by chunks
        self._error: UpstreamFailed | None = None
        self._pieces: list[bytes] = []
        self._held = 0
        self._sink: Sink | None = None
        self._choked = False
        self._paused = False
        self.sent_s = time.monotonic()  # the loop's clock counts milliseconds
        self._last_rx = self._loop.time()
        self._waiter: asyncio.Future[None] | None = None

    # -- what the reader calls -------------------------------------------------------------------------------------

    def header(self, name: str, default: str = "") -> str:
        """The first header called `name` (given in lower case)."""
        for key, value in self.headers:
            if key == name:
                return value
        return default

    async def head(self) -> None:
        """Return when status and headers are in."""
        while not self._head_done and not self._settled():
            await self._event()

    async def first_piece(self) -> None:
        """Return when a body byte is there to be read, or the body ended without one."""
        while not self._pieces and not self._settled():
            await self._event()

    async def read(self, limit: int) -> bytes | None:
        """The whole body; None when it grew past `limit` bytes (then what came so far awaits `pipe`)."""
        while not self._settled():
            if self._held > limit:
                return None
            self.resume()
            await self._event()
        body = b"".join(self._pieces)
        self._pieces.clear()
        return body

    async def piece(self) -> bytes:
        """The body bytes that came since the last call, waiting for some; empty at the end. For a reader at its own
        pace: the socket is left unread while it does not ask."""
        pieces = self._pieces
        while not pieces and not self._settled():
            if self._paused:
                self.resume()
            await self._event()
        self._held = 0
        if len(pieces) == 1:
            return pieces.pop()
        data = b"".join(pieces)
        pieces.clear()
        return data

    async def pipe(self, sink: Sink) -> None:
        """Push the body into `sink` as it arrives, until it ends."""
        self._sink = sink
        for piece in self._pieces:
            self._choked |= not sink.feed(piece)
        self._pieces.clear()
        while self._choked or not self._settled():
            if self._choked:
                self._pause()
                await sink.drained()
                self._choked = False
                continue
            self.resume()
            await self._event()

    @property
    def empty(self) -> bool:
        """Whether the body has ended without a byte; to be asked after `first_piece`."""
        return self.complete and not self.answered

    @property
    def broken(self) -> bool:
        """Whether the server broke off."""
        return self._error is not None

    def let_go(self) -> None:
        """Nobody reads any more. Parser and response refer to each other, an error does by its traceback, and the sink
        refers to the client's request: left to the garbage collector, megabytes would wait for its next round."""
        del self._parser
        self._error = None
        self._sink = None
        self._pieces.clear()

    # -- waiting ---------------------------------------------------------------------------------------------------

    def _settled(self) -> bool:
        if self._error is not None:
            raise self._error
        return self.complete

    async def _event(self) -> None:
        """Wait for the next change worth a task switch."""
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def check_quiet(self, now: float) -> None:
        """Fail if the server has been silent for too long, and it was not we who did not listen. Called now and then,
        so that a token costs no timer."""
        limit_s = self._timeouts.idle_s if self.answered else self._timeouts.first_byte_s
        if now - self._last_rx >= limit_s and not self._paused:
            self.fail(f"the model server sent nothing for {limit_s:g} s", status=504, code="upstream_timeout")

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def fail(self, message: str, *, status: int = 502, code: str = "upstream_disconnected") -> None:
        """Break off: whoever reads gets an `UpstreamFailed`. Nothing if the answer is complete."""
        if self._error is None and not self.complete:
            self._error = UpstreamFailed(message, status=status, code=code)
            self._connection.abort()
            self._wake()

    def _pause(self) -> None:
        if not self._paused and self._connection.open:
            assert self._connection.transport is not None
            self._connection.transport.pause_reading()
            self._paused = True

    def resume(self) -> None:
        """Read from the socket again."""
        if self._paused and self._connection.open:
            assert self._connection.transport is not None
            self._connection.transport.resume_reading()
            self._last_rx = self._loop.time()
            self._paused = False

    # -- what the connection calls ---------------------------------------------------------------------------------

    def _feed(self, data: bytes) -> None:
        self._last_rx = self._loop.time()
        if self.complete:
            self.reusable = False  # bytes behind the end
            return
        if not self._head_done:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            if self.complete:
                self.reusable = False
            else:
                self.fail(f"the model server's answer is not HTTP: {type(exc).__name__}")
            return
        if not self._head_done and self._head_bytes > HEAD_LIMIT:
            self.fail("the model server's headers are too large")

    def _at_eof(self) -> None:
        """The server will send no more: the proper end of a body that has no length and no chunks."""
        if self._head_done and not self._framed:
            self._finish(reusable=False)
        else:
            self.fail("the model server closed the connection before its answer was complete")

    def _at_loss(self, exc: Exception | None) -> None:
        self.reusable = False
        reason = "was reset" if exc is not None else "was closed before its answer was complete"
        self.fail(f"the connection to the model server {reason}")

    # -- what httptools calls --------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self.complete:
            self.reusable = False  # an answer to no question

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._head_done:
            return  # a trailer, or the head of an answer to no question
        key = name.decode("latin-1").lower()
        if key in ("content-length", "transfer-encoding"):
            self._framed = True
        self.headers.append((key, value.decode("utf-8", "replace")))

    def on_headers_complete(self) -> None:
        if self.complete:
            return
        self.status = self._parser.get_status_code()
        if 100 <= self.status < 200:
            self.headers.clear()
            self._framed = False
            return
        self._head_done = True
        if self._bodiless or self.status in (204, 304):
            # RFC 9112 6.3: such an answer ends with its headers, whatever they promise and whatever follows. The parser
            # does not know of HEAD and would wait for a body, so this connection is not used again.
            self._finish(reusable=False)
        else:
            self._wake()

    def on_body(self, data: bytes) -> None:
        if self.complete:
            return
        self.answered = True
        if self._sink is not None:
            if not self._sink.feed(data) and not self._choked:
                self._choked = True
                self._pause()
                self._wake()
            return
        self._pieces.append(data)
        self._held += len(data)
        if self._held > BUFFER_LIMIT:
            self._pause()
        self._wake()

    def on_message_complete(self) -> None:
        if self._head_done and not self.complete:
            self._finish(reusable=self._framed and self._parser.should_keep_alive() and not self._closes_unsaid())

    def _closes_unsaid(self) -> bool:
        """llama-server closes the connection behind every streamed answer, a moment after its end and without having
        said so: whoever sends the next request on it may lose that. Source: cpp-httplib's `write_content_chunked`
        reports failure when the content provider returns false, which llama.cpp's (b11434) does at the end."""
        return self.header("server") == "llama.cpp" and self.header("content-type").startswith("text/event-stream")

    def _finish(self, *, reusable: bool) -> None:
        self.complete, self.reusable = True, reusable
        self._wake()
