"""Pages that a web search has found, as passages: fetched politely, and read by the process that reads documents."""

from __future__ import annotations

import asyncio
import re

from yarl import URL

from llama_smart_proxy.proxy.chat.passage import Passage
from llama_smart_proxy.proxy.fetching.cache import TimedCache
from llama_smart_proxy.proxy.fetching.fetcher import Fetcher, FetchError, Page
from llama_smart_proxy.proxy.fetching.manners import Manners
from llama_smart_proxy.proxy.knowledge.base import Reader, Unreadable

TTL_S = 900.0
CACHE_BYTES = 16 * 2**20
MAX_PASSAGES = 200
"""Of one page: what comes after them is not used."""
READ_S = 8.0
"""Seconds for reading a page, or waiting for others to be read."""
_CHARSET = re.compile(
    r"(us-ascii|utf-(8|16(le|be)?)|iso-8859-[0-9]{1,2}|windows-125[0-9]|koi8-[ru]|shift_jis|euc-(jp|kr)|gb(k|2312|18030)|big5)"
)
"""Those that are decoded; others of Python's are slow, or no charsets."""


class Pages:
    """Reads pages by URL. They come from a web search, so no address that is not public is connected to, robots.txt is
    respected, and a host gets one request at a time. What was read is remembered for a while."""

    def __init__(self, fetcher: Fetcher, reader: Reader, *, pause_s: float = 0.5) -> None:
        self._fetcher = fetcher
        self._reader = reader
        self._manners = Manners(fetcher, pause_s=pause_s)
        self._read: TimedCache[list[Passage]] = TimedCache(TTL_S, CACHE_BYTES)

    async def passages(self, url: str) -> list[Passage]:
        """The passages of the page at `url`, in order. Raises: FetchError."""
        known = self._read.get(url)
        if known is None:
            page = await self._manners.get(url)
            known = await self._passages(page)
            self._read.put(url, known, sum(4 * len(passage.text) + 500 for passage in known))
        return known

    async def close(self) -> None:
        """Close all connections, and end the process that reads."""
        await self._fetcher.close()
        await self._reader.close()

    async def _passages(self, page: Page) -> list[Passage]:
        name = f"Page ({URL(page.url).host})"  # no suffix, which would count before the media type
        try:
            async with asyncio.timeout(READ_S):
                pieces = await self._reader.page(_content(page), name, page.media_type)
        except TimeoutError:
            raise FetchError(f"it was not read within {READ_S:g} seconds") from None
        except Unreadable as exc:
            raise FetchError(f"it cannot be read ({exc})") from None
        return [
            Passage(piece.text, page.url, heading=piece.heading, number=number, url=page.url)
            for number, piece in enumerate(pieces[:MAX_PASSAGES])
        ]


def _content(page: Page) -> bytes:
    """In UTF-8, if its header declares a charset: that takes precedence over what the page itself says."""
    if page.media_type == "application/pdf" or not _CHARSET.fullmatch(page.charset):
        return page.data
    try:
        return page.data.decode(page.charset, "replace").encode("utf-8-sig", "replace")
    except LookupError:  # an ISO 8859 that does not exist
        return page.data
