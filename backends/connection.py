"""The HTTP/1.1 client side of the relay: a small keep-alive pool of connections for each server.

It keeps us clear of client defaults that are wrong for a proxy: no redirects are followed, no cookies kept, no proxies
taken from the environment, no total timeout set.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from backends import Call
from backends.exchange import Connection, Response, Timeouts
from proxy.errors import UpstreamFailed

IDLE_KEEP_S = 4.0
"""Longest rest of a pooled connection. llama-server closes its own after 5 s (`Keep-Alive: timeout=5`, cpp-httplib's
default), and a request that meets the closing has to be sent twice."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a server listens; `prefix` is put in front of every path."""

    host: str
    port: int
    tls: bool = False
    prefix: str = ""

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{self.prefix}"


class ConnectionPool:
    """Connections to one server. `headers` (credentials) go out with every request, ahead of the call's own."""

    def __init__(
        self, endpoint: Endpoint, *, headers: Sequence[tuple[str, str]] = (), timeouts: Timeouts | None = None
    ) -> None:
        self.endpoint = endpoint
        self._timeouts = timeouts or Timeouts()
        self._idle: list[Connection] = []
        self._active: set[Connection] = set()
        self._closed = False
        host = str(Endpoint(endpoint.host, endpoint.port)).removeprefix("http://")
        fixed = [("Host", host), ("Accept-Encoding", "identity"), *headers]
        self._fixed = "".join(f"{name}: {value}\r\n" for name, value in fixed)

    @asynccontextmanager
    async def request(self, call: Call, *, timeouts: Timeouts | None = None) -> AsyncIterator[Response]:
        """Send `call`; yield its response once the headers are in.

        A pooled connection may have been closed by the server in the very moment we used it; the call then goes out
        once more, on a new connection. Leaving the context puts the connection back if the answer was read to its end,
        and closes it at once otherwise, which is how llama.cpp learns that nobody listens any more.

        Raises: UpstreamFailed.
        """
        head = self._head(call)
        limits = timeouts or self._timeouts
        response: Response | None = None
        while response is None:
            connection = self._pop_idle() or await self._connect(limits)
            self._active.add(connection)
            try:
                response = await self._exchange(connection, call.method, head + call.body, limits)
            except UpstreamFailed as exc:
                stale = connection.used and not exc.answered and exc.status == 502
                self._release(connection, reusable=False)
                if not stale:
                    raise
                self._drop_idle()
            except BaseException:
                self._release(connection, reusable=False)
                raise
        try:
            yield response
        finally:
            connection.response = None
            self._release(connection, reusable=response.reusable, response=response)

    async def fetch(self, call: Call, *, timeout_s: float, limit: int = 16 * 1024 * 1024) -> tuple[int, bytes]:
        """The status and whole body of a small answer.

        Raises: UpstreamFailed, also when it takes over `timeout_s` seconds or exceeds `limit` bytes.
        """
        try:
            async with asyncio.timeout(timeout_s), self.request(call) as response:
                body = await response.read(limit)
        except TimeoutError:
            raise UpstreamFailed(
                f"{self.endpoint} did not answer within {timeout_s:g} s", status=504, code="upstream_timeout"
            ) from None
        if body is None:
            raise UpstreamFailed(f"the answer of {self.endpoint} is too large")
        return response.status, body

    def close(self) -> None:
        """Close every connection now, with or without an answer under way. Later requests fail."""
        self._closed = True
        self._drop_idle()
        for connection in list(self._active):
            connection.abort()

    def _head(self, call: Call) -> bytes:
        lines = "".join(f"{name}: {value}\r\n" for name, value in call.headers)
        length = f"Content-Length: {len(call.body)}\r\n" if call.body or call.method in ("POST", "PUT", "PATCH") else ""
        text = f"{call.method} {self.endpoint.prefix}{call.path} HTTP/1.1\r\n{self._fixed}{lines}{length}\r\n"
        return text.encode("latin-1", "replace")

    async def _connect(self, limits: Timeouts) -> Connection:
        if self._closed:
            raise UpstreamFailed(f"{self.endpoint} is being stopped")
        context = ssl.create_default_context() if self.endpoint.tls else None
        try:
            async with asyncio.timeout(limits.connect_s):
                _, connection = await asyncio.get_running_loop().create_connection(
                    Connection, self.endpoint.host, self.endpoint.port, ssl=context
                )
        except TimeoutError:
            raise UpstreamFailed(
                f"no connection to {self.endpoint} within {limits.connect_s:g} s", status=504, code="upstream_timeout"
            ) from None
        except OSError as exc:
            raise UpstreamFailed(f"cannot connect to {self.endpoint}: {exc.strerror or exc}") from exc
        return connection

    async def _exchange(self, connection: Connection, method: str, data: bytes, limits: Timeouts) -> Response:
        response = Response(connection, method, limits)
        connection.response = response
        if not connection.open:
            response._at_loss(None)
        else:
            assert connection.transport is not None
            connection.transport.write(data)
        try:
            while not response._head_done and not response._settled():
                await response._event(limits.first_byte_s)
        except BaseException:
            connection.response = None
            raise
        return response

    def _pop_idle(self) -> Connection | None:
        now = asyncio.get_running_loop().time()
        while self._idle:
            connection = self._idle.pop()
            if connection.open and now < connection.idle_until:
                return connection
            connection.abort()
        return None

    def _drop_idle(self) -> None:
        for connection in self._idle:
            connection.abort()
        self._idle.clear()

    def _release(self, connection: Connection, *, reusable: bool, response: Response | None = None) -> None:
        self._active.discard(connection)
        if not (reusable and response is not None and connection.open and not self._closed):
            connection.abort()
            return
        response._resume()
        now = asyncio.get_running_loop().time()
        connection.used = True
        connection.idle_until = now + _keep_s(response)
        self._idle.append(connection)
        while not self._idle[0].open or self._idle[0].idle_until <= now:  # the longest at rest go first
            self._idle.pop(0).abort()


def _keep_s(response: Response) -> float:
    """How long the server lets this connection rest, with a second's margin, at most `IDLE_KEEP_S`."""
    promised = re.search(r"timeout=(\d{1,9})", response.header("keep-alive"))
    return min(IDLE_KEEP_S, int(promised[1]) - 1) if promised else IDLE_KEEP_S
