"""Servers that send something all the time, and never an answer: a limit of time or of size ends each of them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import chain, repeat

import pytest

from llama_smart_proxy.backends.base import UpstreamRequest
from llama_smart_proxy.backends.http import exchange
from llama_smart_proxy.backends.http.connection import ConnectionPool, Endpoint
from llama_smart_proxy.backends.http.exchange import HEAD_LIMIT, Timeouts
from llama_smart_proxy.proxy.errors import UpstreamFailed
from tests.support.harness import PATIENCE_S, until
from tests.support.toxic import EVENT_HEAD, LAST_CHUNK, Link, Request, Script, chunk, head, raw_upstream

POST = UpstreamRequest("POST", "/x", b"{}")
CHUNKED = head(200, [("Transfer-Encoding", "chunked")])
BEGUN = EVENT_HEAD + chunk(b"data: 1\n\n")
EARLY = head(103, [("Link", "</x>")])

Endless = tuple[bytes, bytes]
"""What is sent first, and then again and again."""
ENDLESS: dict[str, Endless] = {
    "a status line": (b"HTTP/1.1 200 ", b"O"),
    "a header": (b"HTTP/1.1 200 OK\r\nX-Long: ", b"x"),
    "headers": (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"),
    "continue": (b"", head(100)),
    "processing": (b"", head(102)),
    "early hints": (b"", EARLY),
    "a header behind early hints": (EARLY + b"HTTP/1.1 200 OK\r\nX-Long: ", b"x"),
    "a first chunk size": (CHUNKED, b"0"),
    "an extension of the first chunk": (CHUNKED + b"5;x=", b"y"),
    "an extension of a later chunk": (BEGUN + b"5;x=", b"y"),
    "a trailer": (BEGUN + b"0\r\nX-Long: ", b"x"),
    "trailers": (BEGUN + b"0\r\n", b"X: y\r\n"),
}


def dripping(endless: Endless) -> Script:
    async def script(link: Link, request: Request) -> None:
        await link.send(endless[0])
        while link.closed is None:
            await link.send(endless[1])
            await asyncio.sleep(0.01)  # slowly, but never silent for as long as the limit

    return script


def flooding(endless: Endless) -> Script:
    async def script(link: Link, request: Request) -> None:
        pieces: Iterator[bytes] = chain([endless[0]], repeat(endless[1] * (4096 // len(endless[1]))))
        for piece in pieces:
            await link.send(piece)

    return script


async def failure(script: Script, timeouts: Timeouts) -> tuple[UpstreamFailed, int]:
    """How a request to such a server ends, and how many bytes the server was able to send."""
    async with raw_upstream(script) as upstream:
        pool = ConnectionPool(Endpoint("127.0.0.1", upstream.port), timeouts=timeouts)
        with pytest.raises(UpstreamFailed) as caught:
            async with asyncio.timeout(PATIENCE_S), pool.request(POST) as response:
                await response.read(2**30)
        await until(lambda: upstream.links and not upstream.open_links, what="the closed connection")
        pool.close("the test is over")
        return caught.value, upstream.links[0].accepted


@pytest.mark.parametrize("name", ENDLESS)
async def test_bytes_that_are_no_answer_do_not_extend_the_time_for_one(name: str) -> None:
    error, _ = await failure(dripping(ENDLESS[name]), Timeouts(first_byte_s=0.2, idle_s=0.2))
    assert (error.status, error.code) == (504, "upstream_timeout")


@pytest.mark.parametrize("name", ENDLESS)
async def test_bytes_that_are_no_answer_have_a_limit(name: str) -> None:
    error, sent = await failure(flooding(ENDLESS[name]), Timeouts())
    assert error.status == 502
    assert sent < 100 * HEAD_LIMIT  # most of it in the sockets


@pytest.mark.parametrize("name", ["a header", "a header behind early hints", "continue", "processing", "early hints"])
async def test_a_head_that_has_begun_is_soon_complete(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(exchange, "HEAD_S", 0.2)
    error, _ = await failure(dripping(ENDLESS[name]), Timeouts())
    assert (error.status, error.code) == (504, "upstream_timeout")
    assert "headers" in error.message


async def test_a_body_that_drips_is_an_answer() -> None:
    async def script(link: Link, request: Request) -> None:
        await link.send(CHUNKED)
        for _ in range(60):
            await link.send(chunk(b"x"))
            await asyncio.sleep(0.05)
        await link.send(LAST_CHUNK)

    async with raw_upstream(script) as upstream:
        pool = ConnectionPool(Endpoint("127.0.0.1", upstream.port), timeouts=Timeouts(first_byte_s=2.0, idle_s=2.0))
        assert await pool.fetch(POST, timeout_s=PATIENCE_S) == (200, b"x" * 60)
        pool.close("the test is over")
