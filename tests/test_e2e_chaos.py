"""K1: servers are killed at random under load, and nobody hangs, nothing leaks, no answer is silently cut short."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from collections import Counter
from contextlib import suppress

import pytest

from tests import raw_client
from tests.e2e_support import DONE, Fakes, chat, events_of, fakes, idle
from tests.harness import Proxy, running_proxy, until

__all__ = ["fakes"]  # a fixture
LONGEST_S = 15.0


async def one_chat(proxy: Proxy, model: str, stream: bool, outcomes: Counter[str]) -> None:
    """Ask once, and count what came of it; anything but the allowed outcomes fails the test."""
    started = time.monotonic()
    answer = await chat(proxy, model, stream=stream)
    assert time.monotonic() - started < LONGEST_S
    if answer.status != 200:
        assert answer.status in (502, 503) and answer.error["code"] in (
            *("upstream_disconnected", "upstream_unreachable", "model_crashed", "model_load_failed"),
        ), answer.body
        outcomes[f"{answer.status} {answer.error['code']}"] += 1
    elif not stream:
        assert answer.json()["usage"]["completion_tokens"] == 20
        outcomes["whole"] += 1
    else:
        *events, end = events_of(answer.body)
        assert end == DONE
        error = json.loads(events[-1]).get("error")
        if error is None:
            assert len(events) == 22  # the role, 20 tokens, and the finish
        else:
            assert error["code"] == "upstream_disconnected"
        outcomes["stream told of a failure" if error else "whole stream"] += 1


async def chaos(fakes: Fakes, *, seconds: float, clients: int, kill_each_s: float) -> Counter[str]:
    """Clients that ask without a pause while one server after the other is killed."""
    models = {name: fakes.model(TOKENS=20, TOKEN_MS=10, fields={"args": ["--parallel", "8"]}) for name in "abc"}
    outcomes: Counter[str] = Counter()
    chance = random.Random(1)
    async with running_proxy(fakes.config(models, size=2, swap_after_s=0.2)) as proxy:
        fds, ends = proxy.fds(), time.monotonic() + seconds

        async def client() -> None:
            while time.monotonic() < ends:
                await one_chat(proxy, chance.choice("abc"), chance.random() < 0.7, outcomes)

        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(client())
            while time.monotonic() < ends:
                await asyncio.sleep(kill_each_s)  # the rhythm of the killing
                for victim in proxy.children()[:1]:
                    with suppress(ProcessLookupError):
                        os.kill(victim.pid, signal.SIGKILL)
                        outcomes["killed"] += 1
        await until(lambda: idle(proxy))
        for name in models:
            await raw_client.post(proxy.port, "/models/unload", {"model": name})
        await until(lambda: proxy.fds() <= fds + 5, what="the return of the file descriptors")
        assert proxy.children() == []
    return outcomes


async def test_k1_servers_that_are_killed_under_load_cost_only_streams_that_had_begun(fakes: Fakes) -> None:
    outcomes = await chaos(fakes, seconds=5.0, clients=20, kill_each_s=1.0)
    assert outcomes["killed"] and outcomes["whole"] and outcomes["whole stream"]
    assert outcomes.keys() <= {"killed", "whole", "whole stream", "stream told of a failure"}, outcomes


@pytest.mark.full
async def test_k1_half_a_minute_of_killing(fakes: Fakes) -> None:
    outcomes = await chaos(fakes, seconds=30.0, clients=50, kill_each_s=2.5)
    assert outcomes["whole"] and outcomes["whole stream"] and outcomes["stream told of a failure"]
    assert outcomes.keys() <= {"killed", "whole", "whole stream", "stream told of a failure"}, outcomes


@pytest.mark.full
async def test_k1_killing_faster_than_servers_can_work(fakes: Fakes) -> None:
    outcomes = await chaos(fakes, seconds=15.0, clients=50, kill_each_s=0.2)
    assert outcomes["whole"] and outcomes["whole stream"] and outcomes["stream told of a failure"], outcomes
