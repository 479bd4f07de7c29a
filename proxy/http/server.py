"""The listening side: aiohttp's HTTP server with the gaps closed that a long-running, exposed process cannot have.

aiohttp 3.14 waits for a request head without limit, and repeats the offending bytes (an API key, say) in the body of a
400. `FrontServer` and `FrontConnection` mend both through the class's public methods. `check_request` refuses what
aiohttp lets through but the next HTTP parser might read differently.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, cast

from aiohttp import HttpVersion10, HttpVersion11, web

from llama_smart_proxy.backends.http.sweep import Sweeper
from llama_smart_proxy.proxy.dialects import OPENAI
from llama_smart_proxy.proxy.errors import BadRequest, ProxyError
from llama_smart_proxy.proxy.http.headers import SERVER

logger = logging.getLogger(__name__)

_HOST = re.compile(r"(?:[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\])(?::(\d{1,5}))?")
MAX_HEADER_LINE = 8190
MAX_HEADERS = 100
MAX_HEAD_BYTES = 64 * 1024
AMBIGUOUS = "invalid_http"
"""Error code of what is not HTTP, or not clearly."""
MIN_BODY_RATE = 1024
BODY_GRACE_S = 10.0
"""A body that comes at fewer bytes a second than `MIN_BODY_RATE` is given up after so many seconds."""


class FrontConnection(web.RequestHandler):
    """One client connection.

    `head_since` is when the head of a request began to be waited for, `body_since` when its body did, None outside
    that; `body_bytes` is how much of the body has come since. `closing_since` is when we began to close it, which
    lasts until the client has taken all that is left for it.
    """

    def __init__(self, front: FrontServer, **options: Any) -> None:
        super().__init__(front, **options)
        self.head_since: float | None = None
        self.body_since: float | None = None
        self.body_bytes = 0
        self.closing_since: float | None = None
        self.wire: asyncio.Transport
        """The connection itself. `transport` is None from the moment that aiohttp begins to close it."""
        self._front = front
        self._last_request = False
        self._serving = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.wire = cast(asyncio.Transport, transport)
        self.head_since = self._front.came(self)

    def data_received(self, data: bytes) -> None:
        if self.head_since is None and not self._serving:
            self.head_since = asyncio.get_running_loop().time()
        self.body_bytes += len(data)
        super().data_received(data)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._front.left(self)
        super().connection_lost(exc)

    def close(self) -> None:
        """Take no more requests: end now if none is being answered, else behind that answer."""
        self._last_request = True
        if not self._serving:  # aiohttp would also drop the rest of a body that is being received
            super().close()
            self.wire.close()

    def head_complete(self) -> None:
        """The handler calls this first."""
        self._serving = True
        self.head_since = None
        self._front.begins(self)

    @contextmanager
    def receiving_body(self) -> Iterator[None]:
        """While entered, a body is waited for."""
        self.body_since, self.body_bytes = asyncio.get_running_loop().time(), 0
        try:
            yield
        finally:
            self.body_since = None

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        result = await super().finish_response(request, resp, start_time)
        self._serving = False
        self._front.ends(self)
        if self._last_request:
            super().close()
        return result

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to what could not be parsed: says so, and repeats none of it."""
        self.head_since = None
        if request.writer.output_size > 0:
            raise ConnectionError("an answer is already under way")
        if status < 500:
            error: ProxyError = BadRequest("the request is not valid HTTP", status=status, code=AMBIGUOUS)
        else:
            logger.error("unhandled error", exc_info=exc)
            error = ProxyError("internal error; the proxy's log has the details")
        response = web.Response(status=status, body=OPENAI.error_body(error), content_type="application/json")
        response.headers["Server"] = SERVER
        response.force_close()
        return response


class FrontServer(web.Server):
    """Makes a `FrontConnection` for each client; its requests go to `handler`.

    A handler is cancelled at once when its client leaves. A client that needs over `head_timeout_s` seconds for the
    head of a request, or sends its body by drops, is disconnected (slowloris), and so is one that has not taken the
    rest of its answer `send_stall_s` seconds after we closed.
    """

    def __init__(
        self,
        handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        *,
        head_timeout_s: float,
        keepalive_timeout_s: float,
        send_stall_s: float,
    ) -> None:
        super().__init__(handler, handler_cancellation=True)
        self._options: dict[str, Any] = {
            "keepalive_timeout": keepalive_timeout_s,
            "max_line_size": MAX_HEADER_LINE,
            "max_field_size": MAX_HEADER_LINE,
            "max_headers": MAX_HEADERS,
            "auto_decompress": False,  # compressed bodies are refused; unpacking first would be the attack
            "lingering_time": 0,  # a refused upload is not read to its end
            "access_log": None,  # one line a request is written by the handler, which knows model and duration
        }
        self.clients: set[FrontConnection] = set()
        self.quiet = asyncio.Event()
        """Set while no request is being answered."""
        self.quiet.set()
        self.empty = asyncio.Event()
        """Set while no client is connected."""
        self.empty.set()
        self._busy: set[FrontConnection] = set()
        self._head_timeout_s = head_timeout_s
        self._send_stall_s = send_stall_s
        self._sweeper = Sweeper(min(1.0, head_timeout_s / 4), self._sweep)

    def came(self, client: FrontConnection) -> float:
        """A client has connected; returns the time."""
        self.clients.add(client)
        self.empty.clear()
        self._sweeper.wake()
        return asyncio.get_running_loop().time()

    def _sweep(self) -> bool:
        now = asyncio.get_running_loop().time()
        for client in list(self.clients):
            if self._too_slow(client, now):
                client.wire.abort()
        return bool(self.clients)

    def _too_slow(self, client: FrontConnection, now: float) -> bool:
        if client.wire.is_closing():
            client.closing_since = client.closing_since or now
            return now - client.closing_since >= self._send_stall_s
        if client.head_since is not None:
            return now - client.head_since >= self._head_timeout_s
        if client.body_since is None:
            return False
        spent_s = now - client.body_since
        return spent_s >= BODY_GRACE_S and client.body_bytes < spent_s * MIN_BODY_RATE

    def left(self, client: FrontConnection) -> None:
        self.clients.discard(client)
        self.ends(client)
        if not self.clients:
            self.empty.set()

    def begins(self, client: FrontConnection) -> None:
        """A request of `client` is being answered."""
        self._busy.add(client)
        self.quiet.clear()

    def ends(self, client: FrontConnection) -> None:
        """None of `client` is, any more."""
        self._busy.discard(client)
        if not self._busy:
            self.quiet.set()

    def __call__(self) -> web.RequestHandler:
        return FrontConnection(self, loop=asyncio.get_running_loop(), **self._options)


def check_request(http: web.BaseRequest) -> None:
    """Refuse a head that two HTTP parsers could understand differently.

    Raises: BadRequest 400, 431, 501 or 505; the caller closes the connection, as what follows on it is in doubt.
    """
    headers = http.headers
    if http.version not in (HttpVersion10, HttpVersion11):
        raise BadRequest("this HTTP version is not supported", status=505, code=AMBIGUOUS)
    raw = http.raw_headers
    if (
        len(raw) * MAX_HEADER_LINE > MAX_HEAD_BYTES
        and sum(len(name) + len(value) for name, value in raw) > MAX_HEAD_BYTES
    ):
        raise BadRequest("the request headers are too large", status=431, code=AMBIGUOUS)
    coding = headers.get("Transfer-Encoding")
    if coding is not None:
        if http.version == HttpVersion10 or "Content-Length" in headers:
            raise BadRequest("Transfer-Encoding is not allowed here", code=AMBIGUOUS)
        if coding.strip().lower() != "chunked":
            raise BadRequest("this transfer coding is not supported", status=501, code=AMBIGUOUS)
    _check_host(http)
    if "Upgrade" in headers and "upgrade" in headers.get("Connection", "").lower():
        raise BadRequest("protocol upgrades are not supported", code=AMBIGUOUS)


def _check_host(http: web.BaseRequest) -> None:
    hosts = http.headers.getall("Host", [])
    if len(hosts) != 1:
        if not hosts and http.version == HttpVersion10:
            return
        raise BadRequest("exactly one Host header is needed", code=AMBIGUOUS)
    if not _is_host(hosts[0]):
        raise BadRequest("the Host header is not valid", code=AMBIGUOUS)
    if not http.raw_path.startswith("/"):
        raise BadRequest("the request target must be a path", code=AMBIGUOUS)


@lru_cache(maxsize=256)
def _is_host(text: str) -> bool:
    match = _HOST.fullmatch(text)
    return match is not None and (match[1] is None or int(match[1]) <= 65535)
