"""Long streams and long events."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.harness import Proxy, running_proxy
from tests.support.raw_client import connected, post, request
from tests.support.toxic import DONE, EVENT_HEAD, LAST_CHUNK, Link, RawUpstream, Request, chunk, raw_upstream, token

CHAT = "/v1/chat/completions"
STREAM = {"model": "m", "stream": True}
MIB = 2**20


async def test_event_of_6_mib_passes(proxy: Proxy, upstream: RawUpstream) -> None:
    large = token("x" * (6 * MIB))

    async def script(link: Link, request: Request) -> None:
        await link.send(EVENT_HEAD)
        for at in range(0, len(large), 100_000):
            await link.send(chunk(large[at : at + 100_000]))
        await link.send(chunk(DONE) + LAST_CHUNK)

    upstream.script = script
    assert (await post(proxy.port, CHAT, STREAM)).body == large + DONE


@pytest.mark.parametrize("before", [b"", token("a")])
async def test_event_of_9_mib_is_an_error(proxy: Proxy, upstream: RawUpstream, before: bytes) -> None:
    large = token("x" * (9 * MIB))

    async def script(link: Link, request: Request) -> None:
        await link.send(EVENT_HEAD)
        for at in range(0, len(large), 100_000):
            await link.send(chunk(before * (not at) + large[at : at + 100_000]))
        await link.send(chunk(DONE) + LAST_CHUNK)
        await link.gone()

    upstream.script = script
    answer = await post(proxy.port, CHAT, STREAM)
    assert answer.body.startswith(before + b'data: {"error"') and answer.body.endswith(DONE)
    assert b"xxxx" not in answer.body and b"upstream_frame_too_long" in answer.body
    assert len(upstream.requests) == 1


async def paced_stream(*, tokens: int, every_s: float, remote: dict[str, float], server: dict[str, float]) -> None:
    """A stream with a token every `every_s` seconds arrives whole, and its connection is good for another request."""

    async def script(link: Link, request: Request) -> None:
        await link.send(EVENT_HEAD)
        for number in range(tokens):
            await link.send(chunk(token(str(number))))
            await asyncio.sleep(every_s)
        await link.send(chunk(DONE) + LAST_CHUNK)

    async with raw_upstream(script) as upstream:
        target = {"url": f"http://127.0.0.1:{upstream.port}", "models": ["m"], **remote}
        async with (
            running_proxy({"server": server, "remotes": {"up": target}}) as proxy,
            connected(proxy.port) as client,
        ):
            await client.send(request("POST", CHAT, STREAM))
            await client.head()
            for number in range(tokens):
                assert await client.chunk() == token(str(number))
            assert await client.chunk() == DONE
            assert await client.chunk() == b""
            await client.send(request("GET", "/health"))
            assert (await client.answer()).status == 200


async def test_stream_longer_than_every_timeout_is_not_cut() -> None:
    remote = {"connect_timeout_s": 4.0, "first_byte_timeout_s": 4.0, "idle_timeout_s": 4.0}
    server = {"head_timeout_s": 4.0, "keepalive_timeout_s": 4.0, "send_stall_s": 4.0}
    await paced_stream(tokens=15, every_s=0.4, remote=remote, server=server)


async def test_stream_that_falls_silent_is_told_so() -> None:
    async def script(link: Link, request: Request) -> None:
        await link.send(EVENT_HEAD + chunk(token("a")))
        await link.gone()

    async with raw_upstream(script) as upstream:
        target = {"url": f"http://127.0.0.1:{upstream.port}", "models": ["m"], "idle_timeout_s": 0.3}
        async with running_proxy({"remotes": {"up": target}}) as proxy:
            answer = await post(proxy.port, CHAT, STREAM)
            assert answer.body.startswith(token("a") + b'data: {"error"') and answer.body.endswith(DONE)
            assert b"upstream_timeout" in answer.body


@pytest.mark.full
async def test_stream_of_100_seconds_is_not_cut() -> None:
    """With the limits that the proxy has by default: longer than those for a head, a body and an idle connection."""
    await paced_stream(tokens=20, every_s=5.0, remote={}, server={})
