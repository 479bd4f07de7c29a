"""At full size: a thousand slow heads, and hundreds of streams, while others are served."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from tests.support import toxic
from tests.support.harness import Proxy, running_proxy, until
from tests.support.raw_client import connected, get, post, request
from tests.support.toxic import DONE, EVENT_HEAD, LAST_CHUNK, Link, RawUpstream, Request, chunk, raw_upstream, token

CHAT = "/v1/chat/completions"
STREAM = {"model": "m", "stream": True}

pytestmark = pytest.mark.full


@asynccontextmanager
async def own_proxy() -> AsyncIterator[tuple[Proxy, RawUpstream]]:
    async with raw_upstream(toxic.plain(b"{}")) as upstream:
        remote = {"url": f"http://127.0.0.1:{upstream.port}", "models": ["m"]}
        async with running_proxy({"log_level": "info", "remotes": {"up": remote}}) as proxy:
            yield proxy, upstream


async def served_while(busy: Callable[[], bool], proxy: Proxy, path: str = "") -> None:
    """Others are served while `busy()`: one after the other, and several of them before it is over."""
    served = 0
    while busy():
        answer = await (get(proxy.port, path) if path else post(proxy.port, CHAT, {"model": "m"}))
        assert answer.status == 200
        served += 1
        await asyncio.sleep(0.01)
    assert served >= 5, "others had to wait"


@pytest.mark.skipif(shutil.which("slowhttptest") is None, reason="slowhttptest is not installed")
async def test_a_thousand_slow_heads_are_each_cut_off_while_they_go_on(tmp_path: Path) -> None:
    async with own_proxy() as (proxy, _):
        fds = proxy.fds()
        argv = f"-H -c 1000 -r 500 -i 5 -l 100 -t GET -u {proxy.url}/v1/models"
        with (tmp_path / "out").open("wb") as out:
            attack = await asyncio.create_subprocess_exec("slowhttptest", *argv.split(), stdout=out, stderr=out)
        try:
            await until(lambda: proxy.fds() > fds + 500, what="the attack")

            await served_while(lambda: proxy.fds() > fds + 10, proxy)
            await until(lambda: attack.returncode is not None, what="the end of the attack")
        finally:
            if attack.returncode is None:
                attack.terminate()
            await attack.wait()
        said = (tmp_path / "out").read_text()
        assert "No open connections left" in said, "it would last for 100 s; the patience with each head is 10 s"


async def test_health_is_answered_beside_200_streams() -> None:
    async def script(link: Link, request: Request) -> None:
        await link.send(EVENT_HEAD)
        for number in range(200):
            await link.send(chunk(token(str(number))))
            await asyncio.sleep(0.05)
        await link.send(chunk(DONE) + LAST_CHUNK)

    whole = b"".join(token(str(number)) for number in range(200)) + DONE
    async with own_proxy() as (proxy, upstream), AsyncExitStack() as stack:
        upstream.script = script
        fds = proxy.fds()
        clients = [await stack.enter_async_context(connected(proxy.port)) for _ in range(200)]
        for client in clients:
            await client.send(request("POST", CHAT, STREAM))
        answers = asyncio.gather(*(client.answer() for client in clients))
        await served_while(lambda: not answers.done(), proxy, "/health")
        assert all(answer.body == whole for answer in await answers)
        for client in clients:
            client.leave()
        await until(lambda: proxy.fds() <= fds + 5 + upstream.open_links, what="the freed file descriptors")


async def test_a_body_that_comes_by_drops_is_given_up() -> None:
    async with own_proxy() as (proxy, upstream), connected(proxy.port) as client:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: test\r\nContent-Length: 1000\r\n\r\n"
        began = time.monotonic()
        await client.send(head.encode())
        with pytest.raises(ConnectionError):
            for _ in range(999):
                await client.send(b" ")
                await asyncio.sleep(0.25)
        assert time.monotonic() - began > 9, "a slow start is no reason"
        assert upstream.requests == []


UNREAD = {
    "relayed": (CHAT, "m"),
    "to Ollama's API": ("/api/chat", "m"),
    "to the Responses API": ("/v1/responses", "m"),
    "think": (CHAT, "think"),
    "redact": (CHAT, "redact"),
    "parallel": (CHAT, "parallel"),
    "three agents": (CHAT, "all"),
}
AGENTS = [
    {"think": {"always": False}},
    {"shield": {"always": False}},
    {"redact": {"always": False, "patterns": ["email"]}},
    "parallel",
]
CHAINS = {"think": ["think"], "redact": ["redact"], "parallel": ["parallel"], "all": ["think", "shield", "redact"]}


async def as_fast_as_taken(link: Link, request: Request) -> None:
    await link.send(EVENT_HEAD)
    while True:
        await link.send(chunk(token("word ")) * 500)


@pytest.mark.parametrize("name", UNREAD)
async def test_health_is_answered_beside_100_streams_of_a_fast_server_that_are_not_read(name: str) -> None:
    path, model = UNREAD[name]
    models = {chain: {"model": "m", "agents": agents} for chain, agents in CHAINS.items()}
    body = {"model": model, "stream": True, "messages": [{"role": "user", "content": "hi"}], "input": "hi"}
    async with raw_upstream(as_fast_as_taken) as upstream, AsyncExitStack() as stack:
        remote = {"url": f"http://127.0.0.1:{upstream.port}", "models": ["m"]}
        config = {"remotes": {"up": remote}, "agents": AGENTS, "models": models}
        proxy = await stack.enter_async_context(running_proxy(config))
        before = proxy.rss_bytes()
        clients = [await stack.enter_async_context(connected(proxy.port)) for _ in range(100)]
        for client in clients:
            await client.send(request("POST", path, body))
        for client in clients:
            await client.head()
        for _ in range(50):
            assert (await get(proxy.port, "/health")).status == 200
        assert upstream.open_links == 100, "the streams go on, for those who read again"
        assert proxy.rss_bytes() - before < (250 if name == "parallel" else 120) * 2**20
