"""Heads and bodies that are too large or too slow, and who is served meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import TypeVar

import pytest

from tests.support.harness import Proxy, until
from tests.support.raw_client import RawClient, connected, get, post, request
from tests.support.toxic import Link, RawUpstream, Request, own_proxy, plain

CHAT = "/v1/chat/completions"
MIB = 2**20
T = TypeVar("T")


async def within(seconds: float, what: Awaitable[T]) -> T:
    async with asyncio.timeout(seconds):
        return await what


UNASKED_S = 60.0
"""Less than the 300 s after which the shared proxy closes a connection that sends its head too slowly."""


def status_of(said: bytes) -> int:
    return int(said.split(b" ", 2)[1])


# -- heads over the limits ---------------------------------------------------------------------------------------------

GET = b"GET /health HTTP/1.1\r\nHost: test\r\n"
TOO_LARGE = {
    "a line of 17 KiB": GET + b"X-A: " + b"a" * 17408 + b"\r\n\r\n",
    "a line of 17 KiB that does not end": GET + b"X-A: " + b"a" * 17408,
    "a name of 17 KiB": GET + b"a" * 17408 + b": 1\r\n\r\n",
    "a target of 17 KiB": b"GET /" + b"a" * 17408 + b" HTTP/1.1\r\nHost: test\r\n\r\n",
    "70 KiB in all": GET + b"".join(b"X-%d: %b\r\n" % (n, b"a" * 7168) for n in range(10)) + b"\r\n",
    "101 fields": GET + b"".join(b"X-%d: 1\r\n" % n for n in range(101)) + b"\r\n",
    "fields without end": GET + b"X-A: 1\r\n" * 5000,
}


@pytest.mark.parametrize("name", TOO_LARGE)
async def test_head_over_a_limit_is_refused(proxy: Proxy, name: str) -> None:
    before = proxy.rss_bytes()
    for _ in range(10):
        async with connected(proxy.port) as client:
            with contextlib.suppress(ConnectionError):
                await client.send(TOO_LARGE[name])
            said = await within(UNASKED_S, client.closed_by_peer())
        assert not said or status_of(said) == 431, said[:200]
        assert b"aaaa" not in said
    assert proxy.rss_bytes() - before < 16 * MIB


@pytest.mark.parametrize("name", ["a line of 17 KiB", "fields without end", "101 fields"])
async def test_head_over_a_limit_is_refused_in_segments_of_one_byte(proxy: Proxy, name: str) -> None:
    before = proxy.rss_bytes()
    async with connected(proxy.port) as client:
        with contextlib.suppress(ConnectionError):
            for byte in TOO_LARGE[name][:20_000]:
                await client.send(bytes([byte]))
        said = await within(UNASKED_S, client.closed_by_peer())
    assert not said or status_of(said) == 431, said[:200]
    assert proxy.rss_bytes() - before < 16 * MIB


@pytest.mark.parametrize("lines", [1, 5, 101])
@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/v1/messages?beta=true", "/api/chat", "/nothing"])
async def test_head_over_a_limit_is_refused_in_the_clients_own_api(proxy: Proxy, path: str, lines: int) -> None:
    """A line that is too long, lines that are together too long, and too many lines."""
    many = {1: [17 * 1024], 5: [15 * 1024] * 5, 101: [1] * 101}[lines]
    fields = [(f"X-{number}", "a" * size) for number, size in enumerate(many)]
    for body in ({"model": "m"}, None):
        async with connected(proxy.port) as client:
            await client.send(request("GET", "/health"))
            assert (await client.answer()).status == 200
            await client.send(request("POST", path, body, headers=fields))
            answer = await client.answer()
        assert answer.status == 431 and answer.header("x-request-id")
        assert (answer.header("request-id") == answer.header("x-request-id")) == ("messages" in path)
        error = answer.json()["error"]
        words = error if isinstance(error, str) else error["message"]
        assert "KiB" in words or "100 of them" in words
        assert isinstance(error, str) == path.startswith("/api/")
        assert (answer.json().get("type") == "error") == ("messages" in path)


async def test_head_within_the_limits_is_served(proxy: Proxy) -> None:
    for lines in ([b"X-A: " + b"a" * 16_000], [b"X-%d: %b" % (n, b"a" * 600) for n in range(90)]):
        async with connected(proxy.port) as client:
            await client.send(GET + b"\r\n".join([*lines, b"", b""]))
            assert (await client.answer()).status == 200


# -- slow heads --------------------------------------------------------------------------------------------------------


async def drip(client: RawClient, data: bytes, every_s: float) -> None:
    """Send `data` over and over, a byte at a time, until that is no longer possible."""
    with contextlib.suppress(ConnectionError):
        while True:
            for byte in data:
                await client.send(bytes([byte]))
                await asyncio.sleep(every_s)


async def test_head_that_does_not_end_is_cut_off() -> None:
    starts = [b"", b"GET", GET, GET + b"X-A: ", request("GET", "/health") + b"GET /heal"]
    limits = {"head_timeout_s": 2.0, "keepalive_timeout_s": 2.0}
    async with own_proxy(plain(b"{}"), **limits) as (proxy, _), AsyncExitStack() as stack:
        fds, began = proxy.fds(), time.monotonic()
        clients = [await stack.enter_async_context(connected(proxy.port)) for _ in range(50)]
        for number, client in enumerate(clients):
            await client.send(starts[number % len(starts)])
        dripping = [asyncio.create_task(drip(client, b"X-A: 1\r\n", 0.1)) for client in clients[1::2]]
        meanwhile = 0
        closing = asyncio.gather(*(client.closed_by_peer() for client in clients))
        while not closing.done():
            assert (await post(proxy.port, CHAT, {"model": "m"})).status == 200
            meanwhile += not closing.done()
            await asyncio.sleep(0.02)
        await closing
        assert time.monotonic() - began > 1.9
        assert meanwhile, "others had to wait"
        for task in dripping:
            task.cancel()
        await asyncio.gather(*dripping, return_exceptions=True)
        await until(lambda: proxy.fds() <= fds + 5, what="the freed file descriptors")


async def test_second_head_on_a_connection_has_no_more_time_than_the_first() -> None:
    async with (
        own_proxy(plain(b"{}"), head_timeout_s=1.0, keepalive_timeout_s=60) as (proxy, _),
        connected(proxy.port) as client,
    ):
        for _ in range(3):
            await client.send(request("GET", "/health"))
            assert (await client.answer()).status == 200
        began = time.monotonic()
        await client.send(b"GET /hea")
        await within(25, client.closed_by_peer())
        assert time.monotonic() - began > 0.9


async def test_time_limit_of_the_head_spares_everything_else() -> None:
    """Neither the pause between two requests, nor a slow body, nor a slow answer is cut by it."""
    whole, longer_s = request("POST", CHAT, {"model": "m"}), 2.5  # the limit leaves a busy client time for its head

    async def script(link: Link, request: Request) -> None:
        if request.json().get("user") == "slow":
            await asyncio.sleep(longer_s)
        await link.send(plain(b"{}"))

    async def slow_body(client: RawClient) -> None:
        await client.send(whole[:-3])
        await asyncio.sleep(longer_s)
        await client.send(whole[-3:])

    async def slow_answer(client: RawClient) -> None:
        await client.send(request("POST", CHAT, {"model": "m", "user": "slow"}))

    async def slow_next(client: RawClient) -> None:
        await client.send(whole)
        assert (await client.answer()).status == 200
        await asyncio.sleep(longer_s)
        await client.send(whole)

    async with own_proxy(script, head_timeout_s=2.0) as (proxy, _):

        async def twice(how: Callable[[RawClient], Awaitable[None]]) -> None:
            async with connected(proxy.port) as client:
                for _ in range(2):
                    await how(client)
                    assert (await client.answer()).status == 200

        await asyncio.gather(*map(twice, (slow_body, slow_answer, slow_next)))


async def test_idle_connection_is_closed_after_its_time() -> None:
    async with own_proxy(plain(b"{}"), keepalive_timeout_s=0.5) as (proxy, _), connected(proxy.port) as client:
        await client.send(request("GET", "/health"))
        assert (await client.answer()).status == 200
        assert await within(25, client.closed_by_peer()) == b""  # by default after 75 s


# -- large bodies ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large_head() -> bytes:
    return b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: test\r\n"


async def test_promise_of_10_gib_is_refused_before_it_is_read(proxy: Proxy, large_head: bytes) -> None:
    for expect in (b"", b"Expect: 100-continue\r\n"):
        async with connected(proxy.port) as client:
            await client.send(large_head + expect + b"Content-Length: %d\r\n\r\n" % (10 * 2**30))
            answer = await client.answer()
            if answer.status == 100:
                answer = await client.answer()
            assert (answer.status, answer.error["code"]) == (413, "request_too_large")
            await within(UNASKED_S, client.closed_by_peer())


async def test_large_body_is_read_no_further_than_the_limit(large_head: bytes) -> None:
    async with own_proxy(plain(b"{}"), max_body_mib=1) as (proxy, upstream):
        for framing in ("length", "chunks"):
            before = proxy.rss_bytes()
            async with connected(proxy.port) as client:
                coding = b"Transfer-Encoding: chunked" if framing == "chunks" else b"Content-Length: 10737418240"
                await client.send(large_head + coding + b"\r\n\r\n")
                sent = 0
                with contextlib.suppress(ConnectionError):
                    while sent < 64 * MIB:
                        await client.send(b"10000\r\n" + b"x" * 65536 + b"\r\n")
                        sent += 65536
                assert sent < 32 * MIB, "the kernel's own buffers hold less than that"
                said = await within(UNASKED_S, client.closed_by_peer())
                assert not said or said.startswith(b"HTTP/1.1 413"), said[:100]
            assert proxy.rss_bytes() - before < 16 * MIB
            await until(lambda: f"POST {CHAT} 413" in proxy.log, what="the access line")
        assert upstream.links == []
        assert (await post(proxy.port, CHAT, {"model": "m", "user": "x" * (MIB - 100)})).status == 200
        assert (await post(proxy.port, CHAT, {"model": "m", "user": "x" * MIB})).status == 413


async def lag_during(proxy: Proxy, work: asyncio.Task[T]) -> tuple[T, float]:
    """The result of `work`, and the most that the proxy did while a `/health` waited, in seconds of processor time."""
    most = 0.0
    async with connected(proxy.port) as client:
        while not work.done():
            before = proxy.cpu_s()
            await client.send(request("GET", "/health"))
            assert (await client.answer()).status == 200
            most = max(most, proxy.cpu_s() - before)
            await asyncio.sleep(0.005)
    return await work, most


def images(count: int, size: int) -> bytes:
    url = "data:image/png;base64," + "A" * size
    parts = [{"type": "image_url", "image_url": {"url": url}} for _ in range(count)]
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": parts}]}).encode()


BIG = {
    "1000 images": lambda: images(1000, 60_000),
    "one image": lambda: images(1, 60 * MIB),
    "small integers": lambda: b'{"model":"m","x":[' + b"1," * (16 * MIB) + b"1]}",
    "empty strings": lambda: b'{"model":"m","x":[' + b'"",' * (8 * MIB) + b"1]}",
    "empty lists": lambda: b'{"model":"m","x":[' + b"[]," * (10 * MIB) + b"1]}",
    "floats": lambda: b'{"model":"m","x":[' + b"1.5," * (4 * MIB) + b"1]}",
    "objects": lambda: b'{"model":"m","x":[' + b'{"a":1},' * (2 * MIB) + b"1]}",
}
HOSTILE = {
    "a name": lambda: b'{"model":"hf.co/a/b:' + b"a/" * (30 * MIB) + b'"}',
    "a name of Ollama's": lambda: b'{"model":"' + b"library/" * (7 * MIB) + b'"}',
    "a role": lambda: b'{"model":"m","messages":[{"role":"' + b"a" * (60 * MIB) + b'"}]}',
    "a data URL": lambda: (
        b'{"model":"m","messages":[{"role":"user","content":"data:' + b";base64" * (8 * MIB) + b'"}]}'
    ),
}
"""Made to take long where a string is looked through."""
KINDS = [*BIG, *(pytest.param(kind, marks=pytest.mark.full) for kind in HOSTILE)]


@pytest.mark.parametrize("kind", KINDS)
async def test_large_json_delays_nobody_else(proxy: Proxy, upstream: RawUpstream, kind: str) -> None:
    """A `/health` meanwhile waits for little more than one call of the parser. Processor time is what the proxy itself
    spends of that, even on a machine that is busy with something else."""
    upstream.script = plain(b"{}")
    body = (BIG | HOSTILE)[kind]()

    async def work() -> int:
        return (await post(proxy.port, CHAT, body)).status

    text, begun = b'"%b"' % (b"a" * len(body)), time.process_time()
    json.loads(text)
    limit_s = 10 * (time.process_time() - begun)  # looks through all of a string over and over take far more
    for _ in range(3):  # a busy machine may disturb one of them
        status, most = await lag_during(proxy, asyncio.create_task(work()))
        assert status in (200, 400, 413)
        if most < limit_s:
            return
    raise AssertionError(f"{most:.2f} s of work during a /health")


async def test_health_answers_while_the_model_server_does_not(proxy: Proxy, upstream: RawUpstream) -> None:
    async def script(link: Link, request: Request) -> None:
        await link.gone()

    upstream.script = script
    async with AsyncExitStack() as stack:
        for number in range(100):
            client = await stack.enter_async_context(connected(proxy.port))
            await client.send(request("POST", CHAT, {"model": "m", "seed": number}))
        await until(lambda: len(upstream.requests) == 100)
        for path in ("/health", "/v1/models", "/v1/models/m"):
            assert (await within(25, get(proxy.port, path))).status == 200  # the model server answers never
    await until(lambda: upstream.open_links == 0, what="the freed model server")
