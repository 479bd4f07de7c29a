"""The HTTP server: aiohttp's, hardened for long-running, exposed processes.

aiohttp 3.14 has no time limit for a request head, returns the invalid bytes (possibly an API key) in the body of a 400,
and loses what follows a request that offers another protocol. `FrontServer` and `FrontConnection` fix that by
overriding public methods. `check_request` rejects requests that aiohttp accepts but the next HTTP parser might
interpret differently.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, cast

from aiohttp import HttpVersion10, HttpVersion11, StreamReader, web
from aiohttp.http_exceptions import BadHttpMessage, LineTooLong
from aiohttp.streams import EMPTY_PAYLOAD

from llama_smart_proxy.backends.http.sweep import Sweeper
from llama_smart_proxy.proxy.dialects import Dialect
from llama_smart_proxy.proxy.errors import BadRequest, ProxyError
from llama_smart_proxy.proxy.http.headers import RECORD, SERVER
from llama_smart_proxy.proxy.http.hosts import is_host
from llama_smart_proxy.proxy.http.memory import Memory, allocator_trim
from llama_smart_proxy.proxy.http.offers import Offers, split_before_requests

logger = logging.getLogger(__name__)

MAX_HEADER_LINE = 16 * 1024
"""Bytes of a request line or of a header: browsers send the cookies of all servers on this machine to each of them."""
MAX_HEADERS = 100
MAX_HEAD_BYTES = 64 * 1024
IGNORED_UPGRADE = re.compile(r"h2c?(-\d+)?|HTTP/\d(\.\d)?|TLS/\d(\.\d)?", re.IGNORECASE)
"""Protocols that clients offer, but do not require: the answer comes by HTTP/1.1 (RFC 9110 7.8)."""
_START_BYTES = 256
"""Bytes of a request that are kept until it is answered, as an error must be in the API that its path belongs to."""
AMBIGUOUS = "invalid_http"
"""Error code of invalid or ambiguous HTTP."""
TOO_LARGE = "headers_too_large"
MIN_BODY_RATE = 1024
BODY_GRACE_S = 10.0
"""After so many seconds, the client of a body slower than `MIN_BODY_RATE` bytes per second is disconnected."""
BODY_STALL_S = 60.0
"""So is one of whose body nothing has come for so many seconds, although it may be sending what frames it."""
MOST_FRAMING = 16 * 2**20
"""So is one whose body is framed by more bytes than that, and than 8 times its own: chunks of a byte take 5."""
REST_BYTES = 512 * 2**20
REST_S = 30.0
REST_PAUSE_S = 5.0
"""How much of a request is discarded that was answered before it had arrived: so many bytes, for so many seconds, and
without a pause of so many. Closing at once would reset the connection, and destroy the answer before most clients read
it: they send the whole request first."""
LEAST_REST_BYTES = 16 * 2**20
"""Bytes of a rest whose end is not known, or too far; more if twice as many have been read."""


class FrontConnection(web.RequestHandler):
    """One client connection.

    Times are on the event loop's clock, None outside of their phase: `head_since` is when the wait for a request head
    began, `body_since` the wait for its body; `body_bytes` counts all bytes received since. `closing_since` is when
    closing began, which ends when the client has read the rest of its answer.
    """

    def __init__(self, front: FrontServer, **options: Any) -> None:
        super().__init__(front, **options)
        # aiohttp's parser goes on counting a request that was taken out before its body was complete (one at most), so
        # it may stop at one below its limit. The connection must pause then, too, as only that makes it go on.
        self._max_msg_queue_size -= 1
        self.head_since: float | None = None
        self.body_since: float | None = None
        self.body_bytes = 0
        self._body = EMPTY_PAYLOAD
        self._got = 0
        self._got_at = 0.0
        self.closing_since: float | None = None
        self.wire: asyncio.Transport
        """The connection's transport; the attribute `transport` is None as soon as aiohttp begins to close it."""
        self._front = front
        self._start = b""
        self._offers = Offers()
        self._unparsed: deque[bytes] = deque()
        self._last_request = False
        self._serving = False
        self._unreadable = False
        self._discarding = False
        self._discardable = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.wire = cast(asyncio.Transport, transport)
        self.head_since = self._front.connected(self)

    def data_received(self, data: bytes) -> None:
        if self._discarding:
            self._discardable -= len(data)
            if self._discardable < 0:
                self.wire.abort()
            return
        if self.head_since is None and not self._serving:
            self.head_since = asyncio.get_running_loop().time()
        if data and not self._start:
            self._start = data[:_START_BYTES]
            self._offers.found |= b"\r\n\r\n" not in data  # the header may come later
        self.body_bytes += len(data)
        if data and self._offers.look(data):
            self._unparsed.extend(split_before_requests(data, MAX_HEADER_LINE))
        if data and self._unparsed:
            self._parse_pieces()
        else:
            super().data_received(data)  # without data, aiohttp goes on with what it has, and then reads again
            self._parse_later()
        if self.body_since is not None:
            self._check_body()

    def resume_reading(self, resume_parser: bool = True) -> None:
        super().resume_reading(resume_parser)
        self._parse_later()

    def _parse_later(self) -> None:
        if self._unparsed:  # not now, as a body may be being read just here
            asyncio.get_running_loop().call_soon(self._parse_pieces)

    def _parse_pieces(self) -> None:
        """Pass on the pieces that wait, unless aiohttp takes none now: it would join them, and lose some again."""
        while self._unparsed and self.wire.is_reading():
            super().data_received(self._unparsed.popleft())

    def connection_lost(self, exc: BaseException | None) -> None:
        self._unparsed.clear()
        self._front.disconnected(self)
        super().connection_lost(exc)

    def close(self) -> None:
        """Accept no more requests: close now, or after the answer in progress."""
        self._last_request = True
        if not self._serving:  # aiohttp would also drop the rest of a body that is being received
            super().close()
            asyncio.get_running_loop().call_soon(self.wire.close)  # an answer may be about to be written

    def head_complete(self) -> None:
        """Called by the handler first."""
        self._serving = True
        self.head_since = None
        self._front.request_started(self)

    @contextmanager
    def receiving_body(self, body: StreamReader) -> Iterator[None]:
        """Within the context, the limits of time for a body apply."""
        self._body, self._got = body, body.total_bytes
        self.body_since = self._got_at = asyncio.get_running_loop().time()
        self.body_bytes = 0
        if self.wire.is_reading():
            self._offers.body_begins()
        try:
            self._check_body()
            yield
        finally:
            self.body_since, self._body = None, EMPTY_PAYLOAD

    def _check_body(self) -> None:
        """Fail a body that is not valid HTTP. aiohttp only queues an error behind the request: nothing else can."""
        if self._messages and not self._body.is_eof():
            self._unreadable = True
            self._body.set_exception(BadRequest("the request body is not valid HTTP", code=AMBIGUOUS))

    def too_slow(self, now: float) -> bool:
        """Whether the body that is being received comes too slowly, or nothing but what frames it."""
        got = self._body.total_bytes
        if got > self._got or not self.wire.is_reading():
            self._got, self._got_at = got, now
        spent_s = now - (self.body_since or now)
        too_slow = spent_s >= BODY_GRACE_S and got < spent_s * MIN_BODY_RATE
        return too_slow or now - self._got_at >= BODY_STALL_S or self.body_bytes > max(MOST_FRAMING, 8 * got)

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        result = await super().finish_response(request, resp, start_time)
        self._serving = False
        self._start = b""
        self._front.request_ended(self)
        if self._last_request:
            super().close()
        elif self._unreadable or not request.content.is_eof():
            await self._discard_rest(request)
        return result

    async def _discard_rest(self, request: web.BaseRequest) -> None:
        """Send no more, and discard what arrives, until the client closes the connection or a limit is reached."""
        read = request.content.total_bytes
        left = 0 if self._unreadable else request.content_length - read if request.content_length else REST_BYTES + 1
        self._discarding = True
        self._discardable = before = REST_BYTES if left <= REST_BYTES else max(LEAST_REST_BYTES, 2 * read)
        self._unparsed.clear()
        with suppress(OSError, RuntimeError):  # the connection is closed
            self.wire.write_eof()
            self.wire.resume_reading()
        ends = asyncio.get_running_loop().time() + REST_S
        while asyncio.get_running_loop().time() < ends:
            await asyncio.sleep(REST_PAUSE_S)  # cancelled when the connection is closed
            if self._discardable == before:
                break
            before = self._discardable

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The response to a request that could not be parsed; contains none of its bytes."""
        self.head_since = None
        self._unreadable = True
        if request.writer.output_size > 0:
            raise ConnectionError("a response has already been started")
        named = request[RECORD].request_id if RECORD in request else secrets.token_hex(8)
        if status < 500:
            error: ProxyError = _invalid(exc, status)
            logger.info("a request that is not accepted as HTTP: %d %s", error.status, named)
        else:
            logger.error("unhandled error", exc_info=exc)
            error = ProxyError("internal error; the proxy's log has the details")
        dialect = self._front.dialect_of(self._path)
        response = web.Response(
            status=error.status, body=dialect.error_body(error), content_type="application/json",
            headers={"Server": SERVER, "X-Request-Id": named, **dict.fromkeys(dialect.id_headers, named)},
        )  # fmt: skip
        response.force_close()
        return response

    @property
    def _path(self) -> str:
        """The path of the current request; empty if that is not known."""
        _, _, target = self._start.lstrip(b"\r\n").partition(b" ")
        return target.partition(b" ")[0].partition(b"?")[0].decode("ascii", "replace")


def _invalid(exc: BaseException | None, status: int) -> BadRequest:
    """The error for a request that the parser refused."""
    if isinstance(exc, LineTooLong):
        return _head_too_large(f"a line of them may have {MAX_HEADER_LINE // 1024} KiB")
    if isinstance(exc, BadHttpMessage) and exc.message.startswith("Too many headers"):
        return _head_too_large(f"there may be {MAX_HEADERS} of them")
    return BadRequest("the request is not valid HTTP", status=status, code=AMBIGUOUS)


def _head_too_large(limit: str) -> BadRequest:
    return BadRequest(f"the request headers are too large: {limit}", status=431, code=TOO_LARGE)


class FrontServer(web.Server):
    """Creates a `FrontConnection` for each client; requests are passed to `handler`.

    A handler is cancelled when its client disconnects. A client is disconnected if it takes over `head_timeout_s`
    seconds to send a request head, sends a body too slowly (slowloris), or has not read the rest of its answer
    `send_stall_s` seconds after the connection was closed here.
    """

    def __init__(
        self,
        handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        *,
        head_timeout_s: float,
        keepalive_timeout_s: float,
        send_stall_s: float,
        dialect_of: Callable[[str], Dialect],
    ) -> None:
        super().__init__(handler, handler_cancellation=True)
        self.dialect_of = dialect_of
        self._options: dict[str, Any] = {
            "max_line_size": MAX_HEADER_LINE,
            "max_field_size": MAX_HEADER_LINE,
            "max_headers": MAX_HEADERS,
            "auto_decompress": False,  # `proxy.http.body` decompresses, within limits
            "lingering_time": 0,  # see `REST_BYTES`
            "access_log": None,  # the handler logs requests, with model and duration
        }
        self.clients: set[FrontConnection] = set()
        self.quiet = asyncio.Event()
        """Set while no request is being answered."""
        self.quiet.set()
        self.empty = asyncio.Event()
        """Set while no client is connected."""
        self.empty.set()
        self._busy: set[FrontConnection] = set()
        self._memory = Memory(allocator_trim())
        self._sweeper = Sweeper(1.0, self._sweep)
        self.limit(head_timeout_s, keepalive_timeout_s, send_stall_s)

    def limit(self, head_timeout_s: float, keepalive_timeout_s: float, send_stall_s: float) -> None:
        """Set the time limits: that of idle connections for new ones."""
        self._options["keepalive_timeout"] = keepalive_timeout_s
        self._head_timeout_s = head_timeout_s
        self._send_stall_s = send_stall_s
        self._sweeper.stop()
        self._sweeper = Sweeper(min(1.0, head_timeout_s / 4), self._sweep)
        if self.clients:
            self._sweeper.wake()

    def connected(self, client: FrontConnection) -> float:
        """Register a client. Returns the current time of the loop."""
        self.clients.add(client)
        self.empty.clear()
        self._sweeper.wake()
        return asyncio.get_running_loop().time()

    def _sweep(self) -> bool:
        now = asyncio.get_running_loop().time()
        for client in list(self.clients):
            if self._too_slow(client, now):
                client.wire.abort()
        self._memory.check(idle=not self._busy)
        return bool(self.clients)

    def _too_slow(self, client: FrontConnection, now: float) -> bool:
        if client.wire.is_closing():
            client.closing_since = client.closing_since or now
            return now - client.closing_since >= self._send_stall_s
        if client.head_since is not None:
            return now - client.head_since >= self._head_timeout_s
        return client.body_since is not None and client.too_slow(now)

    def disconnected(self, client: FrontConnection) -> None:
        """Unregister a client."""
        self.clients.discard(client)
        self.request_ended(client)
        if not self.clients:
            self.empty.set()

    def request_started(self, client: FrontConnection) -> None:
        """Mark `client` as busy."""
        self._busy.add(client)
        self.quiet.clear()

    def request_ended(self, client: FrontConnection) -> None:
        """Mark `client` as idle."""
        self._busy.discard(client)
        if not self._busy:
            self.quiet.set()

    def __call__(self) -> web.RequestHandler:
        return FrontConnection(self, loop=asyncio.get_running_loop(), **self._options)


def check_request(http: web.BaseRequest) -> None:
    """Reject a head that two HTTP parsers could interpret differently.

    Raises: BadRequest 400, 431, 501 or 505; the caller must close the connection, whose further input is unreliable.
    """
    headers = http.headers
    if http.version not in (HttpVersion10, HttpVersion11):
        raise BadRequest("this HTTP version is not supported", status=505, code=AMBIGUOUS)
    raw = http.raw_headers
    if (
        len(raw) * MAX_HEADER_LINE > MAX_HEAD_BYTES
        and sum(len(name) + len(value) for name, value in raw) > MAX_HEAD_BYTES
    ):
        raise _head_too_large(f"together they may have {MAX_HEAD_BYTES // 1024} KiB")
    coding = headers.get("Transfer-Encoding")
    if coding is not None:
        if http.version == HttpVersion10 or "Content-Length" in headers:
            raise BadRequest("Transfer-Encoding is not allowed here", code=AMBIGUOUS)
        if coding.strip().lower() != "chunked":
            raise BadRequest("this transfer coding is not supported", status=501, code=AMBIGUOUS)
    _check_host(http)
    if "Upgrade" in headers and "upgrade" in ",".join(headers.getall("Connection", ())).lower():
        _check_upgrade(",".join(headers.getall("Upgrade")))


def _check_upgrade(offers: str) -> None:
    """Reject an offer of a protocol that its client may require, such as a web socket."""
    if not all(IGNORED_UPGRADE.fullmatch(offer.strip()) for offer in offers.split(",") if offer.strip()):
        raise BadRequest("protocol upgrades are not supported", code=AMBIGUOUS)


def _check_host(http: web.BaseRequest) -> None:
    hosts = http.headers.getall("Host", [])
    if len(hosts) != 1:
        if not hosts and http.version == HttpVersion10:
            return
        raise BadRequest("exactly one Host header is required", code=AMBIGUOUS)
    if not is_host(hosts[0]):
        raise BadRequest("the Host header is not valid", code=AMBIGUOUS)
    if not http.raw_path.startswith("/"):
        raise BadRequest("the request target must be a path", code=AMBIGUOUS)
