"""One search of the web: an engine that works, its pages, and their best pieces."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from llama_smart_proxy import Context, FetchError, Passage, ProxyError, TimedCache
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
GRADING_SHARE = 0.2
"""What grading may take."""
NONE_CONFIGURED = "no web search is configured: set searxng_host, or web: ddgs, in the options of the agent"
OF_CACHE = ("searxng_host", "searxng_safesearch", "searxng_language", "searxng_categories")
"""Options that change what a search finds."""


@dataclass(frozen=True, slots=True)
class _Known:
    """An engine, and whether it works."""

    engine: Engine
    breaker: Breaker


class Web:
    """Searches the web. One object serves all requests concurrently, each with the options of its own context: those of
    its model and of its command may differ from `options`, which are the agent's own. They may name another SearXNG,
    but no ddgs if the agent's own do not, and nothing if these are `web: off`."""

    def __init__(self, options: WebOptions, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._own = options
        self._clock = clock
        self._known: dict[str, _Known] = {}
        """By the URL of a SearXNG, and `ddgs`."""
        self._searches: TimedCache[list[Result]] = TimedCache(options.cache_ttl, CACHE_BYTES, clock=clock)

    def engines(self, options: WebOptions) -> list[str]:
        """The names of the engines that a request with these options may use, in order; empty for none."""
        if self._own.web_is_off:
            return []
        return [name for name in options.engines if name != "ddgs" or "ddgs" in self._own.web]

    async def search(self, query: str, ctx: Context) -> list[Passage]:
        """The best passages for `query`, of the pages that were found, or of their snippets where a page cannot be read
        in time. Takes `web_timeout_s` at most. Raises: WebUnavailable."""
        options: WebOptions = ctx.config
        query = " ".join(query.split())[:MAX_QUERY]
        ends_s = time.monotonic() + options.web_timeout_s
        results = _permitted(await self._results(query, options), options)
        urls = [result.url for result in results[: options.web_pages]]
        grading_s = options.web_timeout_s * GRADING_SHARE
        pages = await _pages(urls, ends_s - grading_s - time.monotonic(), ctx)
        passages = [passage for result in results for passage in _passages(result, pages.get(result.url))]
        return (await graded(query, passages, ctx, ends_s - time.monotonic()))[: options.web_passages]

    async def close(self) -> None:
        """Close the connections of all engines."""
        for known in self._known.values():
            await known.engine.close()

    async def _results(self, query: str, options: WebOptions) -> list[Result]:
        """What the first engine that finds anything has found. Raises: WebUnavailable, if none works."""
        names = self.engines(options)
        if not names:
            raise WebUnavailable(NONE_CONFIGURED)
        key = (query.casefold(), *names, *(getattr(options, name) for name in OF_CACHE))
        if (remembered := self._searches.get(key)) is not None:
            return remembered
        problems = []
        timeout_s = options.web_timeout_s * ENGINE_SHARE / len(names)
        for name in names:
            try:
                found = await self._asked(name, query, options, timeout_s)
            except EngineFailed as exc:
                problems.append(str(exc))
                logger.warning("web search: %s", str(exc))  # it contains nothing of the query
                continue
            if found:
                size = sum(len(result.url) + len(result.title) + len(result.snippet) + 500 for result in found)
                self._searches.put(key, found, 4 * size)
                return found
        if len(problems) == len(names):
            raise WebUnavailable(f"the web could not be searched: {'; '.join(problems)}")
        return []

    async def _asked(self, name: str, query: str, options: WebOptions, timeout_s: float) -> list[Result]:
        known = self._engine(name, options)
        ticket = known.breaker.begin(self._clock())
        if ticket is None:
            wait_s = known.breaker.retry_s(self._clock())
            raise EngineFailed(f"{name} has failed repeatedly and is tried again in {wait_s:.0f} seconds")
        try:
            found = await known.engine.search(query, options, timeout_s)
        except EngineFailed as exc:
            known.breaker.failed(ticket, self._clock(), exc.rest_s)
            raise
        except BaseException:
            known.breaker.abandoned(ticket, self._clock())
            raise
        known.breaker.succeeded(ticket, self._clock())
        return found

    def _engine(self, name: str, options: WebOptions) -> _Known:
        key = options.searxng_host if name == "searxng" else name
        if key not in self._known:
            own = self._own
            breaker = Breaker(
                own.circuit_breaker_failures, own.circuit_breaker_recovery_s, own.circuit_breaker_successes
            )
            self._known[key] = _Known(SearXNG(key) if name == "searxng" else Ddgs(), breaker)
        return self._known[key]


def _permitted(results: list[Result], options: WebOptions) -> list[Result]:
    allow, deny = options.web_allow_domains, options.web_deny_domains
    return [result for result in results if not _below(result.url, deny) and (not allow or _below(result.url, allow))]


async def _pages(urls: list[str], limit_s: float, ctx: Context) -> dict[str, list[Passage]]:
    """The passages of those pages that could be read in time, by URL."""
    read: dict[str, list[Passage]] = {}

    async def one(url: str) -> None:
        try:
            async with asyncio.timeout(ctx.config.web_page_timeout_s):
                read[url] = await ctx.page(url)
        except (FetchError, ProxyError, TimeoutError) as exc:
            logger.info("a page that was found is not read: %s", str(exc) or "it took too long")

    try:
        async with asyncio.timeout(limit_s):
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
