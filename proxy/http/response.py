"""Responses to clients: in one write, or piece by piece, straight to the client's transport.

A piece is written inside the very callback that received it; no task wakes for a token. When the client reads slower
than the model writes, `feed` returns False and `drained` waits, so memory for one slow reader stays near one socket
buffer.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import socket
import struct
import termios
from collections.abc import Coroutine, Iterable
from contextlib import suppress
from typing import Any

from aiohttp import HttpVersion10, HttpVersion11, web

from llama_smart_proxy.backends.http.exchange import BUFFER_LIMIT
from llama_smart_proxy.proxy.chat import RequestRecord
from llama_smart_proxy.proxy.http.headers import RECORD, own_headers

logger = logging.getLogger(__name__)


class ResponseWriter(web.StreamResponse):
    """A response whose body follows piece by piece. It can begin, continue and fail before a model's server has sent a
    byte. A client that takes no byte for `stall_s` seconds is disconnected.

    Raises, from all methods: ConnectionResetError when the client has left.
    """

    def __init__(self, http: web.BaseRequest, stall_s: float) -> None:
        super().__init__()
        self._http = http
        self._stall_s = stall_s
        self._in_chunks = False
        self._cut = False
        self.record: RequestRecord = http[RECORD]

    @property
    def begun(self) -> bool:
        """Whether the client has the status and the headers."""
        return self.prepared

    async def begin(self, status: int, headers: Iterable[tuple[str, str]], *, length: str = "") -> None:
        """Send status and headers; the body has `length` bytes, if that is known."""
        self.set_status(status)
        self.headers.extend(headers)
        self.headers.extend(own_headers(self._http))
        self.headers["X-Accel-Buffering"] = "no"  # nginx in front of us must not hold tokens back
        if length:
            self.content_length = int(length)
        elif self._http.version >= HttpVersion11:
            self.enable_chunked_encoding()
            self._in_chunks = True
        else:
            self.force_close()  # HTTP/1.0 marks the end of such a body by closing
        await self.prepare(self._http)
        transport = self._http.transport
        if transport is None:
            raise ConnectionResetError("the client has left")
        self._write = transport.write
        self._unsent = transport.get_write_buffer_size

    def feed(self, data: bytes) -> bool:
        """Write `data` (not empty); False asks for a pause until `drained()` returns."""
        try:
            self._write(b"%x\r\n%b\r\n" % (len(data), data) if self._in_chunks else data)
        except RuntimeError:  # uvloop's for a transport that is closed
            raise ConnectionResetError("the client has left") from None
        return self._unsent() <= BUFFER_LIMIT

    async def drained(self) -> None:
        """Wait until the client has caught up."""
        await patiently(self._http, self._http.writer.drain(), self._stall_s)

    async def finish(self, *, cut: bool = False) -> ResponseWriter:
        """End the body; with `cut` by closing the connection where its end should be."""
        self._cut = cut
        self.record.answered = self.status
        await patiently(self._http, self.write_eof(), self._stall_s)
        return self

    async def write_eof(self, data: bytes = b"") -> None:
        transport = self._http.transport
        if self._cut and transport is not None:
            transport.close()  # what was written still leaves
        else:
            await super().write_eof(data)

    def reset(self) -> None:
        """Cut the connection so that no client takes it for the end of the body, as HTTP/1.0 takes a mere close."""
        transport = self._http.transport
        if transport is not None:
            sock = transport.get_extra_info("socket")
            with suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()


class WholeResponse(web.StreamResponse):
    """A response that is complete. It leaves in one write, which takes a quarter of the CPU time of aiohttp's own
    response class."""

    def __init__(
        self, http: web.BaseRequest, status: int, headers: list[tuple[str, str]], body: bytes, stall_s: float
    ) -> None:
        super().__init__(status=status)
        self._http = http
        self._own = headers
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
        headers = self._own
        headers += own_headers(self._http)
        if not self.keep_alive:
            headers.append(("connection", "close"))
        elif self._http.version == HttpVersion10:
            headers.append(("connection", "keep-alive"))
        lines = "".join([f"{name}: {value}\r\n" for name, value in headers])
        return f"HTTP/1.1 {self.status} {self.reason}\r\n{lines}\r\n".encode()


def _write(transport: asyncio.Transport, data: bytes) -> None:
    if not transport.is_closing():
        transport.write(data)


async def patiently(http: web.BaseRequest, flushing: Coroutine[Any, Any, None], stall_s: float) -> None:
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
