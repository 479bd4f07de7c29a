"""The HTTP/1.1 client of the relay: a small keep-alive pool of connections for each server.

It has none of the client features that are wrong for a proxy: redirects, cookies, proxies from the environment, and a
total timeout.
"""

from __future__ import annotations

import asyncio
import math
import re
import socket
import ssl
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any
from urllib.parse import urlsplit

from aiohappyeyeballs import start_connection

from llama_smart_proxy.backends.base import UpstreamRequest
from llama_smart_proxy.backends.http.exchange import Timeouts, UpstreamResponse
from llama_smart_proxy.backends.http.resolver import AddressInfo, is_address, resolver
from llama_smart_proxy.backends.http.sweep import Sweeper
from llama_smart_proxy.backends.http.wire import Connection
from llama_smart_proxy.proxy.errors import UpstreamFailed

IDLE_LIMIT_S = 4.0
"""Maximum idle time of a pooled connection in seconds. llama-server closes idle connections after 5 s (`Keep-Alive:
timeout=5`, cpp-httplib's default), and a request sent at that moment must be retried."""
NEXT_ADDRESS_S = 0.25
"""After so many seconds without a connection to one address of a name, the next is tried too. Source: RFC 8305 5."""
LINGER_S = 1.0
"""How long a connection is kept for the end of an answer whose last frame has arrived, in seconds."""
FULL_S = 0.05
"""Pause in seconds after which a unix socket whose queue is full is tried again; a TCP connection waits by itself."""
UNREACHABLE = "upstream_unreachable"
"""Error code if no connection to the server could be made: nothing was sent to it."""
REDIRECTED = "upstream_redirected"
"""Error code if the server redirects. A redirect is not followed, as the key would go to another server, and not passed
on, as the client would follow it with its own."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The address of a server; `prefix` is prepended to every path. With `socket`, the path of a unix socket, host and
    port serve the Host header only."""

    host: str
    port: int
    tls: bool = False
    prefix: str = ""
    socket: str = ""

    @property
    def authority(self) -> str:
        """Host and port in the form of URLs and the Host header."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        if self.socket:
            return f"unix:{self.socket}"
        return f"{'https' if self.tls else 'http'}://{self.authority}{self.prefix}"


class ConnectionPool:
    """Connections to one server. `headers` (credentials) are sent with every request, before its own.

    `guard` is asked after each new connection, before anything is sent, whether the server is still the right one.
    `advanced_at` is when the server has last sent a part of a generated answer, on the event loop's clock; `on_sweep`,
    if set, is called every `sweep_s` seconds at most while there are connections.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        headers: Sequence[tuple[str, str]] = (),
        timeouts: Timeouts | None = None,
        guard: Callable[[], bool] | None = None,
        sweep_s: float = 1.0,
    ) -> None:
        self.endpoint = endpoint
        self.timeouts = timeouts or Timeouts()
        self.advanced_at = 0.0
        self.on_sweep: Callable[[float], None] | None = None
        self._guard = guard
        self._connecting: set[asyncio.Timeout] = set()
        self._idle: list[Connection] = []
        self._active: set[Connection] = set()
        self._closed = False
        limits = self.timeouts
        self._sweeper = Sweeper(min(sweep_s, limits.first_byte_s / 4, limits.idle_s / 4), self._sweep)
        self._tls = ssl.create_default_context() if endpoint.tls else None
        self._is_named = not endpoint.socket and not is_address(endpoint.host)
        fixed = [("Host", endpoint.authority), ("Accept-Encoding", "identity"), *headers]
        self._fixed = "".join(f"{name}: {value}\r\n" for name, value in fixed)

    def request(self, request: UpstreamRequest) -> AbstractAsyncContextManager[UpstreamResponse]:
        """Send `request`; the context yields its response once the headers are received.

        Leaving the context returns the connection to the pool if the answer was read to its end. Otherwise it closes
        the connection at once, which cancels the generation in llama.cpp.

        Raises: UpstreamFailed, with code `UNREACHABLE` if no connection could be made, `REDIRECTED` for a redirect;
        also if the server closed an idle connection at the moment it was reused: a retry then uses a new one.
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

    async def accepts(self, timeout_s: float) -> bool | None:
        """True once the server accepts connections, else None; nothing is sent to it."""
        try:
            async with asyncio.timeout(timeout_s):
                (await self._connect()).abort()
        except (UpstreamFailed, TimeoutError):
            return None
        return True

    def waiting(self, since: float) -> int:
        """How many requests have waited for the server since `since`, on the event loop's clock: for a connection, for
        an answer, or for more of a generated one. Those whose client reads too slowly do not count."""
        started = [timer.when() or math.inf for timer in self._connecting]
        connecting = sum(when - self.timeouts.connect_s < since for when in started)
        exchanges = [one.response for one in self._active if one.response is not None]
        return connecting + sum(_waits(response) and response.sent_s < since for response in exchanges)

    def close(self, why: str, *, code: str = "upstream_disconnected") -> None:
        """Close all connections. Answers in progress fail with `why` and `code`, later requests fail too."""
        self._closed = True
        self._sweeper.stop()
        self._drop_idle()
        for timer in self._connecting:
            timer.reschedule(asyncio.get_running_loop().time())
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
        self._sweeper.wake()
        connection = self._pop_idle() or await self._connect()
        self._active.add(connection)
        response = UpstreamResponse(self, connection, request.method, self.timeouts)
        response.generates = request.slot
        try:
            connection.send(response, self._head(request) + request.body)
            if request.journal is not None:
                request.journal.sent_s = response.sent_s
            if request.task is not None:
                request.task.sends(response)
            await response.head()
            check_redirect(response.status, response.header("location"))
        except BaseException as exc:
            self._release(connection, None)
            if isinstance(exc, UpstreamFailed) and exc.code != REDIRECTED:
                self._drop_idle()  # the others are probably stale, too: the next request gets a new one
            raise
        return connection, response

    async def _connect(self) -> Connection:
        self._check_open()
        limit_s = self.timeouts.connect_s
        timer = asyncio.timeout(limit_s)
        missing = "connection to"
        try:
            async with timer:
                self._connecting.add(timer)
                if self._is_named:
                    missing = "answer of the DNS about the name of"
                    found = await resolver.addresses(self.endpoint.host, self.endpoint.port)
                    missing = "connection to"
                    connection = await self._connect_to(found)
                else:
                    connection = await self._dial()
        except TimeoutError:
            self._check_open()
            message = f"no {missing} {self.endpoint} within {limit_s:g} s"
            raise UpstreamFailed(message, status=504, code=UNREACHABLE) from None
        except (OSError, UnicodeError) as exc:  # UnicodeError: an invalid host name
            reason = getattr(exc, "strerror", None) or exc
            raise UpstreamFailed(f"cannot connect to {self.endpoint}: {reason}", code=UNREACHABLE) from exc
        finally:
            self._connecting.discard(timer)
        if self._closed or (self._guard is not None and not self._guard()):
            connection.abort()  # another server may have taken its address: it must not receive the credentials
            raise UpstreamFailed(f"the server at {self.endpoint} has ended")
        return connection

    async def _connect_to(self, addresses: Sequence[AddressInfo]) -> Connection:
        """Connect to the first that can be reached, all but at the same time."""
        host = self.endpoint.host
        try:
            sock = await start_connection(addresses, happy_eyeballs_delay=NEXT_ADDRESS_S, interleave=1)
        except BaseException:
            resolver.forget(host)  # they may have changed
            raise
        return await self._connection(sock=sock, server_hostname=host if self._tls else None)

    async def _connection(self, **where: Any) -> Connection:
        _, connection = await asyncio.get_running_loop().create_connection(Connection, ssl=self._tls, **where)
        return connection

    def _check_open(self) -> None:
        if self._closed:
            raise UpstreamFailed(f"{self.endpoint} is being stopped")

    async def _dial(self) -> Connection:
        loop, to = asyncio.get_running_loop(), self.endpoint
        if to.socket:
            return (await loop.create_unix_connection(Connection, sock=await _unix_socket(to.socket)))[1]
        return await self._connection(host=to.host, port=to.port)

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
        if self.on_sweep is not None:
            self.on_sweep(now)
        return bool(self._active or self._idle or self._connecting)

    def _release(self, connection: Connection, response: UpstreamResponse | None) -> None:
        """Return the connection to the pool, or close it if `response` is None or does not allow reuse. The end of an
        answer that its reader did not need is awaited for `LINGER_S`: most servers send it separately."""
        if response is not None and response.stopped and not response.complete and not response.broken:
            response.detach(lingering=True)
            response.when_over = partial(self._release, connection, response)
            response.resume()  # its end may be there already
            asyncio.get_running_loop().call_later(LINGER_S, response.fail, "its end did not arrive")
            return
        if connection.response is not None:
            connection.response.detach()
        connection.response = None
        self._active.discard(connection)
        reusable = response is not None and response.reusable and not _closes_silently(response)
        if response is None or not reusable or not connection.idle or self._closed:
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


async def _unix_socket(path: str) -> socket.socket:
    """A socket connected to `path`. Not left to the event loops: for them a full queue is an error, or a success."""
    connecting = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connecting.setblocking(False)
        while True:
            try:
                connecting.connect(path)
                return connecting
            except BlockingIOError:
                await asyncio.sleep(FULL_S)
    except BaseException:
        connecting.close()
        raise


def _waits(response: UpstreamResponse) -> bool:
    """Whether it is for the server to send something: the head of the answer, or more of a generated one."""
    over = response.complete or response.stopped or response.broken
    return not over and not response._paused and (response.generates or not response._head_done)


def _closes_silently(response: UpstreamResponse) -> bool:
    """llama-server closes the connection shortly after every streamed answer without announcing it, so that the next
    request on it could be lost. Source: cpp-httplib's `write_content_chunked` reports failure when the content provider
    returns false, which llama.cpp's (b11434) does at the end."""
    return response.header("server") == "llama.cpp" and response.header("content-type").startswith("text/event-stream")


def check_redirect(status: int, location: str) -> None:
    """Raises: UpstreamFailed for a redirect. Its query stays out of the message: it may contain a key."""
    if status < 300 or status >= 400 or status == 304:
        return
    try:
        parts = urlsplit(location)
        origin = f"{parts.scheme or 'http'}://{parts.netloc.rpartition('@')[2]}" if parts.netloc else ""
        target = f"{origin}{parts.path}"[:200] or "nowhere"
    except ValueError:
        target = "an invalid address"
    message = f"the model server redirects to {target}: the configured url must be the one that answers"
    raise UpstreamFailed(message, code=REDIRECTED)


@lru_cache(maxsize=64)
def _idle_limit_s(header: str) -> float:
    """The idle time in seconds that a `Keep-Alive` header allows, minus a margin of 1 s, at most `IDLE_LIMIT_S`."""
    promised = re.search(r"timeout=(\d{1,9})", header)
    return min(IDLE_LIMIT_S, int(promised[1]) - 1) if promised else IDLE_LIMIT_S
