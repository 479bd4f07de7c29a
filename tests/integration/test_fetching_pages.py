"""Pages of the web as passages: by the rules of their servers, and read by the process that reads documents."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from llama_smart_proxy.proxy.fetching import Fetcher, FetchError
from llama_smart_proxy.proxy.fetching.manners import Manners
from tests.support.agent_context import agent_context
from tests.support.fetched import LOCAL, MISSING, fetching, path_of, reading, sent, site
from tests.support.harness import until
from tests.support.toxic import Link, Request, head, raw_upstream


@asynccontextmanager
async def manners(pause_s: float = 0.0) -> AsyncIterator[Manners]:
    async with fetching(Fetcher(ports=None, allow_private=LOCAL)) as fetcher:
        yield Manners(fetcher, pause_s=pause_s)


# -- robots.txt --------------------------------------------------------------------------------------------------------

ALL = "User-agent: *\n"


@pytest.mark.parametrize(
    ("robots", "permitted"),
    [
        (MISSING, True),
        (head(401, [("Content-Length", "0")]), True),
        (sent(ALL + "Disallow: /other"), True),
        (sent(ALL + "Disallow:"), True),
        (sent(ALL + "Disallow: /"), False),
        (sent(ALL + "Disallow: /page"), False),
        (sent(ALL + "Allow: /page\nDisallow: /"), True),
        (sent(ALL + "Disallow: /\n\nUser-agent: llama-smart-proxy\nAllow: /"), True),
        (sent(ALL + "Allow: /\n\nUser-agent: Llama-Smart-Proxy\nDisallow: /"), False),
        (sent("User-agent: other\nDisallow: /"), True),
        (sent(ALL + "Disallow: /", "text/plain; charset=utf-8"), False),
        (sent("<p>Disallow: /</p>", "text/html"), True),
        (sent(b"\xff\x00\nUser-agent: *\r\nDisallow: /page\r\n"), False),
        (sent(ALL + "Crawl-delay: 1"), True),
        (sent(ALL + "Crawl-delay: 60"), False),
        (sent("", status=500), False),
        (sent("", status=503), False),
        (sent("", status=429), False),
        (sent(b"x" * 600_000), False),
        (b"nonsense\r\n\r\n", False),
    ],
)
async def test_robots_txt_is_respected(robots: bytes, permitted: bool) -> None:
    async with site({"/robots.txt": robots, "/page": sent("text")}) as (server, url), manners() as polite:
        if permitted:
            assert (await polite.get(f"{url}/page")).data == b"text"
        else:
            with pytest.raises(FetchError, match=r"robots\.txt") as caught:
                await polite.get(f"{url}/page")
            assert caught.value.refused
        paths = [path_of(request) for request in server.requests]
    assert paths == ["/robots.txt", *["/page"] * permitted]


async def test_robots_txt_is_asked_for_once() -> None:
    async with site({"/a": sent("a"), "/b": sent("b")}) as (server, url), manners() as polite:
        assert [(await polite.get(f"{url}/{name}")).data for name in "aba"] == [b"a", b"b", b"a"]
        assert [path_of(request) for request in server.requests] == ["/robots.txt", "/a", "/b", "/a"]


async def test_a_redirect_is_subject_to_the_rules_of_where_it_leads() -> None:
    forbidden = {"/robots.txt": sent(ALL + "Disallow: /"), "/page": sent("text")}
    async with site(forbidden, host="127.0.0.2") as (other, there):
        moved = head(302, [("Location", f"{there}/page"), ("Content-Length", "0")])
        async with site({"/page": moved}) as (_, url), manners() as polite:
            with pytest.raises(FetchError, match=r"robots\.txt"):
                await polite.get(f"{url}/page")
        assert [path_of(request) for request in other.requests] == ["/robots.txt"]


async def test_robots_txt_is_fetched_by_the_same_guard() -> None:
    async with site({}) as (server, url), fetching(Fetcher(ports=None)) as fetcher:
        with pytest.raises(FetchError, match="not a public one"):
            await Manners(fetcher).get(f"{url}/page")
        assert server.requests == []


# -- turns -------------------------------------------------------------------------------------------------------------


async def test_a_host_gets_one_request_at_a_time_and_others_do_not_wait_for_it() -> None:
    gate = asyncio.Event()

    async def slow(link: Link, request: Request) -> None:
        if path_of(request) != "/robots.txt":
            await gate.wait()
        await link.send(sent("slow") if path_of(request) != "/robots.txt" else MISSING)

    async with (
        raw_upstream(slow) as server,
        site({"/page": sent("fast")}, "127.0.0.2") as (_, other),
        manners() as polite,
    ):
        fetches = asyncio.gather(*(polite.get(f"http://127.0.0.1:{server.port}/{number}") for number in range(3)))
        await until(lambda: len(server.requests) == 2)
        assert (await polite.get(f"{other}/page")).data == b"fast"
        assert server.open_links == 1 and len(server.requests) == 2
        gate.set()
        assert [page.data for page in await fetches] == [b"slow"] * 3
    assert len(server.requests) == 4


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("header", [("Retry-After", "100"), ("X", "y")])
async def test_a_server_that_asks_to_be_left_alone_is(status: int, header: tuple[str, str]) -> None:
    busy = head(status, [header, ("Content-Length", "0")])
    async with site({"/busy": busy, "/page": sent("text")}) as (server, url), manners() as polite:
        with pytest.raises(FetchError, match=f"answered {status}"):
            await polite.get(f"{url}/busy")
        with pytest.raises(FetchError, match=r"has asked for no request for (100|60|99) seconds"):
            await polite.get(f"{url}/page")
        assert [path_of(request) for request in server.requests] == ["/robots.txt", "/busy"]


async def test_who_leaves_gives_its_turn_to_the_next() -> None:
    async def silent_once(link: Link, request: Request) -> None:
        answers = {"/robots.txt": MISSING, "/page": sent("text")}
        if path_of(request) in answers:
            await link.send(answers[path_of(request)])

    async with raw_upstream(silent_once) as server, manners() as polite:
        url = f"http://127.0.0.1:{server.port}"
        first = asyncio.ensure_future(polite.get(f"{url}/silent"))
        await until(lambda: len(server.requests) == 2)
        second = asyncio.ensure_future(polite.get(f"{url}/page"))
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert (await second).data == b"text"


# -- reading -----------------------------------------------------------------------------------------------------------

HTML = """<!doctype html><html><head><title>Kiwis</title></head><body><nav>Home | About | Contact</nav><article>
<h1>Kiwis</h1><p>Kiwis are birds that cannot fly, and they live in the forests of New Zealand.</p>
<h2>Food</h2><p>They eat worms, which they find by smell with nostrils at the end of their beaks. %s</p>
</article></body></html>"""


async def test_a_page_is_read_and_remembered() -> None:
    paths = {
        "/html": sent(HTML.replace("%s", ""), "text/html"),
        "/latin": sent(HTML.replace("%s", "Gr\xf6\xdfe").encode("latin-1"), "text/html; charset=iso-8859-1"),
        "/odd": sent(HTML.replace("%s", "Gr\xf6\xdfe"), "text/html; charset=punycode"),
        "/md": sent("# Manual\n\nFirst text.\n", "text/markdown"),
        "/plain": sent("Just a text."),
        "/pdf": sent(b"%PDF-1.7 damaged", "application/pdf"),
    }
    async with site(paths) as (server, url), reading() as pages:
        ctx = agent_context(pages)
        passages = await ctx.page(f"{url}/html#food")
        assert [(passage.number, passage.url) for passage in passages] == [
            (number, f"{url}/html") for number in range(len(passages))
        ]
        text = "\n".join(passage.text for passage in passages)
        assert "cannot fly" in text and "eat worms" in text and "About" not in text and passages[0].heading == "Kiwis"
        for name in ("latin", "odd"):
            assert "Gr\xf6\xdfe" in "".join(passage.text for passage in await ctx.page(f"{url}/{name}"))
        assert [passage.heading for passage in await ctx.page(f"{url}/md")] == ["Manual"]
        assert (await ctx.page(f"{url}/plain"))[0].text.endswith("Just a text.")
        with pytest.raises(FetchError, match="it cannot be read"):
            await ctx.page(f"{url}/pdf")
        asked = len(server.requests)
        assert await ctx.page(f"{url}/html#food") == passages and len(server.requests) == asked


async def test_a_proxy_that_reads_no_pages_names_that() -> None:
    with pytest.raises(FetchError, match="reads no pages"):
        await agent_context().page("http://example.com/")
