"""A configuration that has been replaced: its requests go on with it, and after the last one nothing of it is left."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from llama_smart_proxy.backends.base import Services
from llama_smart_proxy.backends.ollama.provider import Ollama
from llama_smart_proxy.backends.pool.pool import Pool
from llama_smart_proxy.backends.weights.downloads import Downloads
from llama_smart_proxy.proxy.app import App
from llama_smart_proxy.proxy.config import Config
from tests.support.harness import until
from tests.support.here import running_here
from tests.support.ollamas import running_ollama
from tests.support.pools import own_tasks
from tests.support.raw_client import EventReader, RawClient, connected, get, post, request
from tests.support.toxic import EVENT_HEAD, Link, Request, chunk, raw_upstream, token

CHAT = "/v1/chat/completions"
STREAM = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "x"}]}
BASE: dict[str, Any] = {"llama_cpp": {"hf_cache": False}, "server": {"early_headers": False}}


def config(**sections: Any) -> Config:
    return Config.model_validate({**BASE, **sections})


@asynccontextmanager
async def asked(port: int, path: str = CHAT, body: dict[str, Any] | None = None) -> AsyncIterator[RawClient]:
    async with connected(port) as client:
        await client.send(request("GET" if body is None else "POST", path, body or b""))
        assert (await client.head())[1] == 200
        yield client


async def test_a_stream_keeps_its_configuration_which_ends_with_it(tmp_path: Any) -> None:
    go_on = asyncio.Event()

    async def answer(link: Link, request: Request) -> None:
        await link.send(EVENT_HEAD + chunk(token("a")))
        await go_on.wait()
        await link.send(chunk(token("b")) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")

    async with raw_upstream(answer) as upstream:
        remotes = {"r": {"url": f"http://127.0.0.1:{upstream.port}", "models": ["m"]}}
        app = App(config(remotes=remotes, agents=["think"]))
        async with running_here(app) as (_, port):
            tasks = len(own_tasks())
            async with asked(port, body=STREAM) as client:
                first = weakref.ref(app.generation)
                await app.apply(await app.prepared(config()))
                assert (await post(port, CHAT, {**STREAM, "stream": False})).status == 404
                for _ in range(3):
                    await app.apply(await app.prepared(config(agents=["think"])))
                await until(lambda: app.ending == 1, what="the end of those without requests")
                assert first() is not None
                go_on.set()
                said = b""
                while piece := await client.chunk():
                    said += piece
                assert b"[DONE]" in said
            await until(lambda: app.ending == 0)
            await until(lambda: len(own_tasks()) <= tasks, what="the end of all tasks")
            await until(lambda: gc.collect() >= 0 and first() is None, what="the end of the first configuration")


async def test_a_page_that_watches_models_follows_and_keeps_no_configuration() -> None:
    app = App(config(remotes={"r": {"url": "http://127.0.0.1:9", "models": ["a"]}}))
    async with running_here(app) as (_, port), asked(port, "/models/sse") as client:
        events = EventReader(client)
        assert (await events.next())["model"] == "a"
        await app.apply(await app.prepared(config(remotes={"r": {"url": "http://127.0.0.1:9", "models": ["b"]}})))
        assert (await events.next())["model"] == "b"
        await until(lambda: app.ending == 0)


async def test_a_download_keeps_the_configuration_that_it_began_with() -> None:
    """An Ollama pulls, over connections of that configuration, also when its client has left."""
    go_on = asyncio.Event()

    async def work(report: object) -> None:
        await go_on.wait()

    app = App(config())
    async with running_here(app):
        download = app.lasting.downloads.join("x", work)
        download.persistent = True
        await app.apply(await app.prepared(config(agents=["think"])))
        await app.apply(await app.prepared(config()))
        assert app.ending == 2
        go_on.set()
        await until(lambda: app.ending == 0)
        assert download.ended and download.error is None


async def test_switches_of_chats_outlive_a_configuration() -> None:
    app = App(config())
    before = app.proxy
    await app.start()
    await app.apply(await app.prepared(config(agents=["think"])))
    assert app.proxy is not before and app.proxy.chain.chats is before.chain.chats
    assert app.proxy.conversations is before.conversations and app.proxy.store is before.store
    await app.close()


async def test_a_rejected_configuration_leaves_nothing_behind(tmp_path: Any) -> None:
    module = tmp_path / "module.py"
    module.write_text(FAILS)
    app = App(config(agents=["think"]))
    async with running_here(app) as (_, port):
        tasks, before = len(own_tasks()), app.generation
        for _ in range(3):
            try:
                await app.prepared(config(agents=["think"], modules=[str(module)]))
            except ZeroDivisionError:
                continue
            raise AssertionError("it was accepted")
        assert app.generation is before and len(own_tasks()) == tasks
        assert (await get(port, "/plugins")).json()[0]["name"] == "think"


FAILS = """
from llama_smart_proxy.backends.base import BaseProvider

class Fails(BaseProvider):
    section = "fails"
    @classmethod
    def create(cls, config, services):
        return 1 / 0

def extend(registry):
    registry.providers.append(Fails)
"""


async def test_an_unchanged_ollama_knows_its_models_at_once_and_is_closed_by_its_last_holder() -> None:
    async with running_ollama("a:latest") as fake:
        downloads, host = Downloads(), f"http://127.0.0.1:{fake.port}"
        pool = Pool(config().server_pool, downloads)

        def made(before: Ollama | None, **fields: Any) -> Ollama:
            services = Services(downloads, pool, lambda section: before)
            found = Ollama.create(config(ollama={"host": host, **fields}), services)
            assert found is not None
            return found

        first = made(None)
        await first.start()
        await first.listed()
        second = made(first, pull="never")
        assert [model.name for model in second.models()] == ["a:latest"]
        await second.start()
        await first.close()
        await second.reread()
        assert await second.problems() == []
        other = made(second, idle_timeout_s=5)
        assert other.models() == []
        for provider in (second, other):
            await provider.close()
