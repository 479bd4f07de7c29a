"""The HTTP/1.1 client of the relay: a small keep-alive pool of connections for each server.

It has none of the client features that are wrong for a proxy: redirects, cookies, proxies from the environment, and a
total timeout.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import lru_cache, partial

from llama_smart_proxy.backends.base import UpstreamRequest
from llama_smart_proxy.backends.http.exchange import Timeouts, UpstreamResponse
from llama_smart_proxy.backends.http.sweep import Sweeper
from llama_smart_proxy.backends.http.wire import Connection
from llama_smart_proxy.proxy.errors import UpstreamFailed

IDLE_LIMIT_S = 4.0
"""Maximum idle time of a pooled connection in seconds. llama-server closes idle connections after 5 s (`Keep-Alive:
timeout=5`, cpp-httplib's default), and a request sent at that moment must be retried."""
LINGER_S = 1.0
"""How long a connection is kept for the end of an answer whose last frame has arrived, in seconds."""
UNREACHABLE = "upstream_unreachable"
"""Error code if no connection to the server could be made: nothing was sent to it."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The address of a server; `prefix` is prepended to every path."""

    host: str
    port: int
    tls: bool = False
    prefix: str = ""

    @property
    def authority(self) -> str:
        """Host and port in the form of URLs and the Host header."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.authority}{self.prefix}"


class ConnectionPool:
    """Connections to one server. `headers` (credentials) are sent with every request, before its own."""

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
        """Send `request`; the context yields its response once the headers are received.

        Leaving the context returns the connection to the pool if the answer was read to its end. Otherwise it closes
        the connection at once, which cancels the generation in llama.cpp.

        Raises: UpstreamFailed, with code `UNREACHABLE` if no connection could be made; also if the server closed an
        idle connection at the moment it was reused: a retry then uses a new one.
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
        """Close all connections. Answers in progress fail with `why` and `code`, later requests fail too."""
        self._closed = True
        self._sweeper.stop()
        self._drop_idle()
        for connection in list(self._active):
            if connection.response is not None:
                connection.response.fail(f"the model server disconnected: {why}", code=code)
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
                self._drop_idle()  # the others are probably stale, too: the next request gets a new one
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
        except (OSError, UnicodeError) as exc:  # UnicodeError: an invalid host name
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
                connection.response.check_timeout(now)
        self._drop_expired(now)
        return bool(self._active or self._idle)

    def _release(self, connection: Connection, response: UpstreamResponse | None) -> None:
        """Return the connection to the pool, or close it if `response` is None or does not allow reuse. The end of an
        answer that its reader did not need is awaited for `LINGER_S`: most servers send it separately."""
        if response is not None and response.stopped and not response.complete and not response.broken:
            response.detach(lingering=True)
            response.resume()
            response.when_over = partial(self._release, connection, response)
            asyncio.get_running_loop().call_later(LINGER_S, response.fail, "its end did not arrive")
            return
        if connection.response is not None:
            connection.response.detach()
        connection.response = None
        self._active.discard(connection)
        if response is None or not response.reusable or not connection.idle or self._closed:
            connection.abort()
            return
        response.resume()
        now = asyncio.get_running_loop().time()
        connection.idle_until = now + _idle_limit_s(response.header("keep-alive"))
        self._idle.append(connection)
        self._drop_expired(now)

    def _drop_expired(self, now: float) -> None:
        """Close expired idle connections; the oldest come first."""
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
def _idle_limit_s(header: str) -> float:
    """The idle time in seconds that a `Keep-Alive` header allows, minus a margin of 1 s, at most `IDLE_LIMIT_S`."""
    promised = re.search(r"timeout=(\d{1,9})", header)
    return min(IDLE_LIMIT_S, int(promised[1]) - 1) if promised else IDLE_LIMIT_S
