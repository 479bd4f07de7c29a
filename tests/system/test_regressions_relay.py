"""Defects of the relay that were found once and must not come back. Each test says what holds instead."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from llama_smart_proxy.backends.http.exchange import BUFFER_LIMIT
from llama_smart_proxy.proxy.http.server import FrontServer
from tests.support.harness import Proxy, running_proxy, until
from tests.support.here import served_here
from tests.support.raw_client import BrokenAnswer, RawClient, connected, get, post, request
from tests.support.toxic import (
    DONE,
    EVENT_HEAD,
    LAST_CHUNK,
    Link,
    RawUpstream,
    Request,
    chunk,
    cut_short,
    head,
    own_proxy,
    plain,
    raw_upstream,
    stream,
    token,
)

CHAT = "/v1/chat/completions"
PLAIN = {"model": "m"}
STREAM = {"model": "m", "stream": True}
MIB = 2**20
MB = b"x" * 1_000_000
LONG_S = 30.0
"""Nothing here takes so long on any machine; a defect takes for ever."""
SMALL_BUFFER = 128 * 1024
EVENTS = ("Content-Type", "text/event-stream")
CHUNKED = ("Transfer-Encoding", "chunked")


def forget(upstream: RawUpstream) -> None:
    """Drop what the upstream remembers of connections that are closed."""
    upstream.links[:] = [link for link in upstream.links if link.closed is None]
    upstream.requests.clear()


def peak_rss_bytes(proxy: Proxy) -> int:
    """The most memory the process ever had."""
    lines = Path(f"/proc/{proxy.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


# -- memory is let go --------------------------------------------------------------------------------------------------


async def test_a_request_body_is_let_go_with_its_stream() -> None:
    async def script(link: Link, request: Request) -> None:
        await link.send(stream(token("a"), DONE))
        link.close()

    body = json.dumps(STREAM | {"text": "y" * 8 * MIB}).encode()
    async with own_proxy() as (proxy, upstream):
        upstream.script = script
        before = 0
        for _ in range(30):
            assert (await post(proxy.port, CHAT, body)).body == token("a") + DONE
            await until(lambda: upstream.open_links == 0)
            forget(upstream)
            before = before or proxy.rss_bytes()
        assert proxy.rss_bytes() - before < 100 * MIB


async def test_what_came_of_a_truncated_answer_is_let_go() -> None:
    async with own_proxy() as (proxy, upstream):
        upstream.script = cut_short(plain(MB)[:-10], "close")
        before = 0
        for _ in range(120):  # each is tried twice
            assert (await post(proxy.port, CHAT, PLAIN)).status == 502
            forget(upstream)
            before = before or proxy.rss_bytes()
        assert proxy.rss_bytes() - before < 50 * MIB


# -- SIGTERM -----------------------------------------------------------------------------------------------------------


async def told_to_stop(proxy: Proxy) -> None:
    """Send SIGTERM; return when it has been noticed."""
    proxy.send(signal.SIGTERM)
    await until(lambda: "SIGTERM: draining" in proxy.log)


async def test_answers_that_nobody_has_read_yet_outlive_sigterm() -> None:
    async with own_proxy() as (proxy, upstream), AsyncExitStack() as stack:
        upstream.script = plain(MB)
        opening = [connected(proxy.port, receive_buffer=SMALL_BUFFER) for _ in range(8)]
        clients = [await stack.enter_async_context(client) for client in opening]
        for client in clients:
            await client.send(request("POST", CHAT, PLAIN))
        await until(lambda: len(upstream.requests) == 8)
        await told_to_stop(proxy)
        for client in clients:
            assert (await client.answer()).body == MB
        assert await proxy.ended(LONG_S) == 0


async def at_rest(proxy: Proxy, upstream: RawUpstream) -> None:
    """Return when the proxy has time for other things, and none to send anything upstream."""
    before = -1
    while before < len(upstream.requests):
        before = len(upstream.requests)
        for _ in range(20):
            assert (await get(proxy.port, "/health")).status == 200


@pytest.mark.parametrize(("size", "requests"), [(50_000, 200), (1_000_000, 10)])
async def test_sigterm_cuts_no_pipelined_answer_whose_request_went_upstream(size: int, requests: int) -> None:
    async with own_proxy() as (proxy, upstream):
        upstream.script = plain(b"x" * size)
        async with connected(proxy.port, receive_buffer=SMALL_BUFFER) as client:
            await client.send(request("POST", CHAT, PLAIN) * requests)
            await until(lambda: bool(upstream.requests))
            await at_rest(proxy, upstream)
            await told_to_stop(proxy)
            whole = 0
            with pytest.raises(BrokenAnswer, match=r"closed after b''"):
                while True:
                    whole += len((await client.answer()).body) == size
        assert 0 < whole == len(upstream.requests)
        assert await proxy.ended(LONG_S) == 0


async def test_a_request_that_is_being_uploaded_at_sigterm_is_answered() -> None:
    async with own_proxy() as (proxy, upstream):
        upstream.script = plain(b'{"answer": 42}')
        whole = request("POST", CHAT, PLAIN | {"text": "y" * 300_000}, headers=[("Expect", "100-continue")])
        async with connected(proxy.port) as client:
            await client.send(whole[:100_000])
            assert (await client.head())[1] == 100
            await told_to_stop(proxy)
            await client.send(whole[100_000:])
            answer = await client.answer()
        assert (answer.status, answer.json()) == (200, {"answer": 42})
        assert await proxy.ended(LONG_S) == 0


# -- clients that do not read ------------------------------------------------------------------------------------------


async def test_a_pipelining_client_that_does_not_read_is_neither_waited_for_nor_stored() -> None:
    async with own_proxy(send_stall_s=1, keepalive_timeout_s=1) as (proxy, upstream):
        upstream.script = plain(MB)
        assert (await post(proxy.port, CHAT, PLAIN)).status == 200
        before = proxy.rss_bytes()
        async with connected(proxy.port, receive_buffer=4096) as client:
            await client.send(request("POST", CHAT, PLAIN) * 100)
            await until(lambda: "took no byte for 1 s: disconnected" in proxy.log, LONG_S)
        assert len(upstream.requests) < 50, "the kernel's buffers hold no more than a few"
        assert peak_rss_bytes(proxy) - before < 32 * MIB
        assert (await get(proxy.port, "/health")).status == 200


@dataclass
class Here:
    """The proxy's server in this very process, so that a test can see how much a client has not taken yet."""

    front: FrontServer
    port: int
    upstream: RawUpstream

    @property
    def unsent(self) -> int:
        """Bytes that wait in our own buffers, those of the kernel being full."""
        transports = [client.transport for client in self.front.clients if client.transport is not None]
        return sum(transport.get_write_buffer_size() for transport in transports)

    @asynccontextmanager
    async def deaf_client(self) -> AsyncIterator[RawClient]:
        """A client that reads nothing, with hardly any room in the kernel for what is sent to it."""
        async with connected(self.port, receive_buffer=4096) as client:
            await until(lambda: bool(self.front.clients))
            (server_side,) = self.front.clients
            assert server_side.transport is not None
            sock = server_side.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            yield client


@asynccontextmanager
async def serving_here(send_stall_s: float = 0.5) -> AsyncIterator[Here]:
    """Clients may rest for 0.5 s and stop reading for `send_stall_s`. Model `m` is at the upstream."""
    async with raw_upstream() as upstream:
        remote = {"url": f"http://127.0.0.1:{upstream.port}", "models": ["m"]}
        limits = {"head_timeout_s": 1.0, "keepalive_timeout_s": 0.5, "send_stall_s": send_stall_s}
        async with served_here({"server": limits, "remotes": {"up": remote}}) as (front, port):
            yield Here(front, port, upstream)


@pytest.mark.parametrize("close", [False, True])
@pytest.mark.parametrize("size", [60_000, 1_000_000, 1_100_000])
async def test_a_client_that_never_reads_its_answer_is_disconnected(size: int, close: bool) -> None:
    """Less than a buffer, more than a buffer, and more than is read before the first byte leaves."""
    async with serving_here() as here, here.deaf_client() as client:
        here.upstream.script = plain(b"x" * size)
        await client.send(request("POST", CHAT, PLAIN, close=close))
        await until(lambda: here.unsent > 0)
        await until(lambda: not here.front.clients, LONG_S, what="the end of the connection")
        assert here.front.quiet.is_set()


async def fill(link: Link, unsent: Callable[[], int]) -> None:
    """Stream tokens until the proxy's buffer is so full that any ending overflows it, but not fuller."""
    await link.send(EVENT_HEAD + chunk(token("x" * 40_000)))
    await until(lambda: unsent() > 0)
    least = len(chunk(token("x" * 1000)))
    while (room := BUFFER_LIMIT - unsent()) > 100:
        before = unsent()
        await link.send(chunk(token("x" * (1000 + room - least - 20))) if room > least else chunk(b":\n" * 15 + b"\n"))
        await until(lambda before=before: unsent() > before)  # type: ignore[misc]


async def test_the_end_of_a_stream_waits_for_a_stalled_reader_only_so_long() -> None:
    async with serving_here(send_stall_s=2.0) as here, here.deaf_client() as client:  # filling takes its time
        ended = asyncio.Event()

        async def script(link: Link, request: Request) -> None:
            await fill(link, lambda: here.unsent)
            link.close()
            ended.set()

        here.upstream.script = script
        await client.send(request("POST", CHAT, STREAM))
        async with asyncio.timeout(LONG_S):
            await ended.wait()
        assert not here.front.quiet.is_set(), "the stream is not over: this proves nothing"
        await until(here.front.quiet.is_set, LONG_S, what="the end of the request")
        await until(lambda: not here.front.clients, LONG_S, what="the end of the connection")


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


# -- what HTTP says ----------------------------------------------------------------------------------------------------

NO_BODY = {
    "204": ("POST", CHAT, head(204, [EVENTS])),
    "304": ("POST", CHAT, head(304, [EVENTS])),
    "204, chunked": ("POST", CHAT, head(204, [EVENTS, CHUNKED])),
    "HEAD": ("HEAD", "/slots?model=m", head(200, [EVENTS])),
    "HEAD, chunked": ("HEAD", "/slots?model=m", head(200, [EVENTS, CHUNKED])),
}


@pytest.mark.parametrize("name", NO_BODY)
async def test_an_answer_that_can_have_no_body_has_none(proxy: Proxy, upstream: RawUpstream, name: str) -> None:
    method, path, script = NO_BODY[name]
    upstream.script = script
    async with connected(proxy.port) as client:
        await client.send(request(method, path, STREAM if method == "POST" else None))
        answer = await client.answer(method=method)
        assert answer.status == int(script.split()[1])
        assert answer.header("transfer-encoding") is None
        upstream.script = plain(b'{"next": 1}')
        await client.send(request("POST", CHAT, PLAIN))
        assert (await client.answer()).json() == {"next": 1}, "the next answer follows at once"


TRAILERS = b"0\r\nX-Evil: 1\r\nContent-Type: text/html\r\nLocation: http://evil\r\n\r\n"


@pytest.mark.parametrize("kind", ["application/json", "text/event-stream"])
async def test_trailers_do_not_become_headers(proxy: Proxy, upstream: RawUpstream, kind: str) -> None:
    body = token("a") + DONE
    upstream.script = head(200, [("Content-Type", kind), CHUNKED]) + chunk(body) + TRAILERS
    answer = await post(proxy.port, CHAT, STREAM)
    assert answer.body == body
    assert [value for name, value in answer.headers if name == "content-type"] == [kind]
    assert answer.header("x-evil") is None and answer.header("location") is None


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("GET", CHAT, {"POST"}), ("DELETE", "/props", {"GET", "HEAD", "POST"}), ("POST", "/health", {"GET", "HEAD"})],
)
async def test_405_says_what_is_allowed(proxy: Proxy, method: str, path: str, allowed: set[str]) -> None:
    async with connected(proxy.port) as client:
        await client.send(request(method, path, PLAIN))
        answer = await client.answer()
    assert answer.status == 405
    assert {word.strip() for word in (answer.header("allow") or "").split(",")} == allowed


# -- connections that must not be used again ---------------------------------------------------------------------------


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
