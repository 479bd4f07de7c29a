"""A server that lives and generates nothing, as its clients and the operator see it."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support import raw_client
from tests.support.e2e_support import (
    SMOLLM2,
    Fakes,
    chat,
    embedded,
    fakes,
    instance,
    needs_llama_cpp,
    steered,
    streaming,
    tiny,
)
from tests.support.gguf_fixture import tiny_models
from tests.support.harness import Proxy, running_proxy, stopped, until
from tests.support.ollamas import running_ollama
from tests.support.speakers import SPEAKERS

__all__ = ["fakes", "tiny_models"]  # fixtures


async def problems(proxy: Proxy) -> dict[str, str]:
    """What `/health` reports, by its place."""
    health = await proxy.health()
    assert health["status"] == ("degraded" if health["problems"] else "healthy")
    return {problem["where"]: problem["message"] for problem in health["problems"]}


async def decoded(proxy: Proxy) -> int:
    """How many tokens the server of `m` has sent."""
    slots = (await raw_client.get(proxy.port, "/slots?model=m")).json()
    return int(slots[0]["next_token"][0]["n_decoded"])


async def test_streams_of_a_stopped_server_fail_in_every_api_and_all_else_is_answered(fakes: Fakes) -> None:
    models = {"m": fakes.model(fields={"parallel": 6}), "other": fakes.model()}
    async with running_proxy(fakes.config(models, stall_timeout_s=3)) as proxy:
        assert (await chat(proxy, "other")).status == 200
        assert (await chat(proxy, "m", max_tokens=1)).status == 200
        begun = steered(stall_after=2)
        asks = [speaker.ask(proxy.port, speaker.body("m", begun, stream=True)) for speaker in SPEAKERS.values()]
        streams = [asyncio.ensure_future(ask) for ask in asks]

        async def all_begun() -> bool:
            return await decoded(proxy) == 1 + 2 * len(streams)

        await until(all_begun, what="two tokens of each stream")
        pid = (await instance(proxy, "m"))["pid"]
        await stopped(pid)
        waiting = [asyncio.ensure_future(chat(proxy, "m", stream=bool(number % 2))) for number in range(6)]
        found: dict[str, str] = {}

        async def degraded() -> bool:
            found.update(await problems(proxy))
            return bool(found)

        await until(degraded, what="the report of it")
        assert (await chat(proxy, "other")).status == 200
        for outcome in await asyncio.gather(*streams):
            assert outcome.text == "t0 t1 " and outcome.error is not None and "it stalled" in outcome.error
        assert [answer.status for answer in await asyncio.gather(*waiting)] == [200] * 6
        await until(lambda: _healthy(proxy), what="the end of the report")
        assert set(found) == {"models.m"} and "nothing generated for" in found["models.m"]
        assert len(fakes.events("start")) == 3 and (await instance(proxy, "m"))["pid"] != pid
        await until(
            lambda: "it stalled: nothing generated for" in proxy.log and "CPU time 0.0" in proxy.log, what="the log"
        )


async def _healthy(proxy: Proxy) -> bool:
    return not await problems(proxy)


@needs_llama_cpp
@pytest.mark.parametrize("transport", ["tcp", "unix"])
async def test_llama_cpp_that_is_stopped_is_replaced_on_either_transport(
    tiny_models: dict[str, Path], transport: str
) -> None:
    config: dict[str, Any] = embedded({"m": tiny(tiny_models["tiny-a"], "--parallel", "1")}, stall_timeout_s=3)
    config["llama_cpp"]["transport"] = transport
    async with running_proxy(config) as proxy, streaming(proxy, "m", max_tokens=1500, ignore_eos=True) as stream:
        await stream.until_text()
        await stopped((await instance(proxy, "m"))["pid"])
        others = [asyncio.ensure_future(chat(proxy, "m", max_tokens=4)) for _ in range(4)]  # they wait for the slot
        assert [answer.status for answer in await asyncio.gather(*others)] == [200] * 4
        assert b"it stalled" in (await stream.rest())[-2]


async def test_a_stalled_stream_of_an_ollama_host_fails_after_its_idle_limit_in_every_api() -> None:
    """Nothing can be replaced there."""
    async with running_ollama("m", tokens=2, token_s=10.0) as fake:
        config = {"ollama": {"host": f"127.0.0.1:{fake.port}", "idle_timeout_s": 2}}
        async with running_proxy(config) as proxy:
            asks = [speaker.ask(proxy.port, speaker.body("m", stream=True)) for speaker in SPEAKERS.values()]
            for outcome in await asyncio.gather(*asks):
                assert outcome.text == "t0 " and outcome.error is not None and "nothing for 2 s" in outcome.error


@pytest.mark.full
@needs_llama_cpp
async def test_the_requests_of_a_stopped_llama_cpp_are_all_served_by_one_that_replaces_it(
    tiny_models: dict[str, Path],
) -> None:
    """All of them together, not one after the other."""
    models = {"m": tiny(tiny_models["tiny-a"], "--parallel", "2"), "other": tiny(tiny_models["tiny-b"])}
    async with running_proxy(embedded(models, stall_timeout_s=5)) as proxy:
        assert [(await chat(proxy, model, max_tokens=2)).status for model in models] == [200, 200]
        await stopped((await instance(proxy, "m"))["pid"])
        begun = time.monotonic()
        waiting = [asyncio.ensure_future(chat(proxy, "m", max_tokens=2, stream=bool(n % 2))) for n in range(16)]
        assert (await chat(proxy, "other", max_tokens=2)).status == 200
        assert [answer.status for answer in await asyncio.gather(*waiting)] == [200] * 16
        assert time.monotonic() - begun >= 5 and (await instance(proxy, "m"))["restarts"] == 1


@pytest.mark.full
@needs_llama_cpp
async def test_a_busy_llama_cpp_is_never_taken_for_a_stalled_one() -> None:
    """Prompts that take it far longer than the limit, more of them than it has slots, and no token meanwhile."""
    long = {"messages": [{"role": "user", "content": "one two three four five " * 120}], "max_tokens": 2}
    config = embedded({"m": {**SMOLLM2, "ctx": 8192, "parallel": 2}}, stall_timeout_s=3)
    async with running_proxy(config) as proxy:
        asks = [chat(proxy, "m", **{**long, "cache_prompt": False, "seed": number}) for number in range(3)]
        assert [answer.status for answer in await asyncio.gather(*asks)] == [200] * 3
        assert "stalled" not in proxy.log and (await instance(proxy, "m"))["restarts"] == 0
