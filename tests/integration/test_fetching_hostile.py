"""The guarded client and servers that send what costs much to read, or is nothing at all."""

from __future__ import annotations

import asyncio
import random
import socket
import zlib

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult

from llama_smart_proxy.proxy.fetching import Fetcher, FetchError, Limits
from tests.support.fetched import HTML, LOCAL, PAGE, canaries, fetching
from tests.support.harness import until
from tests.support.toxic import LAST_CHUNK, Link, Request, chunk, head, raw_upstream

CHUNKED = head(200, [HTML, ("Transfer-Encoding", "chunked")])
FLOODS = {
    "interim responses": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000),
    "interim responses with headers": (b"", b"HTTP/1.1 103 Early\r\n" + b"Link: </a>\r\n" * 100 + b"\r\n"),
    "chunks of one byte": (CHUNKED, b"1\r\nx\r\n" * 1000),
    "extensions of chunks": (CHUNKED, b"1;" + b"a" * 1000 + b"\r\nx\r\n"),
    "trailers": (CHUNKED, LAST_CHUNK[:3] + b"a: b\r\n" * 1000),
    "headers": (b"HTTP/1.1 200 OK\r\n", b"a: b\r\n" * 1000),
    "a header": (b"HTTP/1.1 200 OK\r\na: ", b"b" * 10_000),
    "white space": (b"", b"\r\n" * 1000),
}


@pytest.mark.parametrize("flood", FLOODS)
async def test_a_flood_ends_long_before_the_time_for_a_page_does(flood: str) -> None:
    begin, again = FLOODS[flood]

    async def script(link: Link, request: Request) -> None:
        await link.send(begin)
        while True:
            await link.send(again)

    async with raw_upstream(script) as site, fetching(Fetcher(ports=None, allow_private=LOCAL)) as fetcher:
        with pytest.raises(FetchError, match="did not send a valid answer"):
            await fetcher.get(f"http://127.0.0.1:{site.port}/", limits=Limits(total_s=60, read_s=60))
        await site.links[0].gone()
        assert site.links[0].sent < 4 * 2**20, "what kernels hold, and a little"


async def test_large_pages_in_any_form_are_no_flood() -> None:
    text = bytes(range(32, 127)) * 20_000
    forms = {
        "/length": head(200, [HTML, ("Content-Length", str(len(text)))]) + text,
        "/chunks": CHUNKED + b"".join(chunk(text[at : at + 50]) for at in range(0, len(text), 50)) + LAST_CHUNK,
        "/interim": b"HTTP/1.1 103 Early Hints\r\n\r\n" * 5 + head(200, [HTML, ("Content-Length", "2")]) + b"ok",
    }
    for name, wbits in (("gzip", 31), ("deflate", 15)):
        coder = zlib.compressobj(wbits=wbits)
        data = coder.compress(text) + coder.flush()
        headers = [HTML, ("Content-Encoding", name), ("Content-Length", str(len(data)))]
        forms[f"/{name}"] = head(200, headers) + data

    async def script(link: Link, request: Request) -> None:
        await link.send(forms[request.line.split()[1]])

    async with raw_upstream(script) as site, fetching(Fetcher(ports=None, allow_private=LOCAL)) as fetcher:
        for path in forms:
            page = await fetcher.get(f"http://127.0.0.1:{site.port}{path}", limits=Limits(total_s=60))
            assert page.data == (b"ok" if path == "/interim" else text), path


PARTS = [
    *(b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 100 C\r\n\r\n", b"HTTP/1.0 200\r\n", b"HTTP/1.1 302 F\r\n", b"HTTP/2 200\r\n"),
    *(b"HTTP/1.1 204 N\r\n", b"HTTP/1.1 101 S\r\n", b"HTTP/1.1 304 N\r\n\r\n", b"Content-Type: text/html\r\n"),
    *(b"Content-Type: text/html; charset=\xff\r\n", b"Content-Type: ;;\r\n", b"Content-Length: 5\r\n"),
    *(b"Content-Length: -1\r\n", b"Content-Length: 99999999999999999999\r\n", b"Transfer-Encoding: chunked\r\n"),
    *(b"Transfer-Encoding: gzip, chunked\r\n", b"Content-Encoding: gzip\r\n", b"Content-Encoding: br\r\n"),
    *(b"Content-Encoding: zstd\r\n", b"Content-Encoding: deflate\r\n", b"Location: http://[\r\n", b"Location: ?\r\n"),
    *(
        b"Location: \xff\xfe\r\n",
        b"Location: //a:b/\r\n",
        b"Location: \r\n",
        b"Upgrade: h2c\r\nConnection: upgrade\r\n",
    ),
    *(b"Set-Cookie: a=b; Max-Age=x\r\n", b"Retry-After: Mon, 99 Foo\r\n", b"\r\n", b"5\r\nhello\r\n", b"0\r\n\r\n"),
    *(b"zz\r\n", b"hello", b"\x1f\x8b\x08\x00", b"\x00\xff", b"\n", b"Content-Disposition: \r\n", b"Link: <\r\n"),
]


async def test_no_bytes_raise_anything_else() -> None:
    choose = random.Random(1)

    async def script(link: Link, request: Request) -> None:
        first = choose.choice([b"", *PARTS[:8]])
        await link.send(first + b"".join(choose.choices(PARTS, k=choose.randint(1, 12))))
        choose.choice([link.close, link.close, link.reset])()

    fetched = 0
    async with raw_upstream(script) as site, fetching(Fetcher(ports=None, allow_private=LOCAL)) as fetcher:
        for _ in range(300):
            try:
                await fetcher.get(f"http://127.0.0.1:{site.port}/")
                fetched += 1
            except FetchError:
                continue
    assert fetched < 300


async def test_no_proxy_of_the_environment_connects_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    async with canaries() as (port, connections), raw_upstream(PAGE, host="127.0.0.2") as site:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
        monkeypatch.delenv("no_proxy", raising=False)
        async with fetching(Fetcher(ports=None, allow_private=["127.0.0.2/32"])) as fetcher:
            assert (await fetcher.get(f"http://127.0.0.2:{site.port}/")).data == b"ok"
        assert connections == []


class Hanging(AbstractResolver):
    """A DNS server that does not answer."""

    asked = False

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        self.asked = True
        await asyncio.Event().wait()
        return []

    async def close(self) -> None:
        """Nothing is held."""


@pytest.mark.parametrize("by", ["time", "caller"])
async def test_a_name_that_is_not_resolved_leaves_no_task(by: str) -> None:
    tasks, names = asyncio.all_tasks(), Hanging()
    async with fetching(Fetcher(resolver=names)) as fetcher:
        limits = Limits(total_s=0.05 if by == "time" else 60)
        fetch = asyncio.ensure_future(fetcher.get("http://a.example/", limits=limits))
        await until(lambda: names.asked)
        if by == "caller":
            fetch.cancel()
        with pytest.raises(FetchError if by == "time" else asyncio.CancelledError):
            await fetch
        assert asyncio.all_tasks() == tasks
