"""One search of the web: an engine that works, its pages, and their best pieces."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace

from llama_smart_proxy import Context, FetchError, Passage, TimedCache
from llama_smart_proxy.agents.rag.web.breaker import Breaker
from llama_smart_proxy.agents.rag.web.engines import (
    Ddgs,
    Engine,
    EngineFailed,
    Result,
    SearXNG,
    WebUnavailable,
    host_of,
)
from llama_smart_proxy.agents.rag.web.options import WebOptions
from llama_smart_proxy.agents.rag.web.relevance import graded

logger = logging.getLogger(__name__)

MAX_QUERY = 500
"""Characters; engines refuse or cut longer ones."""
CACHE_BYTES = 4 * 2**20
ENGINE_SHARE = 0.5
"""Of the time for a search, what its engines may take; the rest is for the pages."""
GRADING_S = 3.0
"""Seconds at least for grading what was found."""
NONE_CONFIGURED = "no web search is configured: set searxng_host, or web: ddgs, in the options of the agent"
_ENGINES: dict[str, Callable[[WebOptions], Engine]] = {"searxng": SearXNG, "ddgs": Ddgs}


class Web:
    """Searches the web with the configured engines. One object serves all requests concurrently."""

    def __init__(self, options: WebOptions, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.options = options
        self._clock = clock
        self._engines: dict[str, Engine] = {name: _ENGINES[name](options) for name in options.engines}
        self.breakers = {
            name: Breaker(
                options.circuit_breaker_failures, options.circuit_breaker_recovery_s, options.circuit_breaker_successes
            )
            for name in self._engines
        }
        self._searches: TimedCache[list[Result]] = TimedCache(options.cache_ttl, CACHE_BYTES, clock=clock)

    @property
    def available(self) -> bool:
        """Whether any engine is configured."""
        return bool(self._engines)

    async def search(self, query: str, ctx: Context) -> list[Passage]:
        """The best passages for `query`, of the pages that were found, or of their snippets where a page cannot be read
        in time. Takes `web_timeout_s` at most, and a moment to grade them. Raises: WebUnavailable."""
        options, query = self.options, " ".join(query.split())[:MAX_QUERY]
        ends_s = time.monotonic() + options.web_timeout_s
        results = self._permitted(await self._results(query))
        pages = await self._pages([result.url for result in results[: options.web_pages]], ends_s, ctx)
        passages = [passage for result in results for passage in _passages(result, pages.get(result.url))]
        left_s = max(ends_s - time.monotonic(), GRADING_S)
        return (await graded(query, passages, ctx, left_s))[: options.web_passages]

    async def close(self) -> None:
        """Close the connections of all engines."""
        for engine in self._engines.values():
            await engine.close()

    # -- engines -------------------------------------------------------------------------------------------------------

    async def _results(self, query: str) -> list[Result]:
        """What the first engine that finds anything has found. Raises: WebUnavailable, if none works."""
        if not self._engines:
            raise WebUnavailable(NONE_CONFIGURED)
        known = self._searches.get(query.casefold())
        if known is not None:
            return known
        problems = []
        timeout_s = self.options.web_timeout_s * ENGINE_SHARE / len(self._engines)
        for name, engine in self._engines.items():
            try:
                found = await self._asked(name, engine, query, timeout_s)
            except EngineFailed as exc:
                problems.append(str(exc))
                logger.warning("web search: %s", str(exc))  # it contains nothing of the query
                continue
            if found:
                size = sum(len(result.url) + len(result.title) + len(result.snippet) + 500 for result in found)
                self._searches.put(query.casefold(), found, 4 * size)
                return found
        if len(problems) == len(self._engines):
            raise WebUnavailable(f"the web could not be searched: {'; '.join(problems)}")
        return []

    async def _asked(self, name: str, engine: Engine, query: str, timeout_s: float) -> list[Result]:
        breaker = self.breakers[name]
        ticket = breaker.begin(self._clock())
        if ticket is None:
            wait_s = breaker.retry_s(self._clock())
            raise EngineFailed(f"{name} has failed repeatedly and is tried again in {wait_s:.0f} seconds")
        try:
            found = await engine.search(query, timeout_s)
        except EngineFailed as exc:
            breaker.failed(ticket, self._clock(), exc.rest_s)
            raise
        except BaseException:
            breaker.abandoned(ticket, self._clock())
            raise
        breaker.succeeded(ticket, self._clock())
        return found

    # -- pages ---------------------------------------------------------------------------------------------------------

    def _permitted(self, results: list[Result]) -> list[Result]:
        allow, deny = self.options.web_allow_domains, self.options.web_deny_domains
        return [
            result for result in results if not _below(result.url, deny) and (not allow or _below(result.url, allow))
        ]

    async def _pages(self, urls: list[str], ends_s: float, ctx: Context) -> dict[str, list[Passage]]:
        """The passages of those pages that could be read in time, by URL."""
        read: dict[str, list[Passage]] = {}

        async def one(url: str) -> None:
            try:
                async with asyncio.timeout(self.options.web_page_timeout_s):
                    read[url] = await ctx.page(url)
            except (FetchError, TimeoutError) as exc:
                logger.info("a page that was found is not read: %s", str(exc) or "it took too long")

        try:
            async with asyncio.timeout(ends_s - time.monotonic()):
                for result in await asyncio.gather(*map(one, urls), return_exceptions=True):
                    if isinstance(result, BaseException):
                        raise result
        except TimeoutError:
            logger.info("%d of %d pages were read in time", len(read), len(urls))
        return read


def _passages(result: Result, pieces: list[Passage] | None) -> list[Passage]:
    """Those of a page, or its snippet."""
    if pieces:
        return [replace(piece, document=result.title, url=piece.url or result.url) for piece in pieces]
    return [Passage(result.snippet, result.title, url=result.url)] if result.snippet else []


def _below(url: str, domains: list[str]) -> bool:
    """Whether its host is one of the domains, or below one."""
    host = host_of(url)
    return any(host == domain or host.endswith(f".{domain}") for domain in domains)
