"""A model server somebody else runs, as bad as one likes: it plays a script and remembers every byte it was sent."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from tests.support.harness import Proxy, running_proxy
from tests.support.raw_client import DEADLINE_S

BUFFER = 64 * 1024


@dataclass(frozen=True)
class Request:
    """One request as it arrived. Header names are in lower case."""

    line: str
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)

    def json(self) -> Any:
        return json.loads(self.body)


class Link(asyncio.Protocol):
    """One connection to the upstream. `received` is every byte of it, `opened` and `closed` are monotonic seconds."""

    def __init__(self, upstream: RawUpstream) -> None:
        self.received = bytearray()
        self.opened = time.monotonic()
        self.closed: float | None = None
        self.requests: list[Request] = []
        self.sent = 0
        self._upstream = upstream
        self._parsed = 0
        self._arrived = asyncio.Event()
        self._gone = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._transport: asyncio.Transport | None = None
        self._task: asyncio.Task[None] | None = None

    # -- for scripts -----------------------------------------------------------------------------------------------

    @property
    def accepted(self) -> int:
        """Bytes the kernel has taken from us."""
        waiting = self._transport.get_write_buffer_size() if self._transport is not None else 0
        return self.sent - waiting

    async def send(self, data: bytes) -> None:
        """Send `data`; returns when the other side (or its kernel) has taken most of it.

        Raises: ConnectionResetError when it has gone.
        """
        if self.closed is not None or self._transport is None or self._transport.is_closing():  # told a turn later
            raise ConnectionResetError
        self._transport.write(data)
        self.sent += len(data)
        await self._writable.wait()

    async def gone(self) -> None:
        """Wait until the other side has closed the connection."""
        async with asyncio.timeout(DEADLINE_S):
            await self._gone.wait()

    def close(self) -> None:
        """Close properly (FIN), once everything is sent."""
        if self._transport is not None:
            self._transport.close()

    def reset(self) -> None:
        """Close with a RST, which may destroy bytes under way."""
        if self._transport is not None:
            sock: socket.socket = self._transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._transport.abort()

    def half_close(self) -> None:
        """Send FIN and go on reading."""
        if self._transport is not None:
            self._transport.write_eof()

    def pause_reading(self) -> None:
        """Take no more bytes from the other side."""
        if self._transport is not None:
            self._transport.pause_reading()

    # -- asyncio's side --------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=BUFFER)
        self._upstream.links.append(self)
        self._task = asyncio.get_running_loop().create_task(self._serve())

    def data_received(self, data: bytes) -> None:
        self.received += data
        self._arrived.set()

    def eof_received(self) -> bool:
        self._mark_closed()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._mark_closed()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def _mark_closed(self) -> None:
        if self.closed is None:
            self.closed = time.monotonic()
        self._gone.set()
        self._arrived.set()
        self._writable.set()

    async def _serve(self) -> None:
        with suppress(ConnectionError):
            while (request := await self._next()) is not None:
                self.requests.append(request)
                self._upstream.requests.append(request)
                script = self._upstream.script
                await (self.send(script) if isinstance(script, bytes) else script(self, request))

    async def _next(self) -> Request | None:
        while (request := self._parse()) is None:
            if self.closed is not None:
                return None
            self._arrived.clear()
            await self._arrived.wait()
        return request

    def _parse(self) -> Request | None:
        data = self.received
        end = data.find(b"\r\n\r\n", self._parsed)
        if end < 0:
            return None
        line, *fields = bytes(data[self._parsed : end]).decode("utf-8", "surrogateescape").split("\r\n")
        headers = [(name.lower(), value.strip()) for name, _, value in (field.partition(":") for field in fields)]
        length = int(dict(headers).get("content-length", 0))
        if len(data) < end + 4 + length:
            return None
        self._parsed = end + 4 + length
        return Request(line, headers, bytes(data[end + 4 : self._parsed]))


Script = bytes | Callable[[Link, Request], Awaitable[None]]


def cut_short(data: bytes, ending: str) -> Script:
    """A script that sends `data`, then ends the connection by `close` (FIN) or `reset` (RST)."""

    async def script(link: Link, request: Request) -> None:
        await link.send(data)
        getattr(link, ending)()

    return script


class RawUpstream:
    """Listens on 127.0.0.1. For each request it sends `script` if that is bytes, else awaits `script(link, request)`;
    the connection stays open afterwards unless the script closes it."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.port = 0
        self.links: list[Link] = []
        self.requests: list[Request] = []

    @property
    def received(self) -> bytes:
        """Every byte of every connection."""
        return b"".join(bytes(link.received) for link in self.links)

    @property
    def open_links(self) -> int:
        return sum(link.closed is None for link in self.links)

    async def stop(self) -> None:
        """Reset every connection and end every script."""
        for link in self.links:
            link.reset()
            if link._task is not None:
                link._task.cancel()
        tasks = [link._task for link in self.links if link._task is not None]
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result


@asynccontextmanager
async def raw_upstream(script: Script = b"", *, port: int = 0, host: str = "127.0.0.1") -> AsyncIterator[RawUpstream]:
    """A running `RawUpstream`. A script that raised fails the test."""
    upstream = RawUpstream(script)
    server = await asyncio.get_running_loop().create_server(lambda: Link(upstream), host, port, backlog=1024)
    upstream.port = int(server.sockets[0].getsockname()[1])
    try:
        yield upstream
    finally:
        server.close()
        await upstream.stop()


# -- what to send ------------------------------------------------------------------------------------------------------


def head(status: int = 200, headers: Iterable[tuple[str, str]] = (), *, version: str = "HTTP/1.1") -> bytes:
    """A status line and headers, nothing added."""
    lines = [f"{version} {status} Reason", *(f"{name}: {value}" for name, value in headers)]
    return "\r\n".join([*lines, "", ""]).encode("utf-8")


def plain(body: bytes, status: int = 200, headers: Iterable[tuple[str, str]] = ()) -> bytes:
    """A whole answer with a JSON body."""
    own = (("Content-Type", "application/json"), ("Content-Length", str(len(body))))
    return head(status, (*own, *headers)) + body


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


LAST_CHUNK = b"0\r\n\r\n"
EVENT_HEAD = head(200, (("Content-Type", "text/event-stream"), ("Transfer-Encoding", "chunked")))
DONE = b"data: [DONE]\n\n"


def event(value: Any) -> bytes:
    """A server-sent event whose data is `value` as JSON."""
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def token(text: str, index: int = 0) -> bytes:
    """An event of a chat stream."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    return event({"id": f"c-{index}", "object": "chat.completion.chunk", "model": "m", "choices": [choice]})


def stream(*pieces: bytes) -> bytes:
    """A whole event stream, each piece in a chunk of its own."""
    return EVENT_HEAD + b"".join(chunk(piece) for piece in pieces) + LAST_CHUNK


@asynccontextmanager
async def own_proxy(script: Script = b"", **server: float) -> AsyncIterator[tuple[Proxy, RawUpstream]]:
    """A proxy with `server` settings, and the upstream, with this script, that holds its one model `m`."""
    async with raw_upstream(script) as upstream:
        remote = {"url": f"http://127.0.0.1:{upstream.port}", "models": ["m"]}
        async with running_proxy({"server": server, "remotes": {"up": remote}}) as proxy:
            yield proxy, upstream


def forget(upstream: RawUpstream) -> None:
    """Drop what the upstream remembers of connections that are closed."""
    upstream.links[:] = [link for link in upstream.links if link.closed is None]
    upstream.requests.clear()
