"""How pages of strangers are fetched: by the rules of their robots.txt, one after the other, with a pause."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.robotparser import RobotFileParser

from yarl import URL

from llama_smart_proxy.backends.threads import run_in_thread
from llama_smart_proxy.proxy.fetching.cache import TimedCache
from llama_smart_proxy.proxy.fetching.fetcher import PRODUCT, Fetcher, FetchError, Limits, Page
from llama_smart_proxy.proxy.fetching.guard import Refused, parsed

ROBOTS_TTL_S = 3600.0
ROBOTS_BYTES = 8 * 2**20
ROBOTS_LIMITS = Limits(max_bytes=512 * 1024, total_s=5.0)
"""Source: RFC 9309 2.5, which requires that the first 500 KiB are read."""
MAX_DELAY_S = 5.0
"""Of `Crawl-delay`. A host that asks for more is not fetched from while a chat waits."""
DEFAULT_REST_S = 60
"""For a host that answers 429 or 503 without `Retry-After`."""
MOST_HOSTS = 1000
_BUSY = (429, 503)
NOTHING = "User-agent: *\nDisallow: /"


@dataclass(slots=True)
class _Host:
    """What is known of a host: whose turn it is, and when the next request may be made."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    next_s: float = 0.0
    rests_until_s: float = 0.0
    users: int = 0


class Manners:
    """Fetches pages by the rules of their servers: robots.txt, one request at a time for each host with a pause, and
    none while it has asked to be left alone (`Retry-After`)."""

    def __init__(self, fetcher: Fetcher, *, pause_s: float = 0.5) -> None:
        self._fetcher = fetcher
        self._pause_s = pause_s
        self._hosts: dict[str, _Host] = {}
        self._robots: TimedCache[RobotFileParser] = TimedCache(ROBOTS_TTL_S, ROBOTS_BYTES)

    async def get(self, text: str) -> Page:
        """The page. Raises: FetchError."""
        try:
            url = parsed(text)
        except Refused as exc:
            raise FetchError(str(exc), refused=True) from None
        async with self._turn(url.raw_authority.lower()) as host:
            pause_s = self._pause_s
            try:
                return await self._fetcher.get(str(url), before=self._permit)
            except FetchError as exc:
                pause_s = 0.0 if exc.refused else pause_s
                if exc.status in _BUSY:
                    rest_s = DEFAULT_REST_S if exc.retry_after_s is None else exc.retry_after_s
                    host.rests_until_s = time.monotonic() + rest_s
                raise
            finally:
                host.next_s = time.monotonic() + pause_s

    @asynccontextmanager
    async def _turn(self, name: str) -> AsyncIterator[_Host]:
        host = self._hosts.setdefault(name, _Host())
        host.users += 1
        try:
            async with host.lock:
                now = time.monotonic()
                if now < host.rests_until_s:
                    rest_s = host.rests_until_s - now
                    raise FetchError(f"its server has asked for no request for {rest_s:.0f} seconds", refused=True)
                await asyncio.sleep(max(0.0, host.next_s - now))
                yield host
        finally:
            host.users -= 1
            self._forget_some()

    def _forget_some(self) -> None:
        if len(self._hosts) > MOST_HOSTS:
            now = time.monotonic()
            idle = [name for name, host in self._hosts.items() if not host.users and host.rests_until_s < now]
            for name in idle[: MOST_HOSTS // 2]:
                del self._hosts[name]

    # -- robots.txt ----------------------------------------------------------------------------------------------------

    async def _permit(self, url: URL) -> None:
        """Return if the rules of its server permit to fetch it; also where a redirect leads. Raises: FetchError."""
        origin = url.origin()
        rules = self._robots.get(origin)
        if rules is None:
            rules, size = await self._rules(origin)
            self._robots.put(origin, rules, size)
        if not await run_in_thread(lambda: rules.can_fetch(PRODUCT, str(url))):
            raise FetchError("its robots.txt does not permit it", refused=True)
        delay_s = float(rules.crawl_delay(PRODUCT) or 0)
        if delay_s > MAX_DELAY_S:
            raise FetchError(f"its robots.txt requires {delay_s:g} seconds between requests", refused=True)

    async def _rules(self, origin: URL) -> tuple[RobotFileParser, int]:
        """The rules, and their size. Without a file all is permitted; while it cannot be had, nothing is.

        Source: RFC 9309 2.3.1.
        """
        rules = RobotFileParser()
        try:
            page = await self._fetcher.get(str(origin / "robots.txt"), limits=ROBOTS_LIMITS)
        except FetchError as exc:
            if exc.refused:
                raise
            text = NOTHING if exc.status is None or exc.status in _BUSY or exc.status >= 500 else ""
        else:
            text = page.data.decode("utf-8", "replace") if page.media_type == "text/plain" else ""
        await run_in_thread(lambda: rules.parse(text.splitlines()))  # half a second for the longest
        return rules, 1000 + 10 * len(text)
