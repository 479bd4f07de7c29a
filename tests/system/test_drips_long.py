"""Peers that drip for as long as they may, at the limits that the proxy has by default."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, suppress

import pytest

from tests.support.harness import Proxy
from tests.support.raw_client import RawClient, connected, get, request
from tests.support.toxic import EVENT_HEAD, Link, Request, chunk, head, own_proxy

CHAT = "/v1/chat/completions"
ASKED = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}
CHUNKED = request("POST", CHAT, headers=[("Transfer-Encoding", "chunked")])
SERVERS = {
    "a status line": (b"HTTP/1.1 200 ", b"O"),
    "a header": (b"HTTP/1.1 200 OK\r\nX: ", b"x"),
    "a header behind early hints": (head(103) + b"HTTP/1.1 200 OK\r\nX: ", b"x"),
}
CLIENTS = {
    "a request line": (b"GET /", b"x"),
    "a header": (b"GET / HTTP/1.1\r\nX: ", b"x"),
    "a body": (request("POST", CHAT, headers=[("Content-Length", "100000")]), b" "),
    "a chunk size": (CHUNKED, b"0"),
    "an extension": (CHUNKED + b"5;", b"x"),
    "a trailer": (CHUNKED + chunk(b'{"model":"none"}') + b"0\r\nX: ", b"x"),
}
LIMIT_S = 90.0
"""Of a minute for the heads of servers, and for a body of which nothing more comes."""


async def received(client: RawClient) -> bytes:
    """All that the proxy sends until it closes the connection."""
    with suppress(ConnectionError):
        return await client.reader.read()
    return b""


async def dripped(client: RawClient, again: bytes) -> None:
    with suppress(ConnectionError):
        while True:
            await client.send(again)
            await asyncio.sleep(1.0)


@pytest.mark.full
async def test_who_drips_a_byte_a_second_is_ended_within_a_minute_and_disturbs_nobody() -> None:
    async def script(link: Link, asked: Request) -> None:
        first, again = SERVERS.get(asked.json().get("user", ""), (EVENT_HEAD, b""))
        await link.send(first)
        while link.closed is None:
            await link.send(again)
            await asyncio.sleep(1.0)

    async with own_proxy(script) as (proxy, upstream), AsyncExitStack() as stack, asyncio.timeout(LIMIT_S):
        answers, dripping = [], []
        for name in SERVERS:
            client = await stack.enter_async_context(connected(proxy.port))
            await client.send(request("POST", CHAT, {**ASKED, "user": name}, close=True))
            answers.append(asyncio.create_task(received(client)))
        for first, again in CLIENTS.values():
            client = await stack.enter_async_context(connected(proxy.port))
            await client.send(first)
            dripping += [asyncio.create_task(received(client)), asyncio.create_task(dripped(client, again))]
        while not all(task.done() for task in (*answers, *dripping)):
            assert await _is_served(proxy)
            await asyncio.sleep(0.2)
        for answer in answers:
            assert b" 504 " in await answer and b"headers took over 60 s" in await answer
        assert upstream.open_links == 0


async def _is_served(proxy: Proxy) -> bool:
    return (await get(proxy.port, "/health")).status == 200
