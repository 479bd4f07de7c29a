"""At most eight downloads go on at one time, whoever began them; the next one is refused, and no place is lost."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from llama_smart_proxy.backends.weights.downloads import MOST
from tests.fakes.hub import Hub, gguf, running_hub
from tests.support.e2e_support import Fakes, chat, fakes
from tests.support.harness import Proxy, running_proxy, until
from tests.support.ollamas import running_ollama
from tests.support.raw_client import RawClient, connected, post, request

__all__ = ["fakes"]  # fixtures
LAST = f"org/r{MOST}"
MESSAGES = [{"role": "user", "content": "hi"}]
ROADS: dict[str, tuple[str, dict[str, Any]]] = {
    "Ollama's pull": ("/api/pull", {"model": f"hf.co/{LAST}"}),
    "Ollama's pull, unstreamed": ("/api/pull", {"model": f"hf.co/{LAST}", "stream": False}),
    "pull of a configured model": ("/api/pull", {"model": "far"}),
    "pull by an Ollama": ("/api/pull", {"model": "new"}),
    "llama-server's router": ("/models", {"model": LAST}),
    **{
        f"{path} of {model}": (path, {"model": model, "messages": MESSAGES, "max_tokens": 4})
        for path in ("/v1/chat/completions", "/v1/messages", "/api/chat")
        for model in ("far", "new")
    },
}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with running_hub(tmp_path / "hub") as hub:
        yield hub


@asynccontextmanager
async def pulled(proxy: Proxy, number: int) -> AsyncIterator[RawClient]:
    """A client that has read that its pull has begun."""
    async with connected(proxy.port) as client:
        await client.send(request("POST", "/api/pull", {"model": f"hf.co/org/r{number}"}))
        assert (await client.head())[1] == 200 and await client.chunk()
        yield client


async def under_way(proxy: Proxy) -> int:
    return len((await proxy.health())["downloads"])


async def test_the_ninth_download_is_refused_on_every_road_and_no_place_is_lost(hub: Hub, fakes: Fakes) -> None:
    for number in range(MOST + 2):
        hub.add(f"org/r{number}/m-Q4_K_M.gguf", gguf(100_000, number))
    far, here = (fakes.model(fields={"repo": f"org/r{number}"}) for number in (MOST, MOST + 1))
    del far["path"], here["path"]
    async with running_ollama("old", pull_step_s=60) as ollama:
        config = fakes.config({"far": far, "here": here}) | {"ollama": {"host": f"127.0.0.1:{ollama.port}"}}
        async with running_proxy(config, env=hub.env(fakes.folder / "home")) as proxy:
            assert (await post(proxy.port, "/api/pull", {"model": "here", "stream": False})).status == 200
            for number in range(MOST + 1):
                hub.behave(f"org/r{number}/m-Q4_K_M.gguf", hold=0.5)
            async with AsyncExitStack() as stack:
                clients = [await stack.enter_async_context(pulled(proxy, number)) for number in range(MOST)]
                assert await under_way(proxy) == MOST
                for road, (path, body) in ROADS.items():
                    answer = await post(proxy.port, path, body)
                    assert (answer.status, answer.header("retry-after")) == (429, "10"), (road, answer)
                    assert b"8 downloads are under way" in answer.body
                    assert isinstance(answer.json()["error"], str) == path.startswith("/api/"), road
                assert await under_way(proxy) == MOST
                async with pulled(proxy, 0):  # joins
                    assert await under_way(proxy) == MOST
                assert (await chat(proxy, "here")).status == 200  # its files are on this machine
                clients[1].leave()
                await until(lambda: _is(proxy, MOST - 1), what="the place of a client that has left")
                async with pulled(proxy, MOST):
                    assert (await post(proxy.port, "/models", {"model": "org/r1"})).status == 429
            await until(lambda: _is(proxy, 0), what="the end of all downloads")
            for number in range(MOST + 1):
                hub.behave(f"org/r{number}/m-Q4_K_M.gguf")
            assert (await chat(proxy, "far")).status == 200


async def _is(proxy: Proxy, count: int) -> bool:
    return await under_way(proxy) == count
