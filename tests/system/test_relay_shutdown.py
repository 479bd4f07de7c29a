"""SIGTERM while answers of a remote are under way: what is begun comes to its end, or says why not."""

from __future__ import annotations

import signal
from contextlib import AsyncExitStack

import pytest

from tests.support.e2e_support import error_of, streaming
from tests.support.harness import Proxy, running_proxy, until
from tests.support.raw_client import BrokenAnswer, connected, get, request
from tests.support.toxic import EVENT_HEAD, Link, RawUpstream, Request, chunk, own_proxy, plain, raw_upstream, token

CHAT = "/v1/chat/completions"
PLAIN = {"model": "m"}
MB = b"x" * 1_000_000
SMALL_BUFFER = 128 * 1024
LONG_S = 60.0
"""Nothing here takes so long on any machine; a defect takes for ever."""


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


async def test_a_stream_of_a_remote_that_is_cut_off_at_the_end_of_the_drain_is_told_so() -> None:
    async def script(link: Link, request: Request) -> None:
        await link.send(EVENT_HEAD + chunk(token("a")))
        await link.gone()

    async with raw_upstream(script) as upstream:
        remote = {"url": f"http://127.0.0.1:{upstream.port}", "models": ["m"]}
        async with running_proxy({"server": {"drain_s": 0.3}, "remotes": {"up": remote}}) as proxy:
            async with streaming(proxy, "m") as stream:
                await stream.until_text()
                proxy.send(signal.SIGTERM)
                assert error_of(await stream.rest())["code"] == "shutting_down"
            assert await proxy.ended(LONG_S) == 0
