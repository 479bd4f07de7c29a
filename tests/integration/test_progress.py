"""What a person who waits can read, for each kind of wait; and that nothing is left when the wait is over, or broken
off."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from llama_smart_proxy.backends.base import UpstreamRequest
from llama_smart_proxy.backends.feed import Kind
from llama_smart_proxy.backends.llamacpp.notices import FAREWELL, MARK
from llama_smart_proxy.backends.pool.launcher import PoolModel, Source
from llama_smart_proxy.backends.pool.pool import Pool
from llama_smart_proxy.backends.progress import Progress, timed
from llama_smart_proxy.backends.weights.downloads import Progress as Far
from llama_smart_proxy.proxy.errors import Overloaded
from tests.support.harness import until
from tests.support.ollamas import ask, chat, opened, running_ollama
from tests.support.pools import CHAT, Fakes, open_pool

LONG_S = 500.0


@dataclass
class Person:
    """One request that someone waits for: it keeps its lease until `done` is set."""

    pool: Pool
    model: PoolModel
    progress: Progress = field(default_factory=Progress)
    done: asyncio.Event = field(default_factory=asyncio.Event)
    has_it: bool = False

    def __post_init__(self) -> None:
        self.task = asyncio.ensure_future(self._use())

    async def _use(self) -> None:
        request = UpstreamRequest("POST", CHAT, progress=self.progress)
        async with self.pool.lease(self.model, request):
            self.has_it = True
            await self.done.wait()

    async def reads(self, pattern: str) -> None:
        await until(lambda: re.fullmatch(pattern, self.progress.text), what=f"{pattern}, not {self.progress.text!r}")

    async def is_served(self) -> None:
        await until(lambda: self.has_it, what="the lease")
        assert self.progress.text == ""

    async def leaves(self) -> None:
        self.task.cancel()
        await asyncio.wait({self.task})
        assert self.progress.text == ""


@pytest.fixture
def gate(fakes: Fakes) -> Path:
    """A file: models of `gated` load until it is there."""
    return fakes.folder / "gate"


def gated(fakes: Fakes, gate: Path, name: str, **fields: object) -> PoolModel:
    return fakes.model(fake={"LOAD_UNTIL": gate}, parallel=1, **fields).at(name)


async def test_a_load_tells_how_long_it_takes_as_far_as_that_is_known(fakes: Fakes, gate: Path) -> None:
    async with open_pool(fakes.config(size=3)) as pool:
        new = Person(pool, gated(fakes, gate, "new"))
        known = Person(pool, gated(fakes, gate, "known", title="Known to all"))
        pool.times.learn("known", LONG_S)
        overdue = Person(pool, gated(fakes, gate, "overdue"))
        pool.times.learn("overdue", 0.001)
        await new.reads(r"Loading new(, \d+ s so far)?")
        await known.reads(r"Loading Known to all, about (4\d\d|500) s")
        await overdue.reads(r"Loading overdue, \d+ s so far")
        await new.reads(r"Loading new, \d+ s so far")
        for person in (known, new):
            await person.leaves()
        await asyncio.to_thread(gate.touch)
        await overdue.is_served()
        overdue.done.set()
        await overdue.task


async def test_a_server_that_reports_how_much_it_has_loaded_is_asked_to(fakes: Fakes, gate: Path) -> None:
    program = fakes.folder / "reporting"
    await asyncio.to_thread(program.write_text, f"{fakes.program.read_text()}# {MARK.decode()}\n")
    program.chmod(0o755)
    model = fakes.model(fake={"LOAD_UNTIL": gate, "SHARE": 0.35, "IGNORE_TERM": 1}).run_by(program).at("m")
    async with open_pool(fakes.config()) as pool:
        feed = pool.downloads.feed
        person = Person(pool, model)
        await person.reads(r"Loading m: 35 %(, \d+ s so far)?")
        assert [event.data for event in feed.latest if event.kind is Kind.LOAD] == [{"share": 0.35}]
        pool.times.learn("m", LONG_S)
        await person.reads(r"Loading m: 35 %, about (4\d\d|500) s")
        await asyncio.to_thread(gate.touch)
        await person.is_served()
        assert [event for event in feed.latest if event.kind is Kind.LOAD] == []
        instance = pool._scheduler.places[0].instance
        assert instance.log_tail() and MARK.decode() not in "".join(instance.log_tail())
        await person.leaves()
        await pool.unload("m")
        assert [event["line"] for event in fakes.events("input")] == [FAREWELL.decode()]


async def test_a_queue_tells_the_place_and_how_long_it_takes(fakes: Fakes) -> None:
    model = fakes.model(parallel=1).at("m")
    async with open_pool(fakes.config()) as pool:
        first = Person(pool, model)
        await first.is_served()
        others = [Person(pool, model) for _ in range(3)]
        for number, person in enumerate(others, 1):
            await person.reads(rf"Waiting, {number} before you(, \d+ s so far)?")
        pool._scheduler.queues["m"].request_s = LONG_S
        for number, person in enumerate(others, 1):
            await person.reads(rf"Waiting, {number} before you, about {number * 5 - 1}\d\d s")
        await others[0].leaves()
        await others[2].reads(r"Waiting, 2 before you, about 9\d\d s")
        first.done.set()
        await others[1].is_served()
        assert pool._scheduler.queues["m"].request_s < LONG_S, "it is learned from those that have ended"
        await others[2].reads(r"Waiting, 1 before you, about \d+ s")
        await others[2].leaves()
        await others[1].leaves()


async def test_a_wait_for_a_place_names_no_model_that_does_not_exist_for_the_client(fakes: Fakes) -> None:
    models = {name: fakes.model(parallel=1).at(name) for name in ("a", "b", "m", "n")}
    for size, several in ((1, r"another model is busy"), (2, r"2 models are busy")):
        async with open_pool(fakes.config(size=size, swap_after_s=LONG_S)) as pool:
            busy = [Person(pool, models[name]) for name in ("a", "b")[:size]]
            for other in busy:
                await other.is_served()
            person = Person(pool, models["m"], Progress(lambda name: name in ("m", "b")))
            await person.reads(rf"Waiting for a place: {several}.*")
            for one in (person, *busy):
                await one.leaves()


async def test_a_wait_for_a_place_names_who_is_busy(fakes: Fakes) -> None:
    names = ["a", "b", "c"]
    models = {name: fakes.model(parallel=1).at(name) for name in (*names, "m")}
    async with open_pool(fakes.config(size=1, swap_after_s=LONG_S)) as pool:
        busy = Person(pool, models["a"])
        await busy.is_served()
        person = Person(pool, models["m"])
        await person.reads(r"Waiting for a place: a is busy(, \d+ s so far)?")
        pool.times.learn("m", LONG_S)
        pool._scheduler.queues["a"].request_s = LONG_S
        await person.reads(r"Waiting for a place: a is busy, about 9\d\d s")
        next_one = Person(pool, models["a"])  # so that the place is left only after `swap_after_s`
        await person.reads(r"Waiting for a place: a is busy, about 14\d\d s")
        await next_one.leaves()
        busy.done.set()
        await person.is_served()
        await person.leaves()
    async with open_pool(fakes.config(size=3, swap_after_s=LONG_S)) as pool:
        people = [Person(pool, models[name]) for name in names]
        for other in people:
            await other.is_served()
        person = Person(pool, models["m"])
        await person.reads(r"Waiting for a place: 3 models are busy.*")
        await person.leaves()
        for other in people:
            await other.leaves()


async def test_one_whose_model_makes_room_is_told_for_whom(fakes: Fakes) -> None:
    a, b = (fakes.model(parallel=1).at(name) for name in ("a", "b"))
    async with open_pool(fakes.config(size=1, swap_after_s=0)) as pool:
        busy = Person(pool, a)
        await busy.is_served()
        other = Person(pool, b)
        await until(lambda: pool.state("a") == "unloading")
        late = Person(pool, a)
        await late.reads(r"Waiting for a place: b comes first(, \d+ s so far)?")
        await late.leaves()
        busy.done.set()
        await other.is_served()
        await other.leaves()


async def test_a_download_tells_how_far_it_is(fakes: Fakes) -> None:
    tell: list[Callable[[Far], None]] = []
    here = fakes.folder / "here"

    async def fetch(report: Callable[[Far], None]) -> None:
        tell.append(report)
        await until(here.exists)

    source = Source("far", lambda: here if here.exists() else None, fetch)
    model = replace(fakes.model().at("far"), source=source)
    async with open_pool(fakes.config()) as pool:
        person, other = Person(pool, model), Person(pool, model)
        await person.reads(r"Downloading(, \d+ s so far)?")
        await until(lambda: tell, what="the download")
        tell[0]({"status": "pulling x", "total": 1000, "completed": 129})
        await person.reads(r"Downloading 12 %(, \d+ s so far)?")
        await person.leaves()
        tell[0]({"status": "verifying sha256 digest"})
        await other.reads(r"Checking the download(, \d+ s so far)?")
        await asyncio.to_thread(here.touch)
        await other.is_served()
        other.done.set()
        await other.task


@pytest.mark.parametrize(
    ("manners", "line"),
    [({"pull_step_s": LONG_S}, "Downloading"), ({"load_s": LONG_S}, "Loading m, about (4[0-9][0-9]|500) s")],
)
async def test_a_model_of_an_ollama_tells_it_too(manners: dict[str, Any], line: str) -> None:
    progress = Progress()
    request = replace(chat("m"), progress=progress)
    async with running_ollama(**manners) as fake, opened(fake.port) as upstream:
        upstream.times.learn("ollama m:latest", LONG_S)
        asking = asyncio.ensure_future(ask(upstream.model("m"), request))
        await until(lambda: re.fullmatch(rf"{line}(, \d+ s so far)?", progress.text), what=line)
        asking.cancel()
        await asyncio.wait({asking})
        assert progress.text == ""
        upstream.pull("m").stop(Overloaded("which would go on without its client"))
        await fake.set(pull_step_s=0, load_s=0)
        assert (await ask(upstream.model("m"), request))[0] == 200
        assert progress.text == ""


def test_a_line_has_the_seconds_that_are_left_else_those_that_have_passed() -> None:
    assert timed("X", 0.4) == timed("X", 0.4, 0.1) == "X"
    assert timed("X", 3.2, 7.1) == "X, about 8 s"
    assert timed("X", 3.2, -7.1) == timed("X", 3.2) == "X, 3 s so far"
