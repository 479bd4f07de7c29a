"""Web search of the agent rag: its engines, and the passages that it makes of what they find."""

from __future__ import annotations

from typing import Any, cast
from urllib.parse import parse_qs, urlsplit

import orjson
import pytest

from llama_smart_proxy import Context
from llama_smart_proxy.agents.rag.web import Web, WebOptions, WebUnavailable
from tests.support.toxic import Request, head, plain, raw_upstream

NO_PAGES = cast(Context, None)
RESULTS = [
    {"url": "http://one.example/", "title": "Other", "content": "Nothing of that."},
    {"url": "http://two.example/", "title": "Kiwis", "content": "Kiwis  are\nbirds of New Zealand."},
    {"url": "http://two.example/", "title": "Kiwis", "content": "again"},
    *({"url": url, "title": "x", "content": "kiwis birds"} for url in ("ftp://three.example/", "http://[", None, 7)),
    "no result",
    {},
]


def answer(body: Any) -> bytes:
    return plain(orjson.dumps(body))


async def asked(script: bytes, **options: Any) -> tuple[Any, list[Request]]:
    """What a search with that SearXNG returns or raises, and the requests that it got."""
    async with raw_upstream(script) as searxng:
        web = Web(WebOptions(searxng_host=f"http://127.0.0.1:{searxng.port}", web_pages=0, **options))
        try:
            return await web.search("are  kiwis birds?", NO_PAGES), searxng.requests
        except WebUnavailable as exc:
            return str(exc), searxng.requests
        finally:
            await web.close()


async def test_searxng_is_asked_and_its_results_are_passages() -> None:
    passages, requests = await asked(answer({"results": RESULTS}), searxng_safesearch=2, searxng_language="de")
    assert [(passage.document, passage.url, passage.text) for passage in passages] == [
        ("Kiwis", "http://two.example/", "Kiwis are birds of New Zealand."),
        ("Other", "http://one.example/", "Nothing of that."),
    ]
    assert passages[0].score > passages[1].score
    (request,) = requests
    url = urlsplit(request.line.split()[1])
    assert url.path == "/search"
    assert {name: value for name, (value,) in parse_qs(url.query).items()} == {
        **{"q": "are kiwis birds?", "format": "json", "safesearch": "2", "language": "de", "categories": "general"}
    }


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (head(403, [("Content-Length", "0")]), "list json below search.formats in its settings.yml"),
        (head(429, [("Content-Length", "0")]), "its limiter must permit this proxy"),
        (head(500, [("Content-Length", "0")]), "its server answered 500"),
        (head(200, [("Content-Type", "text/html"), ("Content-Length", "0")]), "its type text/html is not read"),
        (plain(b"{"), "did not send valid JSON"),
        (plain(b"[" * 100_000), "did not send valid JSON"),
        (answer([]), "did not answer as a SearXNG does"),
        (answer({"results": {}}), "did not answer as a SearXNG does"),
        (answer({"results": [], "unresponsive_engines": [["x", "timeout"]]}), "no search engine that SearXNG uses"),
    ],
)
async def test_an_engine_that_does_not_work_is_named_with_its_reason(script: bytes, message: str) -> None:
    result, _ = await asked(script)
    assert isinstance(result, str) and message in result


async def test_without_an_engine_a_search_names_the_settings() -> None:
    with pytest.raises(WebUnavailable, match="no web search is configured: set searxng_host, or web: ddgs"):
        await Web(WebOptions()).search("x", NO_PAGES)
