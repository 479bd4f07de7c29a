"""A client that shows what was really on the wire: how an answer was framed, and whether it was whole."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

DEADLINE_S = 200.0
"""Nothing a test waits for takes longer, unless it says so."""


class BrokenAnswer(Exception):
    """The answer ended before its framing says it is over, or is not HTTP."""


@dataclass(frozen=True)
class Answer:
    """One whole response. `headers` are in order, names in lower case."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    version: str = "HTTP/1.1"
    pieces: list[bytes] = field(default_factory=list)

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The `error` object of OpenAI's envelope."""
        error = self.json()["error"]
        assert isinstance(error, dict)
        return error


def request(
    method: str,
    path: str,
    body: bytes | dict[str, Any] | None = None,
    *,
    headers: Iterable[tuple[str, str]] = (),
    close: bool = False,
    version: str = "HTTP/1.1",
) -> bytes:
    """A well-formed request; a dict becomes a JSON body."""
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    lines = [f"{method} {path} {version}", "Host: test"]
    if data is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
    lines += [f"{name}: {value}" for name, value in headers]
    if close:
        lines.append("Connection: close")
    return "\r\n".join([*lines, "", ""]).encode("utf-8") + (data or b"")


class RawClient:
    """One connection. Every method gives up after `DEADLINE_S` seconds with `TimeoutError`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        async with asyncio.timeout(DEADLINE_S):
            await self.writer.drain()

    async def head(self) -> tuple[str, int, list[tuple[str, str]]]:
        """Version, status and headers of the next answer."""
        try:
            async with asyncio.timeout(DEADLINE_S):
                raw = await self.reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as exc:
            raise BrokenAnswer(f"closed after {exc.partial!r}") from None
        lines = raw[:-4].decode("latin-1").split("\r\n")
        version, status, *_ = lines[0].split(" ", 2)
        headers = [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines[1:])]
        return version, int(status), headers

    async def chunk(self) -> bytes:
        """The next chunk of a chunked body; empty at its end."""
        try:
            async with asyncio.timeout(DEADLINE_S):
                size = int((await self.reader.readuntil(b"\r\n"))[:-2], 16)
                data = await self.reader.readexactly(size + 2)
        except (asyncio.IncompleteReadError, ValueError) as exc:
            raise BrokenAnswer(f"the chunked body is cut short: {exc!r}") from None
        if not data.endswith(b"\r\n"):
            raise BrokenAnswer("a chunk has the wrong length")
        return data[:-2]

    async def some(self) -> bytes:
        """Body bytes of an answer that is not chunked, as many as there are; empty at its end."""
        async with asyncio.timeout(DEADLINE_S):
            return await self.reader.read(65536)

    async def answer(self, *, method: str = "POST") -> Answer:
        """The next whole answer.

        Raises: BrokenAnswer when it is cut short in any way; OSError when the connection is reset.
        """
        version, status, headers = await self.head()
        found = dict(headers)
        pieces: list[bytes] = []
        if method == "HEAD" or status in (204, 304) or 100 <= status < 200:
            pass
        elif found.get("transfer-encoding") == "chunked":
            while piece := await self.chunk():
                pieces.append(piece)
        elif "content-length" in found:
            pieces.append(await self.exactly(int(found["content-length"])))
        else:
            pieces.append(await self.rest())
        return Answer(status, headers, b"".join(pieces), version, pieces)

    async def exactly(self, count: int) -> bytes:
        try:
            async with asyncio.timeout(DEADLINE_S):
                return await self.reader.readexactly(count)
        except asyncio.IncompleteReadError as exc:
            raise BrokenAnswer(f"{len(exc.partial)} of {count} bytes") from None

    async def rest(self) -> bytes:
        """Everything until the other side closes."""
        async with asyncio.timeout(DEADLINE_S):
            return await self.reader.read()

    async def closed_by_peer(self) -> bytes:
        """Wait until the other side has closed or reset the connection; what it said before."""
        said = b""
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(DEADLINE_S):
                while data := await self.reader.read(65536):
                    said += data
        return said

    def half_close(self) -> None:
        """Say that nothing more will be sent, and go on reading."""
        self.writer.write_eof()

    def leave(self) -> None:
        """Close at once, as a client does whose user pressed stop."""
        self.writer.transport.abort()


class EventReader:
    """Reads the server-sent events of a chunked answer as they come; its lines end as those of aiohttp-sse."""

    def __init__(self, client: RawClient) -> None:
        self._client = client
        self._rest = b""

    async def next(self) -> Any:
        """The data of the next event, parsed."""
        while True:
            while b"\r\n\r\n" not in self._rest:
                piece = await self._client.chunk()
                assert piece, "the events end"
                self._rest += piece
            event, _, self._rest = self._rest.partition(b"\r\n\r\n")
            if event.startswith(b"data: "):
                return json.loads(event.removeprefix(b"data: "))


@asynccontextmanager
async def connected(port: int, *, receive_buffer: int | None = None) -> AsyncIterator[RawClient]:
    """A connection to 127.0.0.1:`port`; with `receive_buffer` the kernel takes in about that many bytes unread."""
    sock = socket.socket()
    sock.setblocking(False)
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    async with asyncio.timeout(DEADLINE_S):
        try:
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
            reader, writer = await asyncio.open_connection(sock=sock, limit=receive_buffer or 2**16)
        except BaseException:
            sock.close()
            raise
    try:
        yield RawClient(reader, writer)
    finally:
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def ask(port: int, data: bytes, *, method: str = "POST") -> Answer:
    """Send `data` on a connection of its own; the whole answer."""
    async with connected(port) as client:
        await client.send(data)
        return await client.answer(method=method)


async def post(
    port: int, path: str, body: bytes | dict[str, Any], *, headers: Iterable[tuple[str, str]] = ()
) -> Answer:
    """POST `body` on a connection of its own; the whole answer."""
    return await ask(port, request("POST", path, body, headers=headers, close=True))


async def get(port: int, path: str) -> Answer:
    """GET on a connection of its own; the whole answer."""
    return await ask(port, request("GET", path, close=True), method="GET")
