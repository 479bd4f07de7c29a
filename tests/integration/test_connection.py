"""The upstream side: what counts as a whole answer, and which connections live on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from llama_smart_proxy.backends.base import UpstreamRequest
from llama_smart_proxy.backends.http.connection import ConnectionPool, Endpoint
from llama_smart_proxy.backends.http.exchange import Timeouts
from llama_smart_proxy.proxy.errors import UpstreamFailed
from tests.support import toxic
from tests.support.harness import free_port, until
from tests.support.toxic import (
    LAST_CHUNK,
    Link,
    RawUpstream,
    Request,
    Script,
    chunk,
    cut_short,
    head,
    plain,
    raw_upstream,
)

GET = UpstreamRequest("GET", "/x")
POST = UpstreamRequest("POST", "/x", b'{"a":1}')
FETCH_S = 60.0


@asynccontextmanager
async def pooled(script: Script, timeouts: Timeouts | None = None) -> AsyncIterator[tuple[ConnectionPool, RawUpstream]]:
    """A scripted server and a connection pool to it."""
    async with raw_upstream(script) as upstream:
        pool = ConnectionPool(Endpoint("127.0.0.1", upstream.port), timeouts=timeouts or Timeouts())
        try:
            yield pool, upstream
        finally:
            pool.close("the test is over")


async def fetch(pool: ConnectionPool, call: UpstreamRequest = POST) -> tuple[int, bytes]:
    return await pool.fetch(call, timeout_s=FETCH_S)


# -- what is sent ------------------------------------------------------------------------------------------------------


async def test_request_is_exactly_what_the_call_says() -> None:
    async with pooled(plain(b"{}")) as (pool, upstream):
        await fetch(pool, UpstreamRequest("POST", "/a/b?c=%20d", b"{}", [("X-One", "1"), ("X-One", "2")]))
        await fetch(pool, GET)
    first, second = upstream.requests
    host = ("host", f"127.0.0.1:{upstream.port}")
    identity = ("accept-encoding", "identity")
    assert first.line == "POST /a/b?c=%20d HTTP/1.1"
    assert first.headers == [host, identity, ("x-one", "1"), ("x-one", "2"), ("content-length", "2")]
    assert first.body == b"{}"
    assert second.line == "GET /x HTTP/1.1"
    assert second.headers == [host, identity]


@pytest.mark.parametrize("status", [300, 301, 302, 303, 307, 308, 399])
async def test_redirects_are_errors_that_name_the_host_and_no_query(status: int) -> None:
    location = "https://user:secret@other.example:81/login?key=secret#secret"
    async with pooled(plain(b"{}", status, [("Location", location)])) as (pool, upstream):
        with pytest.raises(UpstreamFailed) as caught:
            await fetch(pool)
        assert (caught.value.status, caught.value.code) == (502, "upstream_redirected")
        assert "redirects to https://other.example:81/login:" in caught.value.message
        assert "secret" not in caught.value.message
        assert len(upstream.requests) == 1


async def test_cookies_are_not_kept() -> None:
    async with pooled(plain(b"{}", headers=[("Set-Cookie", "tenant=a")])) as (pool, upstream):
        assert await fetch(pool) == await fetch(pool) == (200, b"{}")
        assert all(request.header("cookie") is None for request in upstream.requests)


# -- where an answer ends ----------------------------------------------------------------------------------------------

BEHIND = {
    "nothing": b"",
    "garbage": b"\x00\xffgarbage\r\n\r\n",
    "a body": b"0123456789",
    "a chunked body": chunk(b"0123456789") + LAST_CHUNK,
    "another answer": plain(b"other", 500, [("X-Other", "1")]),
    "half an answer": head(500, [("X-Other", "1")])[:-2],
}
PROMISES = {
    "no length": [],
    "a length": [("Content-Length", "10")],
    "chunks": [("Transfer-Encoding", "chunked")],
}


@pytest.mark.parametrize("behind", BEHIND)
@pytest.mark.parametrize("promise", PROMISES)
@pytest.mark.parametrize("status", [204, 304, "HEAD"])
async def test_bodiless_answer_is_complete_at_its_headers(status: int | str, promise: str, behind: str) -> None:
    code = status if isinstance(status, int) else 200
    answer = head(code, [("X-Mine", "1"), *PROMISES[promise]]) + BEHIND[behind]
    async with pooled(answer) as (pool, upstream):
        for _ in range(2):  # what follows must not be taken for the next answer either
            async with pool.request(UpstreamRequest("HEAD", "/x") if status == "HEAD" else POST) as response:
                assert await response.read(1000) == b""
                assert response.status == code
                assert response.header("x-mine") == "1" and response.header("x-other") == ""
        assert len(upstream.requests) == 2


@pytest.mark.parametrize("behind", [name for name in BEHIND if name != "nothing"])
@pytest.mark.parametrize("framing", ["length", "chunks"])
async def test_bytes_behind_an_answer_belong_to_no_answer(framing: str, behind: str) -> None:
    async with pooled(FRAMED[framing] + BEHIND[behind]) as (pool, upstream):
        for _ in range(2):
            async with pool.request(POST) as response:
                assert await response.read(1000) == b"0123456789"
                assert response.status == 200 and response.header("x-other") == ""
        assert len(upstream.links) == 2, "a connection whose state is in doubt was used again"


@pytest.mark.parametrize(
    "first",
    [
        head(100),
        head(103, [("Link", "</x>"), ("X-Early", "1"), ("Content-Length", "3")]),
        head(100) + head(102) + head(103),
        head(103, [("Transfer-Encoding", "chunked")]),
    ],
)
async def test_informational_answers_are_skipped(first: bytes) -> None:
    async def script(link: Link, request: Request) -> None:
        await link.send(first)
        await link.send(plain(b"real", headers=[("X-Real", "1")]))

    for whole in (script, first + plain(b"real", headers=[("X-Real", "1")])):
        async with pooled(whole) as (pool, upstream):
            for _ in range(2):
                async with pool.request(POST) as response:
                    assert (response.status, await response.read(1000)) == (200, b"real")
                    assert response.header("x-real") == "1" and response.header("x-early") == ""
            assert len(upstream.links) == 1, "the connection was as good as before"


FRAMED = {
    "length": plain(b"0123456789"),
    "chunks": head(200, [("Transfer-Encoding", "chunked")]) + chunk(b"01234") + chunk(b"56789") + LAST_CHUNK,
}


@pytest.mark.parametrize("ending", ["close", "reset"])
@pytest.mark.parametrize("framing", FRAMED)
async def test_answer_cut_anywhere_is_a_failure(framing: str, ending: str) -> None:
    whole = FRAMED[framing]
    async with pooled(b"") as (pool, upstream):
        for cut in range(len(whole)):
            upstream.script = cut_short(whole[:cut], ending)
            with pytest.raises(UpstreamFailed) as caught:
                await fetch(pool)
            assert (caught.value.status, caught.value.code) == (502, "upstream_disconnected")
        assert len(upstream.requests) == len(whole), "a request on a fresh connection is sent once"
        upstream.script = cut_short(whole, ending)
        if ending == "close":
            assert await fetch(pool) == (200, b"0123456789")


async def test_body_without_length_ends_with_the_connection() -> None:
    async def script(link: Link, request: Request) -> None:
        await link.send(head(200) + b"0123456789")
        link.close()

    async with pooled(script) as (pool, upstream):
        assert await fetch(pool) == (200, b"0123456789")
        assert await fetch(pool) == (200, b"0123456789")
        assert len(upstream.links) == 2


async def test_body_without_length_that_ends_with_a_reset_is_a_failure() -> None:
    got_it = asyncio.Event()

    async def script(link: Link, request: Request) -> None:
        await link.send(head(200) + b"0123456789")
        await got_it.wait()
        link.reset()

    async with pooled(script) as (pool, _), pool.request(POST) as response:
        await response.first_piece()
        got_it.set()
        with pytest.raises(UpstreamFailed):
            await response.read(1000)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(b"garbage\r\n\r\n", id="garbage"),
        pytest.param(b"<html>hello</html>", id="html"),
        pytest.param(head(200, version="HTTP/9.9") + b"x", id="version"),
        pytest.param(head(200, [("Content-Length", "5"), ("Content-Length", "6")]) + b"012345", id="two lengths"),
        pytest.param(head(200, [("Content-Length", "-1")]) + b"0", id="negative length"),
        pytest.param(head(200, [("Content-Length", "0x5")]) + b"01234", id="hexadecimal length"),
        pytest.param(head(200, [("Content-Length", "9" * 30)]) + b"0", id="huge length"),
        pytest.param(
            head(200, [("Content-Length", "3"), ("Transfer-Encoding", "chunked")]) + b"3\r\nabc\r\n0\r\n\r\n",
            id="length and chunks",
        ),
        pytest.param(head(200, [("Transfer-Encoding", "chunked")]) + b"zz\r\nabc\r\n", id="bad chunk size"),
        pytest.param(head(200, [("Transfer-Encoding", "chunked")]) + b"-1\r\nabc\r\n", id="negative chunk size"),
        pytest.param(head(200, [("Transfer-Encoding", "chunked")]) + b"f" * 20 + b"\r\n", id="huge chunk size"),
        pytest.param(head(200, [("Transfer-Encoding", "chunked")]) + b"3\r\nabcde\r\n0\r\n\r\n", id="long chunk"),
        pytest.param(b"HTTP/1.1 200 OK\r\nX-Bad: a\x00b\r\nContent-Length: 0\r\n\r\n", id="NUL in a header"),
        pytest.param(b"HTTP/1.1 200 OK\r\nBad name: x\r\nContent-Length: 0\r\n\r\n", id="space in a header name"),
        pytest.param(head(101, [("Upgrade", "x"), ("Connection", "Upgrade")]), id="upgrade nobody asked for"),
        pytest.param(b"HTTP/1.1 200 OK\r\n" + b"X-Fill: 0123456789\r\n" * 4000, id="64 KiB of headers"),
        pytest.param(b"HTTP/1.1 200 OK\r\nX-Fill: " + b"x" * 70_000, id="a header of 64 KiB"),
    ],
)
async def test_answer_that_is_not_http_is_a_failure_at_once(answer: bytes) -> None:
    async with pooled(answer) as (pool, upstream):
        with pytest.raises(UpstreamFailed) as caught:
            await fetch(pool)
        assert caught.value.status == 502
        await until(lambda: upstream.open_links == 0, what="the closed connection")


# -- which connections live on -----------------------------------------------------------------------------------------


async def test_connection_is_used_again_after_a_whole_answer() -> None:
    for answer in FRAMED.values():
        async with pooled(answer) as (pool, upstream):
            for _ in range(5):
                await fetch(pool)
            assert len(upstream.links) == 1


@pytest.mark.parametrize(
    "value", ["timeout=0", "timeout=1", "timeout=2, max=1", "timeout=", "max=5", "timeout=999999999999"]
)
async def test_any_keep_alive_header_is_understood(value: str) -> None:
    async with pooled(plain(b"{}", headers=[("Keep-Alive", value)])) as (pool, upstream):
        for _ in range(3):
            assert await fetch(pool) == (200, b"{}")
        assert len(upstream.requests) == 3


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(plain(b"{}", headers=[("Connection", "close")]), id="close"),
        pytest.param(plain(b"{}").replace(b"HTTP/1.1", b"HTTP/1.0"), id="HTTP/1.0"),
    ],
)
async def test_connection_is_not_used_again_when_the_server_says_so(answer: bytes) -> None:
    async with pooled(answer) as (pool, upstream):
        for _ in range(2):
            assert await fetch(pool) == (200, b"{}")
        assert len(upstream.links) == 2
        await until(lambda: upstream.open_links == 0, what="the closed connections")


async def test_blanks_in_front_of_an_answer_do_not_show_what_it_is() -> None:
    go_on = asyncio.Event()

    async def script(link: Link, request: Request) -> None:
        await link.send(toxic.EVENT_HEAD + chunk(b"\r\n"))
        await go_on.wait()
        await link.send(chunk(b"{}") + LAST_CHUNK)

    async with pooled(script) as (pool, _), pool.request(POST) as response:
        await response.first_piece()
        shown = asyncio.ensure_future(response.first_piece(blanks=False))
        await asyncio.sleep(0)
        assert response.peek() == b"\r\n" and not shown.done()
        go_on.set()
        await shown
        assert response.peek() == b"\r\n{}"
        assert await response.read(100) == b"\r\n{}"


async def test_answer_left_unread_closes_its_connection_at_once() -> None:
    async def script(link: Link, request: Request) -> None:
        await link.send(toxic.EVENT_HEAD + chunk(b"data: 1\n\n"))
        await link.gone()

    async with pooled(script) as (pool, upstream):
        async with pool.request(POST) as response:
            await response.first_piece()
            assert upstream.open_links == 1
        await until(lambda: upstream.open_links == 0, what="the closed connection")


async def test_cancelled_while_waiting_for_the_answer_closes_its_connection() -> None:
    async def script(link: Link, request: Request) -> None:
        await link.gone()

    async with pooled(script) as (pool, upstream):
        task = asyncio.create_task(fetch(pool))
        await until(lambda: upstream.requests)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await until(lambda: upstream.open_links == 0, what="the closed connection")


async def test_server_that_talks_unasked_is_not_listened_to() -> None:
    async with pooled(plain(b"{}")) as (pool, upstream):
        await fetch(pool)
        await upstream.links[0].send(plain(b"poison"))
        await until(lambda: upstream.open_links == 0, what="the closed connection")
        assert await fetch(pool) == (200, b"{}")


async def test_close_fails_what_is_under_way_and_what_comes_later() -> None:
    async def script(link: Link, request: Request) -> None:
        await link.gone()

    async with pooled(script) as (pool, upstream):
        task = asyncio.create_task(fetch(pool))
        await until(lambda: upstream.requests)
        pool.close("it is being stopped")
        with pytest.raises(UpstreamFailed):
            await task
        with pytest.raises(UpstreamFailed):
            await fetch(pool)


# -- limits of patience ------------------------------------------------------------------------------------------------

SILENT = {
    "nothing": b"",
    "half a head": head(200)[:-2],
    "an informational answer": head(100),
    "half a body": plain(b"0123456789")[:-1],
    "half a chunked body": toxic.EVENT_HEAD + chunk(b"data: 1\n\n"),
}


@pytest.mark.parametrize("said", SILENT)
async def test_silence_is_a_504(said: str) -> None:
    async def script(link: Link, request: Request) -> None:
        await link.send(SILENT[said])
        await link.gone()

    async with pooled(script, Timeouts(first_byte_s=0.1, idle_s=0.1)) as (pool, upstream):
        with pytest.raises(UpstreamFailed) as caught:
            await fetch(pool)
        assert (caught.value.status, caught.value.code) == (504, "upstream_timeout")
        await until(lambda: upstream.requests, what="the request")  # even if all of this was late
        await until(lambda: upstream.open_links == 0, what="the closed connection")
        assert len(upstream.requests) == 1


async def test_headers_alone_do_not_end_the_wait_for_the_first_byte() -> None:
    """vLLM sends the headers of a stream at once, and the first token when the prompt is processed."""
    go_on = asyncio.Event()

    async def script(link: Link, request: Request) -> None:
        await link.send(toxic.EVENT_HEAD)
        await go_on.wait()
        await link.send(chunk(b"data: 1\n\n") + LAST_CHUNK)

    async with pooled(script, Timeouts(first_byte_s=30, idle_s=0.05)) as (pool, _), pool.request(POST) as response:
        waiting = asyncio.create_task(response.first_piece())
        _, pending = await asyncio.wait({waiting}, timeout=0.5)
        assert pending, f"gave up after the time allowed between two tokens: {waiting.exception()}"
        go_on.set()
        await waiting
        assert await response.read(1000) == b"data: 1\n\n"


async def test_nobody_listening_is_a_502() -> None:
    pool = ConnectionPool(Endpoint("127.0.0.1", free_port()))
    with pytest.raises(UpstreamFailed) as caught:
        await fetch(pool)
    assert caught.value.status == 502


async def test_answer_too_large_to_fetch_is_a_failure() -> None:
    async with pooled(plain(b"x" * 2**21)) as (pool, upstream):
        with pytest.raises(UpstreamFailed):
            await pool.fetch(GET, timeout_s=FETCH_S, limit=1000)
        await until(lambda: upstream.open_links == 0, what="the closed connection")
