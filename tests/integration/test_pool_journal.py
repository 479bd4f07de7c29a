"""What the journal of a request has of its wait in the pool."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from llama_smart_proxy.backends.base import Priority, UpstreamRequest
from llama_smart_proxy.backends.journal import Step, StepKind
from llama_smart_proxy.backends.pool.launcher import PoolModel, Source
from llama_smart_proxy.backends.pool.pool import Pool
from llama_smart_proxy.backends.weights.downloads import Progress
from llama_smart_proxy.proxy.chat import RequestRecord
from llama_smart_proxy.proxy.errors import StartFailed
from tests.support.harness import until
from tests.support.ollamas import ask as ask_ollama
from tests.support.ollamas import chat, opened, running_ollama
from tests.support.pools import CHAT, Fakes, ask, open_pool


class Asked:
    """One request, which holds its lease until `let_go` is set."""

    def __init__(self, pool: Pool, model: PoolModel, name: str, priority: Priority = Priority.PERSON) -> None:
        self.record = RequestRecord(time.monotonic(), request_id=name)
        self.let_go = asyncio.Event()
        self.served = False
        self._request = UpstreamRequest("POST", CHAT, priority=priority, journal=self.record)
        self.task = asyncio.ensure_future(self._hold(pool, model))

    async def _hold(self, pool: Pool, model: PoolModel) -> None:
        async with pool.lease(model, self._request):
            self.served = True
            await self.let_go.wait()

    async def done(self) -> list[Step]:
        self.let_go.set()
        await self.task
        return self.record.steps or []


@asynccontextmanager
async def holding(pool: Pool, model: PoolModel, *names: str) -> AsyncIterator[list[Asked]]:
    """Requests that hold one slot each, in this order."""
    found = []
    for name in names:
        found.append(Asked(pool, model, name))
        await until(lambda: found[-1].served)
    yield found
    for asked in found:
        await asked.done()


def only(steps: list[Step], kind: StepKind) -> list[Step]:
    return [step for step in steps if step.kind is kind]


def follow_each_other(steps: list[Step]) -> bool:
    """Whether no two steps with a duration overlap."""
    ends = [(step.began_s, step.ended_s) for step in steps if step.kind is not StepKind.EVICT]
    return all(first[1] <= second[0] for first, second in pairwise(ends))


async def test_a_request_that_waits_for_nothing_writes_nothing(fakes: Fakes) -> None:
    async with open_pool(fakes.config()) as pool:
        model = fakes.model()
        await ask(pool, "a", model)
        assert await Asked(pool, model.at("a"), "x").done() == []


async def test_a_load_is_noted_as_far_as_each_request_waited_for_it(fakes: Fakes) -> None:
    async with open_pool(fakes.config()) as pool:
        model = fakes.model(fake={"LOAD_S": 0.3}).at("a")
        first = Asked(pool, model, "first")
        await until(lambda: pool.state("a") == "loading")
        second = Asked(pool, model, "second")
        [load], [later] = [only(await asked.done(), StepKind.LOAD) for asked in (first, second)]
        assert load.detail == later.detail == {"model": "a"}
        assert load.began_s < later.began_s and later.ended_s == load.ended_s
        assert all(follow_each_other(asked.record.steps or []) for asked in (first, second))
        assert first.record.spent_s(StepKind.LOAD) > 0.2


async def test_a_load_that_fails_is_noted_too(fakes: Fakes) -> None:
    async with open_pool(fakes.config()) as pool:
        asked = Asked(pool, fakes.model(fake={"EXIT": 3}).at("a"), "x")
        with pytest.raises(StartFailed):
            await asked.done()
        assert [step.kind for step in asked.record.steps or []][:1] == [StepKind.LOAD]


async def test_a_queue_names_the_requests_that_are_served_and_those_before(fakes: Fakes) -> None:
    async with open_pool(fakes.config()) as pool:
        model = fakes.model(parallel=2).at("a")
        async with holding(pool, model, "one", "two"):
            waiting = [Asked(pool, model, f"w{number}") for number in range(12)]
            await until(lambda: pool._scheduler.queued == 12)
            late = Asked(pool, model, "task", Priority.TASK)
            await until(lambda: pool._scheduler.queued == 13)
            person = Asked(pool, model, "person")
            await until(lambda: pool._scheduler.queued == 14)
        steps = {asked.record.request_id: await asked.done() for asked in (*waiting, person, late)}
    details = {name: only(found, StepKind.QUEUE)[0].detail for name, found in steps.items()}
    assert details["w0"] == {"model": "a", "ahead": 0, "behind": ["one", "two"], "places": []}
    assert details["w1"]["ahead"] == 1 and details["w1"]["behind"] == ["one", "two", "w0"]
    assert details["w11"]["ahead"] == 11 and details["w11"]["behind"] == ["one", "two", *(f"w{n}" for n in range(8))]
    assert details["task"]["ahead"] == details["person"]["ahead"] == 12, "a person goes before a background prompt"


async def test_a_request_that_leaves_the_queue_has_noted_its_wait(fakes: Fakes) -> None:
    async with open_pool(fakes.config()) as pool:
        model = fakes.model(parallel=1).at("a")
        async with holding(pool, model, "one"):
            asked = Asked(pool, model, "two")
            await until(lambda: pool._scheduler.queued == 1)
            asked.task.cancel()
            await asyncio.wait({asked.task})
            [step] = asked.record.steps or []
            assert step.kind is StepKind.QUEUE and step.detail["behind"] == ["one"]


async def test_an_eviction_names_its_victim_and_why_it_was_that_one(fakes: Fakes) -> None:
    async with open_pool(fakes.config(size=2)) as pool:
        model = fakes.model()
        for name in ("old", "new"):
            await ask(pool, name, model)
        steps = await Asked(pool, model.at("a"), "x").done()
        [evicted] = only(steps, StepKind.EVICT)
        assert evicted.detail["model"] == "old" and "least recently used idle model" in evicted.detail["why"]
        assert only(steps, StepKind.QUEUE)[0].detail["places"] == ["old", "new"]
        assert only(steps, StepKind.LOAD) and follow_each_other(steps)


async def test_a_wait_for_a_busy_place_names_whose_it_is_and_that_it_was_drained(fakes: Fakes) -> None:
    async with open_pool(fakes.config(size=1, swap_after_s=0.05)) as pool:
        model = fakes.model()
        async with holding(pool, model.at("a"), "one"):
            asked = Asked(pool, model.at("b"), "two")
            await until(lambda: pool.state("a") == "unloading")
        steps = await asked.done()
        queued, [evicted] = only(steps, StepKind.QUEUE)[0], only(steps, StepKind.EVICT)
        assert queued.detail["places"] == ["a"] and queued.detail["behind"] == ["one"]
        assert "accepted no more requests" in evicted.detail["why"]


async def test_a_download_is_noted(fakes: Fakes, tmp_path: Path) -> None:
    here = tmp_path / "fetched"

    async def fetch(report: Callable[[Progress], None]) -> None:
        here.touch()

    source = Source("far", lambda: here if here.exists() else None, fetch)
    async with open_pool(fakes.config()) as pool:
        steps = await Asked(pool, replace(fakes.model().at("a"), source=source), "x").done()
    assert steps[0].kind is StepKind.DOWNLOAD and steps[0].detail == {"model": "a"}
    assert steps[0].ended_s <= only(steps, StepKind.LOAD)[0].began_s


async def test_what_an_ollama_does_for_a_request_is_noted_as_far_as_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_smart_proxy.backends.ollama.model.SHORT_S", 0.0)
    record = RequestRecord(time.monotonic(), request_id="x")
    async with running_ollama() as fake, opened(fake.port) as upstream:
        request = replace(chat("m"), journal=record)
        assert (await ask_ollama(upstream.model("m"), request))[0] == 200
    download, load = record.steps or []
    assert (download.kind, load.kind) == (StepKind.DOWNLOAD, StepKind.LOAD)
    assert download.detail == load.detail == {"model": "m"} and follow_each_other([download, load])
