"""What is added to the proxy without a change to it, as clients meet it."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.fakes import toy
from tests.support.harness import Proxy, ports, running_proxy, until
from tests.support.raw_client import get, post
from tests.support.speakers import SPEAKERS

REPLY = "Five words of a toy"


@pytest.fixture
async def proxy(tmp_path: Path) -> AsyncIterator[Proxy]:
    """A proxy that one file and one line of its configuration have given a backend."""
    file = shutil.copy(toy.__file__, tmp_path / "toy.py")
    config = {
        "modules": [file],
        "sections": {"toy": {"models": ["small", "Large"], "reply": REPLY}},
        "server_pool": {"size": 1, **ports()},
    }
    async with running_proxy(config) as proxy:
        yield proxy


async def instances(proxy: Proxy) -> list[dict[str, Any]]:
    found = (await proxy.health())["instances"]
    assert isinstance(found, list)
    return found


async def listed(proxy: Proxy) -> dict[str, tuple[str, str]]:
    items = (await get(proxy.port, "/v1/models")).json()["data"]
    return {item["id"]: (item["owned_by"], item["status"]["value"]) for item in items}


async def test_a_backend_in_one_file_is_used_like_any_other(proxy: Proxy) -> None:
    assert await listed(proxy) == {"small": ("toy", "unloaded"), "Large": ("toy", "unloaded")}
    for speaker in SPEAKERS.values():
        for stream in (True, False):
            outcome = await speaker.ask(proxy.port, speaker.body("small", stream=stream))
            assert (outcome.status, outcome.text, outcome.error) == (200, REPLY, None), speaker.name
    assert (await listed(proxy))["small"] == ("toy", "loaded")
    [instance] = await instances(proxy)
    assert (instance["model"], instance["state"], instance["restarts"]) == ("small", "ready", 0)
    process = psutil.Process(instance["pid"])

    assert (await post(proxy.port, "/models/unload", {"model": "small"})).status == 200
    assert await listed(proxy) == {"small": ("toy", "unloaded"), "Large": ("toy", "unloaded")}
    await until(lambda: not process.is_running(), what="the end of the process")
    assert await instances(proxy) == [] and proxy.children() == []


async def test_its_models_share_the_pool_and_end_with_the_proxy(proxy: Proxy) -> None:
    chat = SPEAKERS["openai"]
    for model in ("small", "large:latest"):
        assert (await chat.ask(proxy.port, chat.body(model, stream=False))).text == REPLY
    assert [(entry["model"], entry["state"]) for entry in await instances(proxy)] == [("Large", "ready")]
    assert len(proxy.children()) == 1  # `running_proxy` sees that none outlives the proxy
    running = (await get(proxy.port, "/api/ps")).json()["models"]
    assert [model["model"] for model in running] == ["Large"]
