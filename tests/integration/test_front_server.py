"""The proxy's server in this very process: clients that take nothing are not waited for."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from llama_smart_proxy.backends.http.exchange import BUFFER_LIMIT
from llama_smart_proxy.proxy.dialects.arguments import mend_arguments
from llama_smart_proxy.proxy.http.server import FrontServer
from tests.support.harness import until
from tests.support.here import served_here
from tests.support.raw_client import RawClient, connected, request
from tests.support.toxic import EVENT_HEAD, Link, RawUpstream, Request, chunk, plain, raw_upstream, token

CHAT = "/v1/chat/completions"
PLAIN = {"model": "m"}
STREAM = {"model": "m", "stream": True}
LONG_S = 60.0
"""Nothing here takes so long on any machine; a defect takes for ever."""


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


async def test_the_calls_of_a_long_chat_are_looked_through_beside_the_event_loop() -> None:
    calls = [{"function": {"arguments": "1"}} for _ in range(100_000)]
    body = {"model": "m", "messages": [{"role": "assistant", "tool_calls": calls}]}
    data = json.dumps(body).encode()
    begun = time.thread_time()
    mend_arguments(body)
    took_s = time.thread_time() - begun
    async with serving_here() as here, connected(here.port) as client:
        here.upstream.script = plain(b"{}")
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode()
        begun = time.thread_time()  # of the thread of the event loop, the client and the upstream
        await client.send(head + data)
        assert (await client.answer()).status == 200
        assert time.thread_time() - begun < took_s


async def test_an_answer_that_is_complete_when_its_connection_is_closed_is_sent() -> None:
    async with serving_here() as here, connected(here.port) as client:
        here.upstream.script = plain(b"{}")
        await until(lambda: bool(here.front.clients))
        (server_side,) = here.front.clients
        began = False

        def close_when_answered() -> None:
            nonlocal began
            began = began or not here.front.quiet.is_set()
            if began and here.front.quiet.is_set():
                server_side.close()
            else:
                asyncio.get_running_loop().call_soon(close_when_answered)

        close_when_answered()
        await client.send(request("POST", CHAT, json.dumps(PLAIN).encode()))
        assert (await client.answer()).status == 200
