"""The guarded client: one GET, within limits of time, size, type and redirects."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http import HTTPStatus

import aiohttp
from aiohttp.abc import AbstractResolver
from yarl import URL

from llama_smart_proxy.proxy import __version__
from llama_smart_proxy.proxy.fetching.connector import Connector
from llama_smart_proxy.proxy.fetching.guard import NOT_PUBLIC, PORTS, AddressRefused, Guard, Private, Refused, parsed
from llama_smart_proxy.proxy.fetching.names import Names

PRODUCT = "llama-smart-proxy"
USER_AGENT = f"{PRODUCT}/{__version__}"
MEDIA_TYPES = frozenset(
    {
        *("text/html", "application/xhtml+xml", "text/plain", "text/markdown", "text/x-markdown"),
        *("application/json", "application/pdf"),
    }
)
"""What pieces of text can be made from."""
_MOVED = (301, 302, 303, 307, 308)
_MAX_RETRY_AFTER_S = 3600


class FetchError(Exception):
    """A page could not be fetched; the message is the reason, for users. `status` is that of its server, if it has
    sent one, and `retry_after_s` how long it asks to be left alone. `refused`: no server was asked."""

    def __init__(
        self, message: str, *, status: int | None = None, retry_after_s: int | None = None, refused: bool = False
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s
        self.refused = refused


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one fetch: bytes before and after decompression, seconds in all and between two reads, redirects."""

    max_bytes: int = 2 * 2**20
    total_s: float = 10.0
    read_s: float = 10.0
    redirects: int = 3


@dataclass(frozen=True, slots=True)
class Page:
    """What a server has sent: `url` after redirects, `media_type` in lower case, `charset` as declared or empty."""

    url: str
    media_type: str
    charset: str
    data: bytes


class Fetcher:
    """Fetches pages. Each connection is opened to a public address, whichever way the URL or a redirect led there.

    `allow_private` lists exceptions: names and addresses of hosts, which may then have any port, and networks. A
    redirect leads from one host that is not public to another, but never there from a public one. `ports` are those of
    public hosts; None is all.

    Sends no cookies, no credentials, no `Referer`, and uses no proxy of the environment, which would connect in its
    place. A connection serves one request.
    """

    def __init__(
        self,
        *,
        allow_private: Iterable[str] = (),
        ports: Collection[int] | None = PORTS,
        resolver: AbstractResolver | None = None,
    ) -> None:
        self._private = Private(allow_private)
        self._ports = ports
        self._resolver = resolver
        self._sessions: dict[bool, aiohttp.ClientSession] = {}

    async def get(
        self,
        url: str,
        *,
        accept: Collection[str] = MEDIA_TYPES,
        limits: Limits = Limits(),
        before: Callable[[URL], Awaitable[None]] | None = None,
    ) -> Page:
        """The page at `url`, whose media type must be one of `accept`. `before` is awaited before each request, those
        after redirects included, and may raise. Raises: FetchError."""
        try:
            async with asyncio.timeout(limits.total_s):
                return await self._follow(url, accept, limits, before)
        except TimeoutError:
            raise FetchError(f"it was not received within {limits.total_s:g} seconds") from None
        except Refused as exc:
            raise FetchError(str(exc), refused=True) from None
        except aiohttp.ClientConnectorError as exc:
            refused = isinstance(exc.os_error, AddressRefused)
            raise FetchError(NOT_PUBLIC if refused else "its server cannot be reached", refused=refused) from None
        except (aiohttp.ClientError, aiohttp.EofStream, OSError, ValueError) as exc:
            raise FetchError(f"its server did not send a valid answer ({type(exc).__name__})") from None

    async def _follow(
        self, text: str, accept: Collection[str], limits: Limits, before: Callable[[URL], Awaitable[None]] | None
    ) -> Page:
        url, private = parsed(text), True
        for _ in range(limits.redirects + 1):
            private = private and self._private.names_host(url)
            if not private and self._ports is not None and url.port not in self._ports:
                permitted = " and ".join(map(str, sorted(self._ports)))
                raise Refused(f"port {url.port} is not fetched from: pages come from ports {permitted}")
            if before is not None:
                await before(url)
            moved = await self._ask(url, private, accept, limits)
            if isinstance(moved, Page):
                return moved
            url = following(url, moved)
        raise FetchError(f"it redirects more than {limits.redirects} times")

    async def _ask(self, url: URL, private: bool, accept: Collection[str], limits: Limits) -> Page | str:
        """The page, or where it has moved."""
        headers = {"Accept": ", ".join(sorted(accept)), "User-Agent": USER_AGENT}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=limits.read_s, sock_read=limits.read_s)
        session = self._session(private)
        async with session.get(url, headers=headers, allow_redirects=False, timeout=timeout) as answer:
            if answer.status in _MOVED and "Location" in answer.headers:
                return answer.headers["Location"]
            if answer.status != HTTPStatus.OK:
                asked_s = _retry_after_s(answer.headers.get("Retry-After", ""))
                raise FetchError(f"its server answered {answer.status}", status=answer.status, retry_after_s=asked_s)
            media_type = answer.content_type.lower() if "Content-Type" in answer.headers else ""
            if media_type not in accept:
                raise FetchError(f"its type {media_type[:100] or '(none)'} is not read", status=answer.status)
            data = await _limited(answer, limits.max_bytes)
            return Page(str(url), media_type, (answer.charset or "").lower(), data)

    def _session(self, private: bool) -> aiohttp.ClientSession:
        """The one for this kind of host. It is made when it is first used: it belongs to the event loop."""
        if private not in self._sessions:
            guard = Guard(self._private.networks, open=private)
            connector = Connector(guard, self._resolver or Names())
            self._sessions[private] = aiohttp.ClientSession(
                connector=connector, cookie_jar=aiohttp.DummyCookieJar(), trust_env=False
            )
        return self._sessions[private]

    async def close(self) -> None:
        """Close all connections. Fetches that have not ended fail."""
        for session in self._sessions.values():
            await session.close()
        self._sessions.clear()


def following(url: URL, location: str) -> URL:
    """Where a redirect leads. Raises: Refused."""
    try:
        target = parsed(str(url.join(URL(location))))
    except Refused:
        raise
    except ValueError:
        raise Refused("it redirects to a URL that is not valid") from None
    if url.scheme == "https" and target.scheme == "http":
        raise Refused("it redirects from https to http")
    return target


async def _limited(answer: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """The decompressed body. aiohttp decompresses no more than a piece at a time, and then waits for its reader.

    Raises: FetchError, as soon as it is larger.
    """
    if (answer.content_length or 0) > max_bytes:
        raise FetchError(_too_large(max_bytes))
    data = bytearray()
    async for piece in answer.content.iter_any():
        data += piece
        if len(data) > max_bytes:
            raise FetchError(_too_large(max_bytes))
    return bytes(data)


def _too_large(max_bytes: int) -> str:
    return f"it is larger than {max_bytes / 2**20:g} MiB"


def _retry_after_s(value: str) -> int | None:
    """The seconds of `Retry-After`, which may also be a date; at most an hour."""
    if value.strip().isdecimal() and len(value) < 10:
        return min(int(value), _MAX_RETRY_AFTER_S)
    try:
        return max(0, min(int(parsedate_to_datetime(value).timestamp() - time.time()), _MAX_RETRY_AFTER_S))
    except (ValueError, OverflowError):
        return None
