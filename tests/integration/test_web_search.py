"""Web search of the agent rag: its engines, and the passages that it makes of what they find."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qs, urlsplit

import orjson
import pytest
from pydantic import ValidationError

from llama_smart_proxy import Passage
from llama_smart_proxy.agents.rag.web import Web, WebOptions, WebUnavailable
from llama_smart_proxy.agents.rag.web.breaker import State
from llama_smart_proxy.agents.rag.web.engines import Ddgs
from tests.support.agent_context import agent_context
from tests.support.harness import until
from tests.support.toxic import RawUpstream, Script, head, plain, raw_upstream

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


@dataclass(frozen=True)
class Search:
    """A search of the web with these options, and the SearXNG that it asks."""

    web: Web
    searxng: RawUpstream
    options: WebOptions

    async def __call__(self, query: str, **of_the_request: Any) -> list[Passage]:
        options = WebOptions(**self.options.model_dump(exclude_unset=True) | of_the_request)
        return await self.web.search(query, agent_context(options=options))


@asynccontextmanager
async def searching(
    script: Script = b"", clock: Callable[[], float] = time.monotonic, **options: Any
) -> AsyncIterator[Search]:
    async with raw_upstream(script) as searxng:
        own = WebOptions(**{"searxng_host": f"http://127.0.0.1:{searxng.port}", "web_pages": 0, **options})
        web = Web(own, clock=clock)
        try:
            yield Search(web, searxng, own)
        finally:
            await web.close()


async def test_searxng_is_asked_and_its_results_are_passages() -> None:
    script = answer({"results": RESULTS})
    async with searching(script, searxng_safesearch=2, searxng_language="de") as search:
        passages = await search("are  kiwis birds?")
    assert [(passage.document, passage.url, passage.text) for passage in passages] == [
        ("Kiwis", "http://two.example/", "Kiwis are birds of New Zealand."),
        ("Other", "http://one.example/", "Nothing of that."),
    ]
    assert passages[0].score > passages[1].score
    (request,) = search.searxng.requests
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
    async with searching(script) as search:
        with pytest.raises(WebUnavailable, match=message):
            await search("kiwis")


async def test_without_an_engine_a_search_names_the_settings() -> None:
    with pytest.raises(WebUnavailable, match="no web search is configured: set searxng_host, or web: ddgs"):
        await Web(WebOptions()).search("x", agent_context(options=WebOptions()))


# -- several engines, failures, and what is remembered -----------------------------------------------------------------


@pytest.fixture
def ddgs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The package ddgs, stood in for."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "fakes" / "packages"))
    monkeypatch.delitem(sys.modules, "ddgs", raising=False)
    module = importlib.import_module("ddgs")
    yield module
    module.gate.set()
    del sys.modules["ddgs"]


async def test_engines_are_tried_in_the_order_of_the_configuration(ddgs: Any) -> None:
    options: dict[str, Any] = {"web": ["ddgs", "searxng"], "searxng_safesearch": 2, "cache_ttl": 0}
    async with searching(answer({"results": RESULTS}), **options) as search:
        assert [found.url for found in await search("kiwis")] == ["http://found.example/"]
        assert search.searxng.requests == [] and ddgs.calls[0][1:] == ("kiwis", {"safesearch": "on", "max_results": 20})
        for query in ("nothing", "broken"):
            found = await search(query)
            assert {passage.url for passage in found} == {"http://one.example/", "http://two.example/"}
        search.searxng.script = answer({"results": []})
        assert await search("broken ") == [], "one of them works, and there is nothing"


async def test_a_thread_that_nothing_waits_for_takes_its_place_until_it_ends(ddgs: Any) -> None:
    async with searching(web="ddgs", web_timeout_s=0.2) as search:
        for _ in range(4):
            with pytest.raises(WebUnavailable, match=r"found nothing within 0\.1 seconds"):
                await search("slow")
        with pytest.raises(WebUnavailable, match="4 searches of ddgs have not ended yet"):
            await search("kiwis")
        ddgs.gate.set()
        engine = cast(Ddgs, search.web._known["ddgs"].engine)
        await until(lambda: engine.running == 0)
        assert len(ddgs.calls) == 4


async def test_what_ddgs_says_of_a_query_is_in_no_message_and_no_log(
    ddgs: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    async with searching(web="ddgs") as search:
        assert await search("nothing") == []
        with pytest.raises(WebUnavailable, match=r"ddgs has failed \(TimeoutError\)$"):
            await search("broken")
    assert "broken" not in caplog.text and "ddgs has failed" in caplog.text


async def test_without_the_package_ddgs_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ddgs", None)
    async with searching(web="ddgs") as search:
        with pytest.raises(WebUnavailable, match=r"pip install 'llama-smart-proxy\[web\]'"):
            await search("kiwis")


async def test_an_engine_that_fails_is_left_alone_and_tried_again() -> None:
    now_s = 0.0
    async with searching(
        head(500, [("Content-Length", "0")]),
        lambda: now_s,
        circuit_breaker_failure_threshold=2,
        circuit_breaker_recovery_timeout=60,
        circuit_breaker_success_threshold=1,
    ) as search:
        for number in range(4):
            with pytest.raises(WebUnavailable, match="answered 500" if number < 2 else "tried again in 60 seconds"):
                await search(f"query {number}")
        assert len(search.searxng.requests) == 2
        search.searxng.script, now_s = answer({"results": RESULTS}), 60.0
        assert await search("kiwis")
        assert (
            search.web._known[search.options.searxng_host].breaker.state(now_s) is State.CLOSED
            and len(search.searxng.requests) == 3
        )


async def test_an_engine_that_limits_requests_is_left_alone_for_as_long_as_it_asks() -> None:
    now_s = 0.0
    busy = head(429, [("Retry-After", "120"), ("Content-Length", "0")])
    async with searching(busy, lambda: now_s) as search:
        for message in ("limits requests", "tried again in 120 seconds"):
            with pytest.raises(WebUnavailable, match=message):
                await search("kiwis")
        assert len(search.searxng.requests) == 1


async def test_a_search_is_remembered_for_some_time() -> None:
    now_s = 0.0
    async with searching(answer({"results": RESULTS}), lambda: now_s, cache_ttl=100) as search:
        first = await search("Kiwis  birds")
        assert await search("kiwis birds") == first and len(search.searxng.requests) == 1
        now_s = 100.0
        await search("kiwis birds")
        assert len(search.searxng.requests) == 2


@pytest.mark.parametrize(
    ("options", "urls"),
    [
        ({"web_allow_domains": ["two.example"]}, ["http://two.example/"]),
        ({"web_allow_domains": ["*.EXAMPLE"], "web_deny_domains": ["two.example"]}, ["http://one.example/"]),
        ({"web_deny_domains": ["example"]}, []),
        ({"web_passages": 1}, ["http://two.example/"]),
    ],
)
async def test_domains_are_allowed_and_denied(options: Any, urls: list[str]) -> None:
    async with searching(answer({"results": RESULTS}), **options) as search:
        assert [passage.url for passage in await search("kiwis birds")] == urls


async def test_a_model_or_a_command_may_choose_among_the_agents_own_engines(ddgs: Any) -> None:
    async with searching(answer({"results": RESULTS})) as search, raw_upstream(answer({"results": []})) as other:
        with pytest.raises(WebUnavailable, match="no web search is configured"):
            await search("kiwis", web="ddgs")
        assert await search("kiwis", web="searxng")
        assert await search("kiwis", searxng_host=f"http://127.0.0.1:{other.port}") == []
        assert len(search.searxng.requests) == len(other.requests) == 1 and ddgs.calls == []
    async with searching(web=["searxng", "ddgs"]) as search:
        assert await search("kiwis", web="ddgs") and search.searxng.requests == []
    async with searching(web="off") as search:
        with pytest.raises(WebUnavailable, match="no web search is configured"):
            await search("kiwis", web="searxng")


@pytest.mark.parametrize(
    ("given", "engines", "is_off"),
    [
        ({}, [], False),
        ({"searxng_host": "localhost:8888/"}, ["searxng"], False),
        ({"web": False, "searxng_host": "http://s"}, [], True),
        ({"web": "off", "searxng_host": "http://s"}, [], True),
        ({"web": True, "searxng_host": "http://s"}, ["searxng"], False),
        ({"web": "ddgs"}, ["ddgs"], False),
        ({"web": "ddgs, searxng", "searxng_host": "http://s"}, ["ddgs", "searxng"], False),
    ],
)
def test_the_option_web_names_engines_or_is_off(given: Any, engines: list[str], is_off: bool) -> None:
    options = WebOptions(**given)
    assert (options.engines, options.web_is_off) == (engines, is_off)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"web": "searxng"}, "requires searxng_host"),
        ({"web": "google"}, "'off', 'searxng' or 'ddgs'"),
        ({"searxng_host": "ftp://s"}, "must be the URL of a SearXNG"),
        ({"web_deny_domains": ["http://x.example/"]}, "must be a domain"),
        ({"web_timeout_s": 21}, "less than or equal to 20"),
    ],
)
def test_options_that_cannot_be_used_are_named(given: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        WebOptions(**given)
