"""The search engines: each finds pages for a query, with their titles and snippets."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from yarl import URL

from llama_smart_proxy import Fetcher, FetchError
from llama_smart_proxy.agents.rag.web.options import WebOptions

MOST_RESULTS = 20
MOST_LISTED = 200
"""Of what an engine sends, so much is looked at."""
MAX_SNIPPET = 1000
MAX_TITLE = 300
MAX_THREADS = 4
"""Searches of ddgs at one time, including those that nothing waits for any more."""


class EngineFailed(Exception):
    """An engine has found nothing because it does not work; the message is the reason, for operators and users."""

    def __init__(self, message: str, *, rest_s: float | None = None) -> None:
        super().__init__(message)
        self.rest_s = rest_s


@dataclass(frozen=True, slots=True)
class Result:
    """A page that an engine has found."""

    url: str
    title: str
    snippet: str


class Engine(Protocol):
    """A search engine."""

    async def search(self, query: str, options: WebOptions, timeout_s: float) -> list[Result]:
        """The pages for `query`, best first. Raises: EngineFailed."""

    async def close(self) -> None:
        """Release what it holds."""


class SearXNG:
    """A SearXNG that the operator runs, so its address may be a private one.

    Source: docs.searxng.org/dev/search_api.html; 403 unless `json` is listed in settings.yml.
    """

    def __init__(self, host: str) -> None:
        self._url = URL(host) / "search"
        self._fetcher = Fetcher(allow_private=[self._url.host or ""])

    async def search(self, query: str, options: WebOptions, timeout_s: float) -> list[Result]:
        given: dict[str, str | int] = {
            "q": query,
            "format": "json",
            "safesearch": options.searxng_safesearch,
            "language": options.searxng_language,
            "categories": options.searxng_categories,
        }
        url = str(self._url.with_query(given))
        try:
            async with asyncio.timeout(timeout_s):
                page = await self._fetcher.get(url, accept=("application/json",))
            body = json.loads(page.data)
        except TimeoutError:
            raise EngineFailed(f"SearXNG did not answer within {timeout_s:g} seconds") from None
        except (ValueError, RecursionError):
            raise EngineFailed("SearXNG did not send valid JSON") from None
        except FetchError as exc:
            raise EngineFailed(_explained(exc), rest_s=exc.retry_after_s) from None
        return _of_searxng(body)

    async def close(self) -> None:
        await self._fetcher.close()


def _explained(exc: FetchError) -> str:
    if exc.status == 403:
        return "SearXNG does not permit JSON (403): list json below search.formats in its settings.yml"
    if exc.status == 429:
        return "SearXNG limits requests (429): its limiter must permit this proxy"
    return f"SearXNG (searxng_host) cannot be used: {exc}"


def _of_searxng(body: Any) -> list[Result]:
    if not isinstance(body, dict) or not isinstance(body.get("results"), list):
        raise EngineFailed("searxng_host did not answer as a SearXNG does")
    results = _results(body["results"], "url", "content")
    if not results and body.get("unresponsive_engines"):
        raise EngineFailed("no search engine that SearXNG uses has answered")
    return results


class Ddgs:
    """Public search engines, by the package ddgs. Each search is in a thread of its own, as it blocks."""

    def __init__(self) -> None:
        self.running = 0
        """Threads that have not ended."""

    async def search(self, query: str, options: WebOptions, timeout_s: float) -> list[Result]:
        if self.running >= MAX_THREADS:
            raise EngineFailed(f"{MAX_THREADS} searches of ddgs have not ended yet")
        safe = ("off", "moderate", "on")[options.searxng_safesearch]
        work = partial(_ddgs, query, safe, max(1, int(timeout_s)))
        try:
            async with asyncio.timeout(timeout_s):
                found = await self._in_thread(work)
        except TimeoutError:
            raise EngineFailed(f"ddgs found nothing within {timeout_s:g} seconds") from None
        if isinstance(found, EngineFailed):
            raise found
        return _results(found, "href", "body")

    def _in_thread(self, work: Callable[[], Any]) -> asyncio.Future[Any]:
        """The result of `work`, or its exception; a cancelled one goes on without a reader."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[Any] = loop.create_future()

        def settle(value: Any) -> None:
            self.running -= 1
            if not result.done():
                result.set_result(value)

        def run() -> None:
            value = work()
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(settle, value)

        try:
            threading.Thread(target=run, name="web search", daemon=True).start()
        except RuntimeError:
            raise EngineFailed("the system refused to start another thread for ddgs") from None
        self.running += 1
        return result

    async def close(self) -> None:
        """Threads end by their own time limit."""


def _ddgs(query: str, safe: str, timeout_s: int) -> Any:
    try:
        from ddgs import DDGS
    except ImportError:
        return EngineFailed("not installed; web: ddgs requires pip install 'llama-smart-proxy[web]'")
    for name in ("ddgs", "primp"):  # which log queries
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        return DDGS(timeout=timeout_s).text(query, safesearch=safe, max_results=MOST_RESULTS)
    except Exception as exc:  # a library that asks many servers: anything can be raised
        if str(exc) == "No results found.":
            return []
        return EngineFailed(f"ddgs has failed ({type(exc).__name__})")  # what it says may contain the query


def _results(items: Any, url_field: str, text_field: str) -> list[Result]:
    """Those of `items` that have the right form, each URL once."""
    found: dict[str, Result] = {}
    for item in items[:MOST_LISTED] if isinstance(items, list) else ():
        url = item.get(url_field) if isinstance(item, dict) else None
        if isinstance(url, str) and host_of(url) and len(found) < MOST_RESULTS:
            title = _line(item.get("title"), MAX_TITLE) or url
            found.setdefault(url, Result(url, title, _line(item.get(text_field), MAX_SNIPPET)))
    return list(found.values())


def host_of(url: str) -> str:
    """The host of a URL of the web, as it is connected to; empty if it is no such URL."""
    try:
        parts = URL(url)
    except ValueError:
        return ""
    return (parts.raw_host or "").rstrip(".") if parts.scheme in ("http", "https") else ""


def _line(value: Any, most: int) -> str:
    return " ".join(value[: 4 * most].split())[:most] if isinstance(value, str) else ""


class WebUnavailable(Exception):
    """The web cannot be searched; the message is the reason, for users."""
