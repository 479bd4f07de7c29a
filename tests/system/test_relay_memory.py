"""The proxy's memory: what it held of requests and answers is let go, and what has no end is not stored."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.support.harness import until
from tests.support.raw_client import connected, get, post, request
from tests.support.toxic import DONE, Link, Request, cut_short, forget, own_proxy, plain, stream, token

CHAT = "/v1/chat/completions"
PLAIN = {"model": "m"}
STREAM = {"model": "m", "stream": True}
MIB = 2**20
MB = b"x" * 1_000_000
LONG_S = 60.0
"""Nothing here takes so long on any machine; a defect takes for ever."""


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
        assert proxy.rss_bytes() - before < 80 * MIB


@pytest.mark.full
async def test_memory_that_many_requests_took_at_once_is_given_back_when_they_are_over() -> None:
    messages = [{"role": "user", "content": "data \n" * 1900} for _ in range(100)]
    body = json.dumps(PLAIN | {"messages": messages}).encode()
    async with own_proxy(plain(b"{}")) as (proxy, upstream):
        assert (await post(proxy.port, CHAT, body)).status == 200
        before = proxy.rss_bytes()
        for _ in range(3):
            answers = await asyncio.gather(*(post(proxy.port, CHAT, body) for _ in range(200)))
            assert {answer.status for answer in answers} == {200}
            forget(upstream)
        assert proxy.peak_rss_bytes() - before > 100 * MIB, "it took none: this test shows nothing"
        await until(lambda: proxy.rss_bytes() - before < 80 * MIB, what="the memory given back")


async def test_a_pipelining_client_that_does_not_read_is_neither_waited_for_nor_stored() -> None:
    async with own_proxy(send_stall_s=1, keepalive_timeout_s=1) as (proxy, upstream):
        upstream.script = plain(MB)
        assert (await post(proxy.port, CHAT, PLAIN)).status == 200
        before = proxy.rss_bytes()
        async with connected(proxy.port, receive_buffer=4096) as client:
            await client.send(request("POST", CHAT, PLAIN) * 100)
            await until(lambda: "read nothing for 1 s: disconnected" in proxy.log, LONG_S)
        assert len(upstream.requests) < 50, "the kernel's buffers hold no more than a few"
        assert proxy.peak_rss_bytes() - before < 32 * MIB
        assert (await get(proxy.port, "/health")).status == 200
