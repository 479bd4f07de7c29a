"""What a search makes of the pages that it finds: when they are slow, when its client leaves, and when they lie."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import orjson
import pytest

from llama_smart_proxy.agents.rag.web import Web, WebOptions
from llama_smart_proxy.proxy.middleware.context import AgentContext
from tests.support.agent_context import agent_context
from tests.support.fetched import MISSING, path_of, reading, sent
from tests.support.harness import until
from tests.support.toxic import Link, RawUpstream, Request, raw_upstream

PAGES = ("page", "missing", "forbidden", "image", "silent", "beyond")
"""What is found; a page of `beyond` is not read, as there are enough."""
ANSWERS = {
    "/page": sent(
        "# Kiwis\n\nKiwis are birds that live in New Zealand.\n\n## Food\n\nThey eat worms.\n", "text/markdown"
    ),
    "/robots.txt": sent("User-agent: *\nDisallow: /forbidden"),
    "/missing": MISSING,
    "/image": sent("x", "image/png"),
    "/beyond": sent("x"),
}


async def silent(link: Link, request: Request) -> None:
    await link.gone()


async def web_site(link: Link, request: Request) -> None:
    answer = ANSWERS.get(path_of(request))
    await (link.send(answer) if answer else link.gone())


@asynccontextmanager
async def the_web(**options: float) -> AsyncIterator[tuple[RawUpstream, RawUpstream, AgentContext]]:
    """A SearXNG, the site whose pages it finds, and a context to search them."""
    async with raw_upstream(web_site) as site, raw_upstream() as searxng, reading() as pages:
        results = [
            {"url": f"http://127.0.0.1:{site.port}/{name}", "title": f"The {name}", "content": f"Snippet: {name}."}
            for name in PAGES
        ]
        searxng.script = sent(orjson.dumps({"results": results}), "application/json")
        host = f"http://127.0.0.1:{searxng.port}"
        yield searxng, site, agent_context(pages, WebOptions.model_validate({"searxng_host": host, **options}))


@pytest.mark.parametrize(
    "limit", [{"web_page_timeout_s": 1.0}, pytest.param({"web_timeout_s": 4.0}, marks=pytest.mark.full)]
)
async def test_pages_that_cannot_be_read_in_time_are_replaced_by_their_snippets(limit: dict[str, float]) -> None:
    async with the_web(**limit, web_pages=5, web_passages=20) as (_, site, ctx):
        await ctx.page(f"http://127.0.0.1:{site.port}/page")  # it is remembered, however slow this machine is
        web = Web(ctx.config)
        try:
            passages = await web.search("what do kiwis eat", ctx)
        finally:
            await web.close()
        assert passages[0].document == "The page" and passages[0].url.endswith("/page")
        assert "They eat worms." in "".join(passage.text for passage in passages if passage.document == "The page")
        snippets = {passage.text for passage in passages if passage.document != "The page"}
        assert snippets == {f"Snippet: {name}." for name in PAGES[1:]}
        asked = [path_of(request) for request in site.requests]
        assert "/forbidden" not in asked and "/beyond" not in asked
        await until(lambda: site.open_links == 0)


@pytest.mark.parametrize("where", ["search", "robots", "page"])
async def test_a_search_whose_client_leaves_ends_all_that_it_began(
    where: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with the_web(web_pages=5) as (searxng, site, ctx):
        web = Web(ctx.config)
        asked = searxng if where == "search" else site
        if where != "page":
            asked.script = silent
        tasks, descriptors = asyncio.all_tasks(), len(os.listdir("/proc/self/fd"))
        search = asyncio.ensure_future(web.search("what do kiwis eat", ctx))
        last = {"search": "/search", "robots": "/robots.txt", "page": "/silent"}[where]
        await until(lambda: any(path_of(request).startswith(last) for request in asked.requests))
        search.cancel()
        with pytest.raises(asyncio.CancelledError):
            await search
        for link in asked.links:
            await link.gone()
        served = {link._task for server in (searxng, site) for link in server.links}
        assert asyncio.all_tasks() - tasks - served == set()
        await web.close()
        await until(lambda: len(os.listdir("/proc/self/fd")) <= descriptors)
    gc.collect()
    assert [record.message for record in caplog.records if record.name == "asyncio"] == []
