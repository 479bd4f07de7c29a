"""A remote's list of models: from memory, and asked anew when that is due."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from llama_smart_proxy.backends.http.connection import ConnectionPool, Endpoint
from llama_smart_proxy.backends.openai import Listing, Remote, Remotes
from llama_smart_proxy.proxy.config import RemoteConfig
from tests.support.harness import free_port, until
from tests.support.pools import own_tasks
from tests.support.toxic import plain, raw_upstream


def listing(*models: str) -> bytes:
    """An answer to `GET /v1/models`."""
    return plain(json.dumps({"data": [{"id": model} for model in models]}).encode())


@asynccontextmanager
async def opened(port: int, models: list[str] | None = None) -> AsyncIterator[Remote]:
    """A remote at that port; closed at the end, when it must have left no task."""
    tasks = own_tasks()
    remote = Remote("r", RemoteConfig(url=f"http://127.0.0.1:{port}/v1", models=models))
    try:
        yield remote
    finally:
        await remote.close()
    await until(lambda: own_tasks() <= tasks, what="the end of all tasks")


async def test_models_come_from_memory_and_a_miss_asks_at_once() -> None:
    async with raw_upstream(listing("a")) as upstream, opened(upstream.port) as remote:
        assert list(remote.models) == []
        await remote.listed()
        assert list(remote.models) == ["a"]
        upstream.script = listing("a", "b")
        assert await remote.find("a")

        async def found() -> bool:
            return await remote.find("b")

        await until(found, what="the new model")
        assert list(remote.models) == ["a", "b"]
        assert len(upstream.requests) == 2  # however often it was missed


async def test_a_remote_that_comes_back_is_asked_anew_soon() -> None:
    port = free_port()
    async with opened(port) as remote:
        await remote.listed()
        assert list(remote.models) == [] and remote.error is not None
        async with raw_upstream(listing("a"), port=port):
            await until(lambda: list(remote.models) == ["a"], what="the models")
            assert remote.error is None


async def test_an_answer_of_another_shape_keeps_the_one_before() -> None:
    taken: list[str] = []
    async with raw_upstream(plain(b'{"a": "one"}')) as upstream:
        pool = ConnectionPool(Endpoint("127.0.0.1", upstream.port))
        listing = Listing("it", pool, "/x", lambda answer: taken.append(str(answer["a"])), max_age_s=60)
        await listing.wait_fresh(math.inf)
        for wrong in (plain(b"[]"), plain(b"{"), plain(b"{}"), plain(b'{"a": "two"}', 500)):
            upstream.script = wrong
            await listing.wait_fresh(0)
            assert listing.error is not None
        upstream.script = plain(b'{"a": "three"}')
        await listing.wait_fresh(0)
        assert (listing.error, taken) == (None, ["one", "three"])
        asked = len(upstream.requests)
        await asyncio.gather(*(listing.wait_fresh(math.inf) for _ in range(5)))
        assert len(upstream.requests) == asked
        listing.invalidate()
        await asyncio.gather(*(listing.wait_fresh(math.inf) for _ in range(5)))
        assert len(upstream.requests) == asked + 1
        await listing.close()
        pool.close("the test is over")


async def test_a_fixed_list_is_never_asked_for() -> None:
    async with raw_upstream(listing("a")) as upstream, opened(upstream.port, ["m"]) as remote:
        await remote.listed()
        assert (remote.models, await remote.find("m"), await remote.find("a")) == (("m",), True, False)
        assert upstream.requests == []


async def test_a_remote_that_does_not_answer_does_not_delay_what_another_one_has() -> None:
    async with raw_upstream() as silent, raw_upstream(listing("a")) as upstream:
        ports = {"silent": silent.port, "up": upstream.port}
        remotes = Remotes([Remote(name, RemoteConfig(url=f"http://127.0.0.1:{port}")) for name, port in ports.items()])
        for name in ("a", "up/a"):
            found = await remotes.find(name, pull=False)
            assert found is not None and (found.owner, found.name) == ("up", "a")
        assert silent.requests and silent.open_links  # its list is still awaited
        await remotes.close()
