"""Proxies whose Ollama is, in the end, themselves: what nobody has is not looked for for ever."""

from __future__ import annotations

from contextlib import AsyncExitStack
from functools import partial

import pytest

from tests.support.e2e_support import SMOLLM2
from tests.support.harness import Proxy, free_port, ports, running_proxy, until
from tests.support.raw_client import post

ASK = {"model": "nobody-has-this", "messages": [{"role": "user", "content": "Hello"}]}


async def circle(stack: AsyncExitStack, length: int) -> list[Proxy]:
    """So many proxies, each the Ollama of the one before it, and the first that of the last."""
    listening = [free_port() for _ in range(length)]
    proxies = []
    for place, port in enumerate(listening):
        config = {
            "server": {"port": port},
            "ollama": {"host": f"127.0.0.1:{listening[(place + 1) % length]}"},
            "models": {f"own-{place}": SMOLLM2},
            "server_pool": ports(),
        }
        proxies.append(await stack.enter_async_context(running_proxy(config)))
    return proxies


@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
async def test_a_model_that_nobody_has_ends_the_search(path: str, length: int) -> None:
    async with AsyncExitStack() as stack:
        proxies = await circle(stack, length)
        answer = await post(proxies[0].port, path, ASK)
        assert answer.status in (404, 502), answer
        for proxy in proxies:
            await until(partial(_at_rest, proxy), what="the end of the search")
            assert proxy.log.count("proxy.access: POST") <= 4, proxy.log


async def _at_rest(proxy: Proxy) -> bool:
    return not (await proxy.health())["downloads"]
