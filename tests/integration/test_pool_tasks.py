"""People before tasks: background prompts wait, are broken off and sent again, and are answered all the same."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from llama_smart_proxy.backends.base import Priority, UpstreamRequest
from llama_smart_proxy.backends.http.exchange import UpstreamResponse
from llama_smart_proxy.backends.pool.pool import Pool
from llama_smart_proxy.backends.pool.spawned import SpawnedModel
from llama_smart_proxy.backends.tasks import MOST_BREAKS, Task
from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.errors import Overloaded
from llama_smart_proxy.proxy.stream.relay import PLAIN_LIMIT
from llama_smart_proxy.proxy.stream.upstream import Attempts, fetch_json
from tests.support import raw_client, toxic
from tests.support.agent_clients import WAYS
from tests.support.harness import until
from tests.support.here import served_here
from tests.support.pools import CHAT, FakeModel, Fakes, open_pool
from tests.support.toxic import Link, Request, raw_upstream

LONG = {"swap_after_s": 600.0, "queue_timeout_s": 6000.0, "load_timeout_s": 600.0}
"""No timer decides anything."""
TITLE = "### Task:\nGenerate a concise, 3-5 word title"


def request(who: str, *, hold_s: float = 0.0, whole: bool = True, **fake: object) -> UpstreamRequest:
    """A request of a person, or of a chat UI if `who` begins with "task"."""
    body = json.dumps({"fake": fake, "stream": not whole, "user": who}).encode()
    if not who.startswith("task"):
        return UpstreamRequest("POST", CHAT, body)
    task = Task(hold_s)
    task.whole = whole
    return UpstreamRequest("POST", CHAT, body, priority=Priority.TASK, task=task)


def served(pool: Pool, name: str, model: FakeModel) -> SpawnedModel:
    return SpawnedModel(pool, model.at(name), kind="fake")


def asking(model: SpawnedModel, call: UpstreamRequest) -> asyncio.Task[Json]:
    return asyncio.ensure_future(fetch_json(model, call))


@asynccontextmanager
async def held(pool: Pool, name: str, model: FakeModel, who: str = "person") -> AsyncIterator[None]:
    """One slot of the model is in use."""
    async with pool.lease(model.at(name), request(who)):
        yield


def entry(pool: Pool, name: str, what: str) -> object:
    return next((status[what] for status in pool.status() if status["model"] == name and what in status), 0)


def who_was_sent(fakes: Fakes) -> list[str]:
    """Whose requests the servers got, in order."""
    return [json.loads(event["body"])["user"] for event in fakes.events("request", CHAT)]


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    """The last token of an answer comes when this file is there."""
    return tmp_path / "gate"


async def queued(pool: Pool, count: int) -> None:
    await until(lambda: entry(pool, "a", "queue") == count)


async def runs(fakes: Fakes, times: int) -> None:
    """The task was sent so many times."""
    await until(lambda: who_was_sent(fakes).count("task") == times)


def let_go(gate: Path) -> None:
    gate.touch()


# -- one model ---------------------------------------------------------------------------------------------------------


async def test_people_are_served_first_then_tasks_each_in_the_order_they_came(fakes: Fakes) -> None:
    async with open_pool(fakes.config(**LONG)) as pool:
        fake = fakes.model(parallel=1)
        model = served(pool, "a", fake)
        waiting = []
        async with held(pool, "a", fake):
            for number, who in enumerate(("task 1", "person 1", "task 2", "person 2"), 1):
                waiting.append(asking(model, request(who)))
                await queued(pool, number)
        await asyncio.gather(*waiting)
    assert who_was_sent(fakes) == ["person 1", "person 2", "task 1", "task 2"]


async def test_a_task_is_broken_off_for_a_person_and_answered_afterwards(fakes: Fakes, gate: Path) -> None:
    async with open_pool(fakes.config(**LONG)) as pool:
        model = served(pool, "a", fakes.model(parallel=1))
        task = asking(model, request("task", last_at=str(gate)))
        await until(lambda: who_was_sent(fakes) == ["task"])
        await asking(model, request("person"))
        await until(lambda: who_was_sent(fakes) == ["task", "person", "task"])
        assert len(fakes.events("closed", CHAT)) == 1 and not task.done()
        let_go(gate)
        assert (await task)["choices"][0]["finish_reason"] == "stop"
        assert entry(pool, "a", "leases") == 0 and fakes.spawns == 1


async def test_a_free_slot_leaves_tasks_alone(fakes: Fakes, gate: Path) -> None:
    async with open_pool(fakes.config(**LONG)) as pool:
        model = served(pool, "a", fakes.model(parallel=2))
        task = asking(model, request("task", last_at=str(gate)))
        await until(lambda: who_was_sent(fakes) == ["task"])
        await asking(model, request("person"))
        let_go(gate)
        await task
    assert who_was_sent(fakes) == ["task", "person"] and not fakes.events("closed", CHAT)


async def test_each_person_frees_one_slot_only(fakes: Fakes, gate: Path) -> None:
    async with open_pool(fakes.config(**LONG)) as pool:
        model = served(pool, "a", fakes.model(parallel=2))
        tasks = [asking(model, request(f"task {number}", last_at=str(gate))) for number in range(2)]
        await until(lambda: len(who_was_sent(fakes)) == 2)
        await asking(model, request("person"))
        assert len(fakes.events("closed", CHAT)) == 1
        let_go(gate)
        await asyncio.gather(*tasks)


async def test_a_task_that_was_broken_off_thrice_is_completed(fakes: Fakes, gate: Path) -> None:
    async with open_pool(fakes.config(**LONG)) as pool:
        model = served(pool, "a", fakes.model(parallel=1))
        task = asking(model, request("task", last_at=str(gate)))
        for number in range(MOST_BREAKS):
            await runs(fakes, number + 1)
            await asking(model, request("person"))
        await until(lambda: who_was_sent(fakes).count("task") == MOST_BREAKS + 1)
        person = asking(model, request("person"))
        await until(lambda: entry(pool, "a", "queue") == 1)
        assert len(fakes.events("closed", CHAT)) == MOST_BREAKS and not person.done()
        let_go(gate)
        await asyncio.gather(task, person)
        assert who_was_sent(fakes)[-2:] == ["task", "person"]


async def test_a_streamed_task_is_completed_once_its_client_has_a_byte(fakes: Fakes, gate: Path) -> None:
    async with open_pool(fakes.config(**LONG)) as pool:
        model = served(pool, "a", fakes.model(parallel=1))
        async for attempt in Attempts(model, request("task", whole=False, last_at=str(gate))):
            async with attempt as upstream:
                await upstream.first_piece()
                person = asking(model, request("person"))
                await until(lambda: entry(pool, "a", "queue") == 1)
                let_go(gate)
                assert b"[DONE]" in (await upstream.read(1_000_000) or b"")
        await person
    assert who_was_sent(fakes) == ["task", "person"]


async def test_a_streamed_task_is_broken_off_before_its_first_byte(fakes: Fakes) -> None:
    async with open_pool(fakes.config(**LONG)) as pool:
        model = served(pool, "a", fakes.model(parallel=1))
        task = asking(model, request("task", whole=False, mute=1))
        await until(lambda: who_was_sent(fakes) == ["task"])
        await asking(model, request("person"))
        await until(lambda: who_was_sent(fakes) == ["task", "person", "task"])
        task.cancel()


@pytest.mark.parametrize("slots", [1, 2])
async def test_a_title_lets_its_chat_go_first(fakes: Fakes, slots: int) -> None:
    async with open_pool(fakes.config(**LONG)) as pool:
        model = served(pool, "a", fakes.model(parallel=slots))
        await pool.load(model.model)
        title = asking(model, request("task", hold_s=600))
        await until(lambda: entry(pool, "a", "queue") == 1)
        await asking(model, request("person"))
        assert not title.done() and who_was_sent(fakes) == ["person"]
        title.cancel()


@pytest.mark.parametrize("slots", [1, 2])
async def test_a_title_is_not_held_for_ever(fakes: Fakes, slots: int) -> None:
    async with open_pool(fakes.config(**LONG)) as pool:
        model = served(pool, "a", fakes.model(parallel=slots))
        await pool.load(model.model)
        await asking(model, request("task", hold_s=0.05))


async def test_a_task_that_has_waited_for_long_takes_its_turn(fakes: Fakes, gate: Path) -> None:
    async with open_pool(fakes.config(**LONG)) as pool:
        fake = fakes.model(parallel=1)
        model, old = served(pool, "a", fake), request("task old", last_at=str(gate))
        assert old.task is not None
        async with held(pool, "a", fake):
            old.task.since = asyncio.get_running_loop().time() - LONG["queue_timeout_s"] / 2
            task = asking(model, old)
            await until(lambda: len(pool._scheduler.queues["a"].slot_waiters) == 1)
            young = asking(model, request("task young"))
            person = asking(model, request("person"))
            await until(lambda: entry(pool, "a", "queue") == 3)
        await until(lambda: who_was_sent(fakes) == ["task old"])
        let_go(gate)
        await asyncio.gather(task, young, person)
    assert who_was_sent(fakes) == ["task old", "person", "task young"]


# -- several models ----------------------------------------------------------------------------------------------------


async def test_the_model_that_a_person_waits_for_is_loaded_first(fakes: Fakes) -> None:
    async with open_pool(fakes.config(size=1, **LONG)) as pool:
        fake = fakes.model()
        async with held(pool, "a", fake):
            task = asking(served(pool, "b", fake), request("task"))
            await until(lambda: entry(pool, "b", "queue") == 1)
            person = asking(served(pool, "c", fake), request("person"))
            await until(lambda: entry(pool, "c", "queue") == 1)
        await person
        assert who_was_sent(fakes) == ["person"]
        task.cancel()


async def test_a_model_in_use_by_tasks_makes_room_for_a_person(fakes: Fakes, gate: Path) -> None:
    async with open_pool(fakes.config(size=1, **LONG)) as pool:
        fake = fakes.model()
        tasks = [asking(served(pool, "a", fake), request("task", last_at=str(gate))) for _ in range(3)]
        await until(lambda: len(who_was_sent(fakes)) == 3)
        await asking(served(pool, "b", fake), request("person"))
        assert fakes.spawns == 2 and len(fakes.events("closed", CHAT)) == 3
        for task in tasks:
            task.cancel()


async def test_a_model_that_loads_for_a_task_makes_room_for_a_person(fakes: Fakes) -> None:
    async with open_pool(fakes.config(size=1, **LONG)) as pool:
        task = asking(served(pool, "a", fakes.model(fake={"LOAD_S": 600})), request("task"))
        await until(lambda: pool.state("a") == "loading")
        await asking(served(pool, "b", fakes.model()), request("person"))
        assert not task.done() and entry(pool, "a", "queue") == 1
        task.cancel()


async def test_no_model_in_use_by_a_person_is_drained_for_a_task(fakes: Fakes) -> None:
    async with open_pool(fakes.config(size=1, **LONG | {"swap_after_s": 0})) as pool:
        fake = fakes.model()
        async with held(pool, "a", fake):
            task = asking(served(pool, "b", fake), request("task"))
            await until(lambda: entry(pool, "b", "queue") == 1)
            assert pool.state("a") == "loaded" and pool._scheduler._swap_timer is None
            person = asking(served(pool, "c", fake), request("person"))
            await until(lambda: pool.state("a") == "unloading")
            person.cancel()
        await task


# -- clients that leave, and the end -----------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["held", "waiting", "running", "broken off"])
async def test_a_task_whose_client_leaves_leaves_nothing_behind(fakes: Fakes, phase: str, gate: Path) -> None:
    async with open_pool(fakes.config(**LONG)) as pool:
        fake = fakes.model(parallel=1)
        model = served(pool, "a", fake)
        await pool.load(model.model)
        person: asyncio.Task[Json] | None = None
        call = request("task", hold_s=600 if phase == "held" else 0, last_at=str(gate))
        if phase == "waiting":
            person = asking(model, request("person", last_at=str(gate)))
            await until(lambda: entry(pool, "a", "leases") == 1)
        task = asking(model, call)
        if phase in ("held", "waiting"):
            await until(lambda: entry(pool, "a", "queue") == 1)
        else:
            await until(lambda: "task" in who_was_sent(fakes))
        if phase == "broken off":
            person = asking(model, request("person"))
            assert call.task is not None
            await until(lambda: call.task is not None and call.task.breaks == 1)
        task.cancel()
        let_go(gate)
        if person is not None:
            await person
        await asyncio.wait({task})
        assert (entry(pool, "a", "leases"), entry(pool, "a", "queue")) == (0, 0)
        await asking(model, request("person"))


@pytest.mark.parametrize("drained", [True, False])
async def test_tasks_that_wait_at_the_end_are_answered_or_refused(fakes: Fakes, drained: bool, gate: Path) -> None:
    async with open_pool(fakes.config(**LONG)) as pool:
        model = served(pool, "a", fakes.model(parallel=1))
        person = asking(model, request("person", last_at=str(gate)))
        await until(lambda: who_was_sent(fakes) == ["person"])
        task = asking(model, request("task"))
        await until(lambda: entry(pool, "a", "queue") == 1)
        closing = asyncio.ensure_future(pool.close(drain_s=600 if drained else 0))
        await until(lambda: pool._scheduler.closing)
        let_go(gate)
        await asyncio.wait({person, task, closing})
        if drained:
            assert task.result() and person.result()
        else:
            assert isinstance(task.exception(), Overloaded)


async def test_a_task_that_is_broken_off_does_not_count_as_new_for_the_limit_of_the_queue(
    fakes: Fakes, gate: Path
) -> None:
    async with open_pool(fakes.config(queue_limit=1, **LONG)) as pool:
        model = served(pool, "a", fakes.model(parallel=1))
        task = asking(model, request("task", last_at=str(gate)))
        await until(lambda: who_was_sent(fakes) == ["task"])
        first = asking(model, request("person", tokens=1, token_ms=100))
        await until(lambda: who_was_sent(fakes) == ["task", "person"])
        let_go(gate)
        await asyncio.gather(first, task)


async def test_a_title_that_waits_for_its_turn_keeps_its_model_loaded(fakes: Fakes, gate: Path) -> None:
    async with open_pool(fakes.config(keep_alive=0, **LONG)) as pool:
        model = served(pool, "a", fakes.model(parallel=1))
        person = asking(model, request("person", last_at=str(gate)))
        await until(lambda: who_was_sent(fakes) == ["person"])
        title = asking(model, request("task", hold_s=600))
        await queued(pool, 1)
        let_go(gate)
        await person
        assert pool.state("a") == "loaded"
        title.cancel()
        await until(lambda: pool.state("a") == "unloaded")
        assert fakes.spawns == 1


async def test_a_model_whose_tasks_are_broken_off_already_is_enough_for_a_person(fakes: Fakes, gate: Path) -> None:
    async with open_pool(fakes.config(size=2, **LONG)) as pool:
        a, b = served(pool, "a", fakes.model(parallel=2)), served(pool, "b", fakes.model())
        tasks = [asking(a, request(f"task {number}", last_at=str(gate))) for number in range(2)]
        await until(lambda: len(who_was_sent(fakes)) == 2)
        tasks.append(asking(b, request("task b", last_at=str(gate))))
        await until(lambda: len(who_was_sent(fakes)) == 3)
        await asking(served(pool, "c", fakes.model()), request("person"))
        assert len(fakes.events("closed", CHAT)) == 2
        let_go(gate)
        assert await tasks.pop()
        for task in tasks:
            task.cancel()


async def test_a_slot_that_was_never_used_says_nothing_about_how_long_requests_take(fakes: Fakes) -> None:
    async with open_pool(fakes.config(**LONG)) as pool:
        fake = fakes.model(parallel=1)
        async with held(pool, "a", fake):
            person = asking(served(pool, "a", fake), request("person"))
            await queued(pool, 1)
        queue = pool._scheduler.queues["a"]
        before = queue.request_s
        assert queue.length == 0 and person.cancel()  # it has got its slot, and does not know it yet
        await asyncio.wait({person})
        assert entry(pool, "a", "leases") == 0 and queue.request_s == before


async def test_a_task_of_which_the_client_has_a_part_is_not_broken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks: list[Task] = []
    sends, end = Task.sends, asyncio.Event()

    def remember(task: Task, response: UpstreamResponse) -> None:
        sends(task, response)
        tasks.append(task)

    async def script(link: Link, _: Request) -> None:
        head = toxic.head(200, [("Content-Type", "application/json"), ("Transfer-Encoding", "chunked")])
        await link.send(head + toxic.chunk(b" " * (PLAIN_LIMIT + 1)))
        await end.wait()
        await link.send(toxic.chunk(b"{}") + toxic.LAST_CHUNK)

    monkeypatch.setattr(Task, "sends", remember)
    way = next(way for way in WAYS if way.path == CHAT and not way.stream)
    async with raw_upstream(script) as upstream:
        remote = {"url": f"http://127.0.0.1:{upstream.port}", "models": ["m"]}
        async with served_here({"remotes": {"up": remote}}) as (_, port), raw_client.connected(port) as client:
            await client.send(raw_client.request("POST", way.path, way.body(TITLE)))
            assert (await client.head())[1] == 200
            assert [task.breakable for task in tasks] == [False]
            end.set()
            while await client.chunk():
                pass
