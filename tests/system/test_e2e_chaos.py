"""Servers are killed at random under load, and nobody hangs, nothing leaks, no answer is silently cut short."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.support import raw_client
from tests.support.e2e_support import DONE, Fakes, chat, events_of, fakes, idle
from tests.support.harness import Proxy, running_proxy, until

__all__ = ["fakes"]  # a fixture
MODELS = "abc"


async def one_chat(proxy: Proxy, model: str, stream: bool, outcomes: Counter[str]) -> None:
    """Ask once, and count what came of it; anything but the allowed outcomes fails the test, and so does silence for as
    long as `raw_client` waits."""
    answer = await chat(proxy, model, stream=stream)
    if answer.status != 200:
        assert answer.status in (502, 503) and answer.error["code"] in (
            *("upstream_disconnected", "upstream_unreachable", "model_crashed", "model_load_failed"),
        ), answer.body
        outcomes[f"{answer.status} {answer.error['code']}"] += 1
    elif not stream:
        assert answer.json()["usage"]["completion_tokens"] == 20
        outcomes["whole"] += 1
        outcomes[f"whole of {model}"] += 1
    else:
        *events, end = events_of(answer.body)
        assert end == DONE
        error = json.loads(events[-1]).get("error")
        if error is None:
            assert len(events) == 22  # the role, 20 tokens, and the finish
        else:
            assert error["code"] == "upstream_disconnected"
        outcomes["stream told of a failure" if error else "whole stream"] += 1
        outcomes[f"whole of {model}"] += not error


@dataclass
class Chaos:
    """Clients that ask without a pause, until `over`; `asked` is how often each of them has."""

    proxy: Proxy
    outcomes: Counter[str] = field(default_factory=Counter)
    asked: Counter[int] = field(default_factory=Counter)
    over: bool = False

    async def client(self, number: int) -> None:
        chance = random.Random(number)
        while not self.over:
            await one_chat(self.proxy, chance.choice(MODELS), chance.random() < 0.7, self.outcomes)
            self.asked[number] += 1

    def kill(self, pid: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            self.outcomes["killed"] += 1

    def all_served_since(self) -> Callable[[], bool]:
        """Whether every request that is under way now has been answered, as a condition."""
        before = dict(self.asked)
        return lambda: all(self.asked[number] > times for number, times in before.items())

    async def kill_fairly(self, times: int) -> None:
        """Kill a server that has worked since the last one of its model was killed, and only when nobody asks any more
        who met the death of the one before: a request is sent twice at most."""
        at_death: Counter[str] = Counter()
        for _ in range(times):
            victims: list[dict[str, Any]] = []

            async def found(victims: list[dict[str, Any]] = victims) -> bool:
                for item in (await self.proxy.health())["instances"]:
                    worked = self.outcomes[f"whole of {item['model']}"] > at_death[item["model"]]
                    if worked and item["state"] == "ready" and item["leases"]:
                        victims.append(item)
                return bool(victims)

            await until(found, what="a server that has worked and does")
            at_death[victims[0]["model"]] = self.outcomes[f"whole of {victims[0]['model']}"]
            self.kill(victims[0]["pid"])
            await until(self.all_served_since(), 60, what="an answer to everybody")

    async def kill_anybody(self, times: int, each_s: float) -> None:
        for _ in range(times):
            await asyncio.sleep(each_s)  # the rhythm of the killing
            for victim in self.proxy.children()[:1]:
                self.kill(victim.pid)


@asynccontextmanager
async def chaos(fakes: Fakes, *, clients: int) -> AsyncIterator[Chaos]:
    """So many clients of three models with two places; at the end all must be as it was."""
    models = {name: fakes.model(TOKENS=20, TOKEN_MS=10, fields={"args": ["--parallel", "8"]}) for name in MODELS}
    async with running_proxy(fakes.config(models, size=2, swap_after_s=0.2)) as proxy:
        fds, scene = proxy.fds(), Chaos(proxy, asked=Counter(dict.fromkeys(range(clients), 0)))
        async with asyncio.TaskGroup() as group:
            for number in range(clients):
                group.create_task(scene.client(number))
            yield scene
            scene.over = True
        await until(lambda: idle(proxy))
        for name in models:
            await raw_client.post(proxy.port, "/models/unload", {"model": name})
        await until(lambda: proxy.fds() <= fds + 5, what="the return of the file descriptors")
        await until(lambda: proxy.children() == [], what="the end of all servers")


WELL = {"killed", "whole", "whole stream", "stream told of a failure", *(f"whole of {name}" for name in MODELS)}


async def test_servers_that_are_killed_under_load_cost_only_streams_that_had_begun(fakes: Fakes) -> None:
    async with chaos(fakes, clients=20) as scene:
        await scene.kill_fairly(4)
    outcomes = scene.outcomes
    assert outcomes["killed"] and outcomes["whole"] and outcomes["whole stream"]
    assert outcomes.keys() <= WELL, outcomes


@pytest.mark.full
async def test_a_dozen_servers_killed_one_after_the_other_cost_only_streams_that_had_begun(fakes: Fakes) -> None:
    async with chaos(fakes, clients=50) as scene:
        await scene.kill_fairly(12)
    outcomes = scene.outcomes
    assert outcomes["whole"] and outcomes["whole stream"] and outcomes["stream told of a failure"]
    assert outcomes.keys() <= WELL, outcomes


@pytest.mark.full
async def test_killing_faster_than_servers_can_work_hangs_nobody_and_leaks_nothing(fakes: Fakes) -> None:
    async with chaos(fakes, clients=50) as scene:
        await scene.kill_anybody(75, 0.2)
    assert scene.outcomes["killed"] and scene.outcomes.total() > scene.outcomes["killed"], scene.outcomes
