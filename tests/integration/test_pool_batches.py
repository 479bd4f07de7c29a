"""Work in the background (vectors of documents) goes on between the requests of people."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from llama_smart_proxy.backends.base import Priority, UpstreamRequest
from llama_smart_proxy.backends.pool import batches
from llama_smart_proxy.backends.pool.pool import Pool
from llama_smart_proxy.proxy.stream.embedder import beside_a_question
from tests.support.harness import until
from tests.support.pools import CHAT, FakeModel, Fakes, open_pool

NEVER_S = 600.0


@asynccontextmanager
async def held(pool: Pool, model: FakeModel, name: str, priority: Priority = Priority.PERSON) -> AsyncIterator[None]:
    """A slot of the model is in use."""
    async with pool.lease(model.at(name), UpstreamRequest("POST", CHAT, priority=priority)):
        yield


async def once(pool: Pool, model: FakeModel, name: str, priority: Priority = Priority.PERSON) -> str:
    """A request that has had a slot."""
    async with held(pool, model, name, priority):
        return name


def waits(pool: Pool, name: str) -> bool:
    return any(entry["model"] == name and entry["queue"] for entry in pool.status())


async def test_a_batch_waits_until_no_person_is_served_by_any_model_of_the_pool(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "PATIENCE_S", NEVER_S)
    async with open_pool(fakes.config(size=2)) as pool:
        chat, embedder = fakes.model(), fakes.model(parallel=4, helper=True)
        assert await once(pool, embedder, "e", Priority.BATCH) == "e"
        async with held(pool, chat, "c"):
            batch = asyncio.ensure_future(once(pool, embedder, "e", Priority.BATCH))
            await until(lambda: waits(pool, "e"))
            assert await once(pool, embedder, "e") == "e", "a question waits for no batch"
            assert not batch.done() and waits(pool, "e")
        assert await batch == "e"


async def test_a_batch_waits_for_people_no_longer_than_its_patience(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "PATIENCE_S", 0.05)
    async with open_pool(fakes.config(size=2)) as pool:
        chat, embedder = fakes.model(), fakes.model(parallel=4, helper=True)
        async with held(pool, chat, "c"):
            for _ in range(3):
                assert await once(pool, embedder, "e", Priority.BATCH) == "e"


async def test_batches_leave_a_slot_for_a_question(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "PATIENCE_S", NEVER_S)
    async with open_pool(fakes.config(size=1)) as pool, AsyncExitStack() as stack:
        embedder = fakes.model(parallel=2, helper=True)
        await stack.enter_async_context(held(pool, embedder, "e", Priority.BATCH))
        batch = asyncio.ensure_future(once(pool, embedder, "e", Priority.BATCH))
        await until(lambda: waits(pool, "e"))
        assert await once(pool, embedder, "e") == "e"
        assert not batch.done()
        await stack.aclose()
        assert await batch == "e"


async def test_on_a_server_with_one_slot_batches_take_turns_with_people(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "PATIENCE_S", NEVER_S)
    async with open_pool(fakes.config(size=1)) as pool:
        embedder = fakes.model(parallel=1, helper=True)
        order: list[str] = []

        async def one(who: str, priority: Priority) -> None:
            async with held(pool, embedder, "e", priority):
                order.append(who)

        async with held(pool, embedder, "e", Priority.BATCH):
            batch = asyncio.ensure_future(one("batch", Priority.BATCH))
            await until(lambda: waits(pool, "e"))
            person = asyncio.ensure_future(one("person", Priority.PERSON))
            await until(lambda: any(entry["queue"] == 2 for entry in pool.status()))
        await asyncio.gather(batch, person)
        assert order == ["person", "batch"]


@pytest.mark.parametrize(("slots", "texts"), [(None, 8), (1, 1), (2, 1), (4, 3), (16, 8)])
def test_a_batch_has_fewer_texts_than_its_server_has_slots(slots: int | None, texts: int) -> None:
    assert beside_a_question(slots) == texts
