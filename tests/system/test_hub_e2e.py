"""Models of the hub in a running proxy: fetched when first asked for, once, and in nobody's way."""

from __future__ import annotations

import asyncio
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.hub import Hub, gguf, running_hub
from tests.support import raw_client
from tests.support.e2e_support import (
    Fakes,
    asking,
    chat,
    embedded,
    fakes,
    idle,
    instance,
    needs_llama_cpp,
    queued,
    state,
)
from tests.support.gguf_fixture import tiny_models
from tests.support.harness import running_proxy, until
from tests.support.hub_calls import small_disk
from tests.support.raw_client import Answer

__all__ = ["fakes", "small_disk", "tiny_models"]  # fixtures
FILE = "org/repo/m-Q4_K_M.gguf"
HALF, WHOLE = 500_000, 1_000_000


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with running_hub(tmp_path / "hub") as hub:
        yield hub


def far(fakes: Fakes, **fields: object) -> dict[str, Any]:
    """A model of the hub, on the fake llama-server."""
    model = fakes.model(fields={"repo": "org/repo", **fields})
    del model["path"]
    return model


def home(fakes: Fakes) -> Path:
    return fakes.folder / "home"


def fetches(hub: Hub) -> list[str | None]:
    """The ranges that were asked for; None is everything."""
    return [request["range"] for request in hub.requests(having="/resolve/")]


async def halfway(fakes: Fakes) -> None:
    """Return when half of the file is there, and the hub does not go on."""
    blobs = home(fakes) / "hub" / "models--org--repo" / "blobs"
    await until(lambda: any(file.stat().st_size >= HALF - 8192 for file in blobs.glob("*")), what="half of it")


def test_proxy_processes_of_tests_have_an_empty_cache() -> None:
    from tests.support.harness import environment

    assert not (Path(environment()["HF_HOME"]) / "hub").exists()


@needs_llama_cpp
async def test_a_model_of_the_hub_answers_on_real_llama_cpp(
    hub: Hub, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    hub.add("org/repo/tiny-F32.gguf", tiny_models["tiny-a"].read_bytes())
    models = {"far": {"repo": "org/repo", "variant": "*F32.gguf", "args": ["-t", "1"], "ctx": 2048}}
    async with running_proxy(embedded(models), env=hub.env(tmp_path / "home")) as proxy:
        answer = await chat(proxy, "far", max_tokens=8, temperature=0)
        assert answer.status == 200 and answer.json()["choices"][0]["message"]["content"]
        await until(lambda: "hf.co/org/repo:*F32.gguf: download complete" in proxy.log, what="the line of the log")
    async with running_proxy(embedded(models), env=hub.env(tmp_path / "home", HF_HUB_OFFLINE="1")) as proxy:
        assert (await chat(proxy, "far", max_tokens=8, temperature=0)).status == 200
        assert "download" not in proxy.log
    assert fetches(hub) == [None]


async def test_a_download_takes_no_place_and_delays_nobody(hub: Hub, fakes: Fakes) -> None:
    hub.add(FILE, gguf(WHOLE))
    hub.behave(FILE, hold=0.5)
    config = fakes.config({"far": far(fakes), "near": fakes.model()}, size=1)
    async with running_proxy(config, env=hub.env(home(fakes))) as proxy:
        waiting = asyncio.ensure_future(chat(proxy, "far"))
        await halfway(fakes)
        entry = await instance(proxy, "far")
        assert (entry["state"], entry["queue"]) == ("downloading", 1)
        assert entry["download"]["total"] == WHOLE and entry["download"]["completed"] <= HALF
        assert await state(proxy, "far") == "loading"
        for _ in range(3):
            assert (await chat(proxy, "near")).status == 200
        assert await state(proxy, "near") == "loaded" and not waiting.done()
        hub.behave(FILE)
        assert (await waiting).status == 200
        assert await state(proxy, "far") == "loaded"


async def test_fifty_chats_wait_for_one_download(hub: Hub, fakes: Fakes) -> None:
    hub.add(FILE, gguf(WHOLE))
    hub.behave(FILE, hold=0.5)
    config = fakes.config({"far": far(fakes)})
    async with running_proxy(config, env=hub.env(home(fakes))) as proxy:
        waiting = [asyncio.ensure_future(chat(proxy, "far")) for _ in range(50)]

        async def all_wait() -> bool:
            return await queued(proxy, "far") == 50

        await until(all_wait)
        hub.behave(FILE)
        assert {answer.status for answer in await asyncio.gather(*waiting)} == {200}
        await until(lambda: "download complete" in proxy.log, what="the line of the log")
        assert proxy.log.count("download begins") == 1
    assert fetches(hub) == [None] and len(fakes.events("start")) == 1


async def test_who_waits_for_a_download_counts_against_the_queue_limit(hub: Hub, fakes: Fakes) -> None:
    hub.add(FILE, gguf(WHOLE))
    hub.behave(FILE, hold=0.5)
    config = fakes.config({"far": far(fakes)}, queue_limit=1)
    async with running_proxy(config, env=hub.env(home(fakes))) as proxy:
        waiting = asyncio.ensure_future(chat(proxy, "far"))
        await halfway(fakes)
        refused = await chat(proxy, "far")
        assert refused.status == 503 and refused.error["code"] == "overloaded"
        hub.behave(FILE)
        assert (await waiting).status == 200


async def test_a_client_who_leaves_leaves_the_download(hub: Hub, fakes: Fakes) -> None:
    hub.add(FILE, gguf(WHOLE))
    hub.behave(FILE, hold=0.5)
    async with running_proxy(fakes.config({"far": far(fakes)}), env=hub.env(home(fakes))) as proxy:
        async with asking(proxy, "far"):
            await halfway(fakes)

        async def gone() -> bool:
            return await idle(proxy)

        await until(gone)
        assert await state(proxy, "far") == "loading"
        hub.behave(FILE)
        await until(lambda: "download complete" in proxy.log)
        assert fakes.events("start") == []
        assert (await chat(proxy, "far")).status == 200
    assert fetches(hub) == [None]


async def test_unloading_breaks_a_download_off_and_the_next_request_goes_on(hub: Hub, fakes: Fakes) -> None:
    hub.add(FILE, gguf(WHOLE))
    hub.behave(FILE, hold=0.5)
    async with running_proxy(fakes.config({"far": far(fakes)}), env=hub.env(home(fakes))) as proxy:
        waiting = asyncio.ensure_future(chat(proxy, "far"))
        await halfway(fakes)
        await raw_client.post(proxy.port, "/models/unload", {"model": "far"})
        refused = await waiting
        assert refused.status == 503 and refused.error["code"] == "unloaded"
        assert await state(proxy, "far") == "unloaded"
        hub.behave(FILE)
        assert (await chat(proxy, "far")).status == 200
    assert fetches(hub) == [None, f"bytes={HALF}-{WHOLE - 1}"]


async def test_a_shutdown_does_not_wait_for_a_download(hub: Hub, fakes: Fakes) -> None:
    hub.add(FILE, gguf(WHOLE))
    hub.behave(FILE, hold=0.5)
    config = fakes.config({"far": far(fakes, preload=True)}) | {"server": {"drain_s": 0.2}}
    async with running_proxy(config, env=hub.env(home(fakes))) as proxy:
        waiting = asyncio.ensure_future(chat(proxy, "far"))
        await halfway(fakes)
        proxy.send(signal.SIGTERM)
        refused = await waiting
        assert refused.status == 503 and refused.error["code"] == "shutting_down"
        assert await proxy.ended() == 0


async def test_a_preloaded_model_is_fetched_at_the_start(hub: Hub, fakes: Fakes) -> None:
    hub.add(FILE, gguf(WHOLE))
    config = fakes.config({"far": far(fakes, preload=True)})
    async with running_proxy(config, env=hub.env(home(fakes))) as proxy:

        async def loaded() -> bool:
            return await state(proxy, "far") == "loaded"

        await until(loaded)
        assert 0 < (await instance(proxy, "far"))["expires_in_s"] <= 300
    assert fetches(hub) == [None]


async def test_a_file_that_was_removed_is_fetched_again(hub: Hub, fakes: Fakes) -> None:
    hub.add(FILE, gguf(1000))
    async with running_proxy(fakes.config({"far": far(fakes)}), env=hub.env(home(fakes))) as proxy:
        assert (await chat(proxy, "far")).status == 200
        await raw_client.post(proxy.port, "/models/unload", {"model": "far"})
        shutil.rmtree(home(fakes) / "hub")
        assert (await chat(proxy, "far")).status == 200
    assert len(fetches(hub)) == 2


# -- what cannot be had ------------------------------------------------------------------------------------------------


async def refused(hub: Hub, fakes: Fakes, times: int = 1, **env: str) -> list[Answer]:
    async with running_proxy(fakes.config({"far": far(fakes)}), env=hub.env(home(fakes), **env)) as proxy:
        answers = [await chat(proxy, "far") for _ in range(times)]
        entry = await instance(proxy, "far")
        assert entry["state"] == "unloaded" and entry["error"] == answers[0].error["message"]
    assert fakes.events("start") == []
    return answers


async def test_a_gated_or_missing_model_is_told_and_asked_for_again_at_once(hub: Hub, fakes: Fakes) -> None:
    missing, again = await refused(hub, fakes, 2)
    assert missing.status == again.status == 404 and missing.error["code"] == "model_not_found"
    assert "there is no repository org/repo" in missing.error["message"]
    assert len(hub.requests(having="/api/models/")) == 2
    hub.add(FILE, gguf(1000))
    hub.behave("org/repo", token="hf_x")
    (gated,) = await refused(hub, fakes)
    assert gated.status == 403 and gated.error["code"] == "model_gated"


async def test_a_download_that_fails_is_not_tried_again_with_every_request(hub: Hub, fakes: Fakes) -> None:
    hub.add(FILE, gguf(1000))
    hub.behave(FILE, lie="content")
    first, again = await refused(hub, fakes, 2)
    assert first.status == again.status == 503 and again.error == first.error
    assert first.error["code"] == "download_failed" and again.header("retry-after")
    assert fetches(hub) == [None]


async def test_offline_is_told(hub: Hub, fakes: Fakes) -> None:
    (answer,) = await refused(hub, fakes, HF_HUB_OFFLINE="1")
    assert answer.status == 503 and "HF_HUB_OFFLINE" in answer.error["message"]
    assert hub.requests(having="") == []


async def test_a_full_disk_is_told_and_other_models_go_on(hub: Hub, fakes: Fakes, small_disk: Path) -> None:
    hub.add(FILE, gguf(6_000_000))
    config = fakes.config({"far": far(fakes), "near": fakes.model()})
    async with running_proxy(config, env=hub.env(small_disk)) as proxy:
        answers = await asyncio.gather(*(chat(proxy, name) for name in ("near", "far", "near")))
        assert [answer.status for answer in answers] == [200, 503, 200]
        assert answers[1].error["code"] == "no_space"
        assert (await chat(proxy, "near")).status == 200
