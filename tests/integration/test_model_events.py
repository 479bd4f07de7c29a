"""`GET /models/sse` follows the feed: no event waits for the next look at what no one reports."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from llama_smart_proxy.proxy.api import router_mode
from tests.support import raw_client
from tests.support.harness import ports
from tests.support.here import served_here
from tests.support.pools import QUICK, Fakes
from tests.support.raw_client import EventReader, request


@pytest.fixture(autouse=True)
def no_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_mode, "EVENTS_S", 1e6)


class Events(EventReader):
    async def until(self, **data: object) -> list[Any]:
        """All events up to one whose data has these fields."""
        seen = [await self.next()]
        while not data.items() <= seen[-1]["data"].items():
            seen.append(await self.next())
        return seen


@asynccontextmanager
async def watched(fakes: Fakes, **models: dict[str, Any]) -> AsyncIterator[tuple[int, Events]]:
    settings = {
        "llama_cpp": {"server": str(fakes.program), "hf_cache": False},
        "server_pool": QUICK | ports(),
        "models": {"m": {"path": str(fakes.gguf), **models.get("m", {})}, "v": {"model": "m"}},
        "state_dir": str(fakes.folder / "state"),
    }
    async with served_here(settings) as (_, port), raw_client.connected(port) as client:
        await client.send(request("GET", "/models/sse"))
        assert (await client.head())[1] == 200
        yield port, Events(client)


async def test_every_state_of_a_model_arrives_when_it_changes(fakes: Fakes, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    async with watched(fakes, m={"env": {"FAKE_LOAD_UNTIL": str(gate)}}) as (port, events):
        first = [await events.next(), await events.next()]
        unloaded = {"event": "model_status", "data": {"status": "unloaded"}}
        assert first == [{"model": "m", **unloaded}, {"model": "v", **unloaded}]
        for path, states in (("load", ("loading", "loaded")), ("unload", ("unloaded",))):
            assert (await raw_client.post(port, f"/models/{path}", {"model": "m"})).json() == {"success": True}
            for state in states:
                if state == "loaded":
                    gate.touch()
                seen = [await events.next(), await events.next()]
                status = {"event": "model_status", "data": {"status": state}}
                assert seen == [{"model": "m", **status}, {"model": "v", **status}]


async def test_a_failed_load_arrives_with_its_reason(fakes: Fakes) -> None:
    async with watched(fakes, m={"env": {"FAKE_EXIT": "3"}}) as (port, events):
        await raw_client.post(port, "/models/load", {"model": "m"})
        [*_, failed] = await events.until(status="unloaded", failed=True)
        assert "exited with code 3" in failed["data"]["error"]
