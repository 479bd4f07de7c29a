"""Clients that leave, stop reading, or read slowly; and connections that went stale while nobody used them."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from contextlib import AsyncExitStack
from functools import partial

import pytest

from tests.support import raw_client, toxic
from tests.support.harness import Proxy, running_proxy, until
from tests.support.raw_client import RawClient, connected, get, post, request
from tests.support.toxic import (
    DONE,
    EVENT_HEAD,
    LAST_CHUNK,
    Link,
    RawUpstream,
    Request,
    chunk,
    head,
    own_proxy,
    plain,
    raw_upstream,
    token,
)

CHAT = "/v1/chat/completions"
PLAIN = {"model": "m"}
STREAM = {"model": "m", "stream": True}
EVENTS = ("Content-Type", "text/event-stream")
CHUNKED = ("Transfer-Encoding", "chunked")
MIB = 2**20
TRIES = 5
SMALL_BUFFER = 128 * 1024
"""Smaller ones make loopback crawl: its segments have 64 KiB."""


async def released(upstream: RawUpstream) -> None:
    """Return when no connection to `upstream` is left: long before any timeout of the proxy."""
    await until(lambda: upstream.open_links == 0, what="the closed upstream connection")


# -- clients that leave ------------------------------------------------------------------------------------------------

PHASES = {
    "before the headers": b"",
    "before the first byte": EVENT_HEAD,
    "in mid-stream": EVENT_HEAD + chunk(token("a")),
    "in mid-event": EVENT_HEAD + chunk(token("a")[:20]),
    "in a plain answer": plain(b"x" * 100)[:-50],
    "in a large answer": plain(b"x" * 4 * MIB)[: 2 * MIB],
}


@pytest.mark.parametrize("phase", PHASES)
async def test_client_that_leaves_frees_the_model_server_at_once(
    proxy: Proxy, upstream: RawUpstream, phase: str
) -> None:
    async def script(link: Link, request: Request) -> None:
        await link.send(PHASES[phase])
        await link.gone()

    upstream.script = script
    for number in range(TRIES):
        async with connected(proxy.port) as client:
            await client.send(request("POST", CHAT, STREAM))
            await until(partial(lambda count: len(upstream.requests) > count, number))
            if phase in ("in mid-stream", "in a large answer"):
                await client.head()
                assert await (client.chunk() if phase == "in mid-stream" else client.some())
            client.leave()
            await released(upstream)
    assert len(upstream.requests) == TRIES, "nobody was left to try again for"
    assert (await get(proxy.port, "/health")).status == 200


async def test_client_that_leaves_while_it_sends_causes_no_request(proxy: Proxy, upstream: RawUpstream) -> None:
    whole = request("POST", CHAT, STREAM)
    for cut in (1, 20, whole.index(b"\r\n\r\n") + 4, len(whole) - 1):
        async with connected(proxy.port) as client:
            await client.send(whole[:cut])
            client.leave()
    assert (await get(proxy.port, "/health")).status == 200
    assert upstream.links == []


async def test_a_client_that_leaves_has_an_access_line() -> None:
    async def script(link: Link, request: Request) -> None:
        await link.send(EVENT_HEAD + chunk(token("a")))
        await link.gone()

    async with own_proxy() as (proxy, upstream):
        upstream.script = script
        async with connected(proxy.port) as client:
            await client.send(request("POST", CHAT, STREAM))
            await client.head()
        await until(lambda: f"POST {CHAT} 499 model=m " in proxy.log)


async def test_half_closed_client_gets_everything_or_a_clean_end(proxy: Proxy, upstream: RawUpstream) -> None:
    async def script(link: Link, request: Request) -> None:
        await link.send(EVENT_HEAD + chunk(token("a")))
        await link.send(chunk(DONE) + LAST_CHUNK)

    upstream.script = script
    async with connected(proxy.port) as client:
        await client.send(request("POST", CHAT, STREAM))
        client.half_close()
        with contextlib.suppress(raw_client.BrokenAnswer, ConnectionError):
            assert (await client.answer()).body == token("a") + DONE
        await client.closed_by_peer()


async def test_half_closed_client_frees_the_model_server(proxy: Proxy, upstream: RawUpstream) -> None:
    """It either gets its answer, however long that takes, or is taken for gone: then the model server hears of it."""

    async def script(link: Link, request: Request) -> None:
        await link.send(EVENT_HEAD + chunk(token("a")))
        await link.gone()

    upstream.script = script
    async with connected(proxy.port) as client:
        await client.send(request("POST", CHAT, STREAM))
        await client.head()
        await client.chunk()
        client.half_close()
        await released(upstream)


# -- slow readers ------------------------------------------------------------------------------------------------------


async def pump(link: Link, request: Request) -> None:
    """Send events as fast as they are taken, until the other side goes."""
    start = EVENT_HEAD
    if not request.json().get("stream"):
        start = head(200, [("Content-Type", "application/json"), ("Content-Length", str(2**40))])
    await link.send(start)
    piece = token("x" * 32_000)
    while True:
        await link.send(chunk(piece) if start is EVENT_HEAD else piece)


async def stalled(link: Link) -> int:
    """Wait until `link` has not got rid of a byte for half a second; the bytes it got rid of in all."""
    last, since = -1, time.monotonic()

    def still() -> bool:
        nonlocal last, since
        if link.accepted != last:
            last, since = link.accepted, time.monotonic()
        return time.monotonic() - since > 0.5

    await until(still, what="the stalled upstream")
    return last


async def test_reader_that_stops_stops_the_model_server_through_translation_and_agents_too() -> None:
    agents = [{name: {"always": False}} for name in ("think", "redact", "shield")]
    asked = [("/api/chat", "m"), ("/v1/responses", "m"), *((CHAT, name) for name in ("all", "t"))]
    async with raw_upstream(pump) as upstream, AsyncExitStack() as stack:
        models = {"all": ["think", "redact", "shield"], "t": ["think"]}
        config = {
            "remotes": {"up": {"url": f"http://127.0.0.1:{upstream.port}", "models": ["m"]}},
            "agents": agents,
            "models": {name: {"model": "m", "agents": chain} for name, chain in models.items()},
        }
        proxy = await stack.enter_async_context(running_proxy(config))
        before = proxy.rss_bytes()
        for path, model in asked:
            client = await stack.enter_async_context(connected(proxy.port, receive_buffer=SMALL_BUFFER))
            body = {"model": model, "stream": True, "messages": [{"role": "user", "content": "hi"}], "input": "hi"}
            await client.send(request("POST", path, body | {"max_tokens": 9}))
            await client.head()
        taken = await asyncio.gather(*map(stalled, upstream.links))
        assert max(taken) < 24 * MIB, "that is more than the kernel's own buffers"
        assert proxy.rss_bytes() - before < 8 * MIB * len(asked)
        assert (await get(proxy.port, "/health")).status == 200


@pytest.mark.parametrize("streaming", [True, False])
async def test_reader_that_stops_stops_the_model_server(proxy: Proxy, upstream: RawUpstream, streaming: bool) -> None:
    upstream.script = pump
    before = proxy.rss_bytes()
    async with connected(proxy.port, receive_buffer=SMALL_BUFFER) as client:
        await client.send(request("POST", CHAT, {"model": "m", "stream": streaming}))
        await client.head()
        await until(lambda: bool(upstream.links))
        (link,) = upstream.links
        taken = await stalled(link)
        assert taken < 24 * MIB, "that is more than the kernel's own buffers"
        assert proxy.rss_bytes() - before < 8 * MIB
        assert (await get(proxy.port, "/health")).status == 200

        while link.accepted < taken + 8 * MIB:  # the reader goes on, and so does the server
            assert await (client.chunk() if streaming else client.some())
        client.leave()
    await released(upstream)


async def test_reader_that_takes_nothing_is_cut_off_and_a_slow_one_is_not() -> None:
    async with own_proxy(send_stall_s=3.0) as (proxy, upstream), AsyncExitStack() as stack:
        upstream.script = pump
        opening = [connected(proxy.port, receive_buffer=SMALL_BUFFER) for _ in range(6)]
        slow, *stopped = [await stack.enter_async_context(client) for client in opening]
        before = proxy.rss_bytes()
        for client in (slow, *stopped):
            await client.send(request("POST", CHAT, STREAM))
        await slow.head()
        await until(lambda: len(upstream.requests) == 6)
        reading = asyncio.create_task(sip(slow, bytes_per_s=800_000, seconds=4.5))
        await until(lambda: upstream.open_links == 1, what="the end of the stopped readers")
        await until(lambda: proxy.log.count("read nothing for 3 s: disconnected") >= len(stopped), what="the log lines")
        assert proxy.log.count("read nothing for 3 s: disconnected") == len(stopped)
        assert proxy.rss_bytes() - before < 12 * MIB
        assert await reading > 0
        assert upstream.open_links == 1, "a slow reader is not a stopped one"


async def sip(client: RawClient, *, bytes_per_s: int, seconds: float) -> int:
    """Read at a steady slow pace; the bytes read."""
    ends, total = time.monotonic() + seconds, 0
    while time.monotonic() < ends:
        total += len(await client.exactly(bytes_per_s // 20))
        await asyncio.sleep(1 / 20)
    return total


@pytest.mark.full
async def test_a_hundred_slow_readers_disturb_nobody() -> None:
    async with own_proxy(send_stall_s=5.0) as (proxy, upstream), AsyncExitStack() as stack:

        async def script(link: Link, request: Request) -> None:
            await (pump(link, request) if request.json().get("flood") else link.send(toxic.stream(token("a"), DONE)))

        upstream.script = script
        clients = [await stack.enter_async_context(connected(proxy.port, receive_buffer=4096)) for _ in range(100)]
        before = proxy.rss_bytes()
        for client in clients:
            await client.send(request("POST", CHAT, STREAM | {"flood": True}))
        reading = asyncio.gather(*(sip(client, bytes_per_s=1024, seconds=12) for client in clients))
        served = 0
        while not reading.done():
            assert (await post(proxy.port, CHAT, STREAM)).body == token("a") + DONE
            served += 1
            assert proxy.rss_bytes() - before <= 60 * MIB
            await asyncio.sleep(0.05)
        await reading
        assert served >= 5, "others had to wait"
        await until(lambda: upstream.open_links <= 1, what="the end of readers that stopped for 5 s")


# -- connections gone stale --------------------------------------------------------------------------------------------


async def test_server_that_closes_idle_connections_at_any_moment_costs_no_failure(
    proxy: Proxy, upstream: RawUpstream
) -> None:
    """500 requests, none fails, and none is sent more than twice."""
    chance = random.Random(13)
    loop = asyncio.get_running_loop()

    async def script(link: Link, request: Request) -> None:
        await link.send(plain(b"{}"))
        if chance.random() < 0.5:
            loop.call_later(chance.random() * 0.01, link.reset if chance.random() < 0.3 else link.close)

    async def client(numbers: range) -> None:
        async with connected(proxy.port) as connection:
            for number in numbers:
                await connection.send(request("POST", CHAT, {"model": "m", "seed": number}))
                assert (await connection.answer()).status == 200
                if chance.random() < 0.5:
                    await asyncio.sleep(chance.random() * 0.01)

    upstream.script = script
    async with asyncio.TaskGroup() as group:
        for first in range(0, 500, 100):
            group.create_task(client(range(first, first + 100)))
    sent = Counter(request.json()["seed"] for request in upstream.requests)
    assert len(sent) == 500
    assert max(sent.values()) <= 2
    assert len(upstream.links) > 50, "hardly a connection was closed: this proves nothing"


async def test_connections_closed_long_ago_cost_no_retry() -> None:
    async with own_proxy(plain(b"{}")) as (proxy, upstream):  # whose log nobody else writes to
        for _ in range(5):
            assert (await post(proxy.port, CHAT, {"model": "m"})).status == 200
            for link in upstream.links:
                if link.closed is None:
                    link.half_close()
                    await link.gone()  # the proxy has noticed, and closed its side
        assert len(upstream.requests) == 5
        await until(lambda: proxy.log.count(f"POST {CHAT} 200") == 5, what="the log")
        assert "retrying" not in proxy.log


class Hasty(asyncio.Protocol):
    """A server that answers 413 to the first bytes of a request and then reads no more."""

    def __init__(self, connections: list[Hasty]) -> None:
        connections.append(self)
        self.open = True
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False

    def data_received(self, data: bytes) -> None:
        self.transport.pause_reading()
        self.transport.write(plain(b"{}", 413))


async def test_a_connection_whose_request_was_not_written_whole_is_not_used_again() -> None:
    connections: list[Hasty] = []
    server = await asyncio.get_running_loop().create_server(lambda: Hasty(connections), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    remote = {"url": f"http://127.0.0.1:{port}", "models": ["m"], "first_byte_timeout_s": 60}
    async with running_proxy({"remotes": {"up": remote}}) as proxy:
        assert (await post(proxy.port, CHAT, PLAIN | {"text": "y" * 20_000_000})).status == 413
        assert (await post(proxy.port, CHAT, PLAIN)).status == 413
    server.close()
    for connection in connections:
        connection.transport.abort()
    await until(lambda: not any(connection.open for connection in connections))
    assert len(connections) == 2


@pytest.mark.parametrize(("streamed", "links"), [(True, 5), (False, 1)])
async def test_a_stream_of_llama_server_is_the_last_on_its_connection(
    proxy: Proxy, upstream: RawUpstream, streamed: bool, links: int
) -> None:
    """It closes the connection behind a stream, without having said so."""
    ours = ("Server", "llama.cpp")
    events = head(200, [ours, EVENTS, CHUNKED]) + chunk(token("a")) + chunk(DONE) + LAST_CHUNK
    upstream.script = events if streamed else plain(b"{}", headers=[ours])
    for _ in range(5):
        assert (await post(proxy.port, CHAT, PLAIN | {"stream": streamed})).status == 200
    assert len(upstream.links) == links
    assert len(upstream.requests) == 5
