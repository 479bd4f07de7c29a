"""Many reloads, good and bad ones, while very many requests are in flight (RELIABILITY D7, D8)."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support.e2e_support import CHAT, Fakes, body_of, fakes
from tests.support.harness import Proxy, free_port, until
from tests.support.reloads import Reloadable, reloadable
from tests.system.test_reload import BAD

__all__ = ["fakes"]
MIB = 2**20


class Clients:
    """Clients that ask one after the other, each for a stream of one of the models, until they are stopped."""

    def __init__(self, proxy: Proxy, models: list[str], count: int) -> None:
        self.outcomes: Counter[object] = Counter()
        self.in_flight = 0
        self._stop = False
        self._session = aiohttp.ClientSession(proxy.url, connector=aiohttp.TCPConnector(limit=0))
        self._tasks = [asyncio.ensure_future(self._ask(models[number % len(models)])) for number in range(count)]

    async def _ask(self, model: str) -> None:
        while not self._stop:
            self.in_flight += 1
            async with self._session.post(CHAT, json=body_of(model, stream=True)) as answer:
                data = await answer.read()
            self.in_flight -= 1
            complete = data.endswith(b"data: [DONE]\n\n")
            self.outcomes["complete" if complete else (model, answer.status, data[:300])] += 1

    async def stop(self) -> None:
        self._stop = True
        await asyncio.gather(*self._tasks)
        await self._session.close()


@pytest.mark.parametrize(
    ("clients", "good", "bad"), [(20, 2, 1), pytest.param(1000, 50, len(BAD), marks=pytest.mark.full)]
)
async def test_no_request_fails_while_good_and_bad_configurations_come(
    fakes: Fakes, tmp_path: Path, clients: int, good: int, bad: int
) -> None:
    def models(number: int) -> dict[str, Any]:
        slots = {"parallel": 16}
        changed = {"parallel": 16, "args": ["--number", str(number)]}
        return {"stays": fakes.model(fields=slots), "changes": fakes.model(fields=changed)}

    config = fakes.config(models(0), size=3, queue_limit=2000)
    async with reloadable(config, tmp_path / "own") as running:
        asking = Clients(running.proxy, ["stays", "changes"], clients)
        await until(lambda: asking.in_flight == clients and asking.outcomes["complete"] > clients)
        pids = {child.pid for child in running.proxy.children()}
        spoilers = list(BAD.values())[:bad]
        for number in range(1, good + 1):
            remotes = {"r": {"url": f"http://127.0.0.1:{free_port()}", "models": [f"x{number}"]}}
            agents: list[Any] = [{"think": {}}] if number % 2 else []
            found = await running.apply(models=models(number), remotes=remotes, agents=agents)
            assert found["models_changed"] == ["changes"] and found["models_removed"] == []
            if number <= len(spoilers):
                spoilers[number - 1][0](running.file)
                assert await running.refused()
                await restored(running)
            before = asking.outcomes["complete"]
            await until(lambda before=before: asking.outcomes["complete"] > before + clients // 10)  # type: ignore[misc]
        await asking.stop()
        assert set(asking.outcomes) == {"complete"}
        stays = next(entry for entry in (await running.proxy.health())["instances"] if entry["model"] == "stays")
        assert stays["pid"] in pids and stays["restarts"] == 0


async def restored(running: Reloadable) -> None:
    if running.file.is_dir():
        running.file.rmdir()


@pytest.mark.full
async def test_what_a_configuration_took_is_given_back(fakes: Fakes, tmp_path: Path) -> None:
    """Two hundred of them, each with agents and remotes of its own."""
    async with reloadable(fakes.config({"m": fakes.model()}), tmp_path / "own") as running:
        sizes = []
        for number in range(200):
            remotes = {f"r{number}": {"url": f"http://127.0.0.1:{free_port()}", "models": ["x"]}}
            await running.apply(
                remotes=remotes, agents=[{"redact": {"patterns": ["email"]}} if number % 2 else "think"]
            )
            if number in (49, 199):
                sizes.append((running.proxy.rss_bytes(), running.proxy.fds()))
        (early, fds), (late, fds_late) = sizes
        assert late - early < 30 * MIB and fds_late <= fds + 2
