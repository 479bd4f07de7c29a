"""Anything at once, by the dice: requests, clients that leave, unloads, crashes. The pool's laws hold all the time."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from llama_smart_proxy.backends.http.connection import UNREACHABLE
from llama_smart_proxy.backends.pool import backoff
from llama_smart_proxy.backends.pool.instance import State
from llama_smart_proxy.backends.pool.pool import Pool
from llama_smart_proxy.proxy.errors import ProxyError
from tests.support.harness import until
from tests.support.pools import Census, FakeModel, Fakes, chat, elapse, leased, open_pool

SIZE, HELPERS = 2, 1
NAMES = "abcdxy"
HELPING = "xy"


class Dice:
    """One run: clients that do anything, and an observer that checks after every turn of the event loop or so."""

    def __init__(self, pool: Pool, models: dict[str, FakeModel], seed: int, seconds: float) -> None:
        self.pool = pool
        self.models = models
        self.chance = random.Random(seed)
        self.ends = time.monotonic() + seconds
        self.outcomes: dict[str, int] = {}
        self.inside: dict[int, int] = {}

    def count(self, what: str) -> None:
        self.outcomes[what] = self.outcomes.get(what, 0) + 1

    async def request(self) -> None:
        name = self.chance.choice(NAMES)
        slot = self.chance.random() < 0.8
        try:
            async with leased(self.pool, name, self.models[name], slot=slot) as instance:
                assert instance.name == name
                assert instance.state is not State.STARTING
                if slot:
                    self.inside[instance.pid] = self.inside.get(instance.pid, 0) + 1
                    assert self.inside[instance.pid] <= instance.slots
                try:
                    await chat(instance, tokens=self.chance.randrange(3), token_ms=self.chance.randrange(10))
                finally:
                    if slot:
                        self.inside[instance.pid] -= 1
                    if self.chance.random() < 0.1:
                        await instance.wait_stopped(0.02)
            self.count("served")
        except ProxyError as exc:
            assert exc.code in ("overloaded", "model_crashed", "unloaded", "upstream_disconnected", UNREACHABLE), exc
            self.count(exc.code)
            await elapse(0.01)

    async def client(self) -> None:
        while time.monotonic() < self.ends:
            task = asyncio.ensure_future(self.request())
            if self.chance.random() < 0.3:
                await asyncio.wait({task}, timeout=self.chance.random() * 0.1)
                task.cancel()
            await asyncio.wait({task})
            if task.cancelled():
                self.count("left")
            else:
                task.result()

    async def meddler(self) -> None:
        """Unloads, loads, and kills."""
        while time.monotonic() < self.ends:
            await elapse(self.chance.random() * 0.2)
            name = self.chance.choice(NAMES)
            act = self.chance.random()
            if act < 0.4:
                await self.pool.unload(name)
            elif act < 0.7:
                with suppress(ProxyError):
                    await self.pool.load(self.models[name].at(name))
            elif ready := [place.instance for place in self.pool._scheduler.places if place.state is State.READY]:
                os.kill(self.chance.choice(ready).pid, signal.SIGKILL)
                self.count("killed")

    def check(self) -> None:
        scheduler = self.pool._scheduler
        helpers = [place for place in scheduler.places if place.queue.name in HELPING]
        assert len(helpers) <= HELPERS and len(scheduler.places) - len(helpers) <= SIZE
        for place in scheduler.places:
            assert place.leases >= place.generating >= 0
            assert place.state is not State.STOPPING or place.leases == 0
            assert place.queue.place is place
            assert place.generating <= place.instance.slots

    async def observer(self) -> None:
        while time.monotonic() < self.ends:
            self.check()
            await elapse(0.001)


@pytest.mark.parametrize(
    ("seed", "seconds"), [(1, 3.0), *(pytest.param(seed, 8.0, marks=pytest.mark.full) for seed in range(2, 8))]
)
async def test_the_pool_keeps_its_laws_whatever_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, seconds: float
) -> None:
    monkeypatch.setattr(backoff, "LONGEST_S", 1.0)  # a model that was killed three times is to be served again soon
    monkeypatch.setattr(backoff, "WINDOW_S", 1.0)
    fakes = Fakes(tmp_path)
    quiet = {"LOG": os.devnull}
    models = {
        name: fakes.model(parallel=number % 4 + 1, fake=quiet, helper=name in HELPING)
        for number, name in enumerate(NAMES)
    }
    models["d"] = models["d"].model_copy(update={"keep_alive": 0.05})
    config = fakes.config(size=SIZE, helpers=HELPERS, queue_limit=12, swap_after_s=0.05, stop_timeout_s=0.5)
    async with open_pool(config) as pool, Census() as census:
        dice = Dice(pool, models, seed, seconds)
        async with asyncio.timeout(seconds + 80):
            workers = [dice.client() for _ in range(16)] + [dice.meddler(), dice.observer()]
            await asyncio.gather(*workers)  # nobody is left waiting
        scheduler = pool._scheduler
        await until(lambda: not scheduler.queued and not any(place.leases for place in scheduler.places))
        dice.check()
        assert not any(dice.inside.values())
        for name in NAMES:  # and whatever happened, everybody is served in the end
            await until(lambda: served(pool, name, models[name]), what=f"an answer from {name}")  # noqa: B023
    assert census.most <= SIZE + HELPERS
    assert dice.outcomes["served"] > len(NAMES) and dice.outcomes["left"] > 0


async def served(pool: Pool, name: str, model: FakeModel) -> bool:
    try:
        async with leased(pool, name, model) as instance:
            return bool(await chat(instance, tokens=1))
    except ProxyError:
        return False
