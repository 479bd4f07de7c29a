"""The HTTP/1.1 client side of the relay: a small keep-alive pool of connections for each server.

It keeps us clear of client defaults that are wrong for a proxy: no redirects are followed, no cookies kept, no proxies
taken from the environment, no total timeout set.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import lru_cache

from llama_smart_proxy.backends.base import UpstreamRequest
from llama_smart_proxy.backends.http.exchange import Connection, Timeouts, UpstreamResponse
from llama_smart_proxy.backends.http.sweep import Sweeper
from llama_smart_proxy.proxy.errors import UpstreamFailed

IDLE_KEEP_S = 4.0
"""Longest rest of a pooled connection. llama-server closes its own after 5 s (`Keep-Alive: timeout=5`, cpp-httplib's
default), and a request that meets the closing has to be sent twice."""
UNREACHABLE = "upstream_unreachable"
"""Code of the error for a server to which no connection came about: nothing was sent to it."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a server listens; `prefix` is put in front of every path."""

    host: str
    port: int
    tls: bool = False
    prefix: str = ""

    @property
    def authority(self) -> str:
        """Host and port as a URL and the Host header write them."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.authority}{self.prefix}"


class ConnectionPool:
    """Connections to one server. `headers` (credentials) go out with every request, ahead of the request's own."""

    def __init__(
        self, endpoint: Endpoint, *, headers: Sequence[tuple[str, str]] = (), timeouts: Timeouts | None = None
    ) -> None:
        self.endpoint = endpoint
        self.timeouts = timeouts or Timeouts()
        self._idle: list[Connection] = []
        self._active: set[Connection] = set()
        self._closed = False
        limits = self.timeouts
        self._sweeper = Sweeper(min(1.0, limits.first_byte_s / 4, limits.idle_s / 4), self._sweep)
        self._tls = ssl.create_default_context() if endpoint.tls else None
        fixed = [("Host", endpoint.authority), ("Accept-Encoding", "identity"), *headers]
        self._fixed = "".join(f"{name}: {value}\r\n" for name, value in fixed)

    def request(self, request: UpstreamRequest) -> AbstractAsyncContextManager[UpstreamResponse]:
        """Send `request`; the context yields its response once the headers are in.

        Leaving the context puts the connection back if the answer was read to its end, and closes it at once otherwise,
        which is how llama.cpp learns that nobody listens any more.

        Raises: UpstreamFailed, with code `UNREACHABLE` if no connection came about; also when the server closed a
        resting connection in the very moment it was used again: a second request then goes out on a new one.
        """
        return _Exchange(self, request)

    async def fetch(
        self, request: UpstreamRequest, *, timeout_s: float, limit: int = 16 * 1024 * 1024
    ) -> tuple[int, bytes]:
        """The status and whole body of a small answer.

        Raises: UpstreamFailed, also when it takes over `timeout_s` seconds or exceeds `limit` bytes.
        """
        try:
            async with asyncio.timeout(timeout_s), self.request(request) as response:
                body = await response.read(limit)
        except TimeoutError:
            raise UpstreamFailed(
                f"{self.endpoint} did not answer within {timeout_s:g} s", status=504, code="upstream_timeout"
            ) from None
        if body is None:
            raise UpstreamFailed(f"the answer of {self.endpoint} is too large")
        return response.status, body

    def close(self, why: str, *, code: str = "upstream_disconnected") -> None:
        """Close every connection now. An answer under way fails with `why` and `code`. Later requests fail too."""
        self._closed = True
        self._sweeper.stop()
        self._drop_idle()
        for connection in list(self._active):
            if connection.response is not None:
                connection.response.fail(f"the model server broke off: {why}", code=code)
            connection.abort()

    def _head(self, request: UpstreamRequest) -> bytes:
        lines = "".join([f"{name}: {value}\r\n" for name, value in request.headers])
        if request.body or request.method == "POST":
            lines += f"Content-Length: {len(request.body)}\r\n"
        text = f"{request.method} {self.endpoint.prefix}{request.path} HTTP/1.1\r\n{self._fixed}{lines}\r\n"
        return text.encode("utf-8", "surrogateescape")  # as aiohttp decoded them

    async def _open(self, request: UpstreamRequest) -> tuple[Connection, UpstreamResponse]:
        connection = self._pop_idle() or await self._connect()
        self._active.add(connection)
        self._sweeper.wake()
        response = UpstreamResponse(self, connection, request.method, self.timeouts)
        try:
            connection.send(response, self._head(request) + request.body)
            await response.head()
        except BaseException as exc:
            self._release(connection, None)
            if isinstance(exc, UpstreamFailed):
                self._drop_idle()  # the others are no better: what comes next gets a new one
            raise
        return connection, response

    async def _connect(self) -> Connection:
        if self._closed:
            raise UpstreamFailed(f"{self.endpoint} is being stopped")
        limit_s = self.timeouts.connect_s
        try:
            async with asyncio.timeout(limit_s):
                _, connection = await asyncio.get_running_loop().create_connection(
                    Connection, self.endpoint.host, self.endpoint.port, ssl=self._tls
                )
        except TimeoutError:
            message = f"no connection to {self.endpoint} within {limit_s:g} s"
            raise UpstreamFailed(message, status=504, code=UNREACHABLE) from None
        except (OSError, UnicodeError) as exc:  # UnicodeError: the host's name cannot be one
            reason = getattr(exc, "strerror", None) or exc
            raise UpstreamFailed(f"cannot connect to {self.endpoint}: {reason}", code=UNREACHABLE) from exc
        return connection

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

    def _sweep(self) -> bool:
        now = asyncio.get_running_loop().time()
        for connection in list(self._active):
            if connection.response is not None:
                connection.response.check_quiet(now)
        self._drop_rested(now)
        return bool(self._active or self._idle)

    def _release(self, connection: Connection, response: UpstreamResponse | None) -> None:
        """Take the connection back; without a `response` that left it in order, it is closed."""
        if connection.response is not None:
            connection.response.let_go()
        connection.response = None
        self._active.discard(connection)
        if response is None or not response.reusable or not connection.idle or self._closed:
            connection.abort()
            return
        response.resume()
        now = asyncio.get_running_loop().time()
        connection.idle_until = now + _keep_s(response.header("keep-alive"))
        self._idle.append(connection)
        self._drop_rested(now)

    def _drop_rested(self, now: float) -> None:
        """Close what has rested for too long; the longest at rest come first."""
        while self._idle and not (self._idle[0].open and now < self._idle[0].idle_until):
            self._idle.pop(0).abort()


class _Exchange(AbstractAsyncContextManager[UpstreamResponse]):
    """One request on one connection. A class rather than a generator: this runs for every request."""

    __slots__ = ("_connection", "_pool", "_request", "_response")

    def __init__(self, pool: ConnectionPool, request: UpstreamRequest) -> None:
        self._pool = pool
        self._request = request

    async def __aenter__(self) -> UpstreamResponse:
        self._connection, self._response = await self._pool._open(self._request)
        return self._response

    async def __aexit__(self, *exc_info: object) -> None:
        self._pool._release(self._connection, self._response)


@lru_cache(maxsize=64)
def _keep_s(header: str) -> float:
    """How long a server that sent this `Keep-Alive` header lets a connection rest, with a second's margin, at most
    `IDLE_KEEP_S`."""
    promised = re.search(r"timeout=(\d{1,9})", header)
    return min(IDLE_KEEP_S, int(promised[1]) - 1) if promised else IDLE_KEEP_S
