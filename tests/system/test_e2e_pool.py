"""The pool as clients meet it: swaps, evictions, times to live, deaths of servers, and leaving clients."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.support.e2e_support import (
    CHAT,
    DONE,
    SMOLLM2,
    Fakes,
    Gate,
    asking,
    chat,
    embedded,
    error_of,
    events_of,
    fakes,
    gate,
    idle,
    instance,
    live_children,
    needs_llama_cpp,
    queued,
    stalled_streams,
    state,
    streaming,
    text_of,
    tiny,
)
from tests.support.gguf_fixture import tiny_models
from tests.support.harness import Proxy, running_proxy, until

__all__ = ["fakes", "gate", "tiny_models"]  # fixtures
EARLY_S = 0.05
"""So much earlier than it should a timer may fire that counts in milliseconds."""


def is_(proxy: Proxy, model: str, wanted: str) -> Callable[[], Awaitable[bool]]:
    """Whether the list says so of the model, to wait for."""

    async def check() -> bool:
        return await state(proxy, model) == wanted

    return check


# -- swapping ----------------------------------------------------------------------------------------------------------


@needs_llama_cpp
async def test_models_swap_in_a_pool_of_one(tiny_models: dict[str, Path]) -> None:
    models = {"smollm2": SMOLLM2, "tiny": tiny(tiny_models["tiny-a"])}
    async with running_proxy(embedded(models, size=1)) as proxy:
        for name in ("smollm2", "tiny", "smollm2"):
            answer = await chat(proxy, name, max_tokens=4)
            assert answer.status == 200 and answer.json()["model"] == name
            other = {"smollm2": "tiny", "tiny": "smollm2"}[name]
            assert [await state(proxy, name), await state(proxy, other)] == ["loaded", "unloaded"]
            assert live_children(proxy.pid) == 1


@needs_llama_cpp
async def test_fifty_clients_of_two_models_with_one_place_all_get_whole_answers(tiny_models: dict[str, Path]) -> None:
    models = {name: tiny(tiny_models[f"tiny-{name}"], "--parallel", "4") for name in "ab"}
    most = 0

    async def client(proxy: Proxy, number: int) -> None:
        nonlocal most
        name = "ab"[number % 2]
        for turn in range(3):
            stream = (number + turn) % 3 > 0
            answer = await chat(proxy, name, stream=stream, max_tokens=20, ignore_eos=True)
            assert answer.status == 200, answer.body
            most = max(most, live_children(proxy.pid))
            if stream:
                events = events_of(answer.body)
                assert events[-1] == DONE and b'"finish_reason":"length"' in events[-2]
                assert json.loads(events[-2])["model"] == name
            else:
                value = answer.json()
                assert value["model"] == name and value["usage"]["completion_tokens"] == 20

    async with running_proxy(embedded(models, size=1, swap_after_s=0.1)) as proxy:
        async with asyncio.TaskGroup() as clients:
            for number in range(50):
                clients.create_task(client(proxy, number))
        assert most == 1
        await until(lambda: idle(proxy))


# -- a busy model is never evicted -------------------------------------------------------------------------------------


async def test_eviction_waits_for_the_end_of_a_stream_and_no_longer(fakes: Fakes, gate: Gate) -> None:
    models = {"busy": fakes.model(), "other": fakes.model()}
    async with running_proxy(fakes.config(models, size=1, swap_after_s=0.05)) as proxy:
        async with streaming(proxy, "busy", fake={"tokens": 40, "token_ms": 25, "last_at": str(gate)}) as stream:
            await stream.until_text()
            async with asking(proxy, "other") as other:
                while "t38" not in text_of(stream.events):  # a second, and as long as the test takes to see it
                    assert await stream.event()
                assert await queued(proxy, "other") == 1 and fakes.events("stop") == []
                gate.open()
                events = await stream.rest()
                assert (await other.answer()).status == 200  # long before `keep_alive` is over
        assert events[-1] == DONE and text_of(events).split() == [f"t{number}" for number in range(40)]
        (stop,), (_, start) = fakes.events("stop"), fakes.events("start")
        assert stop["time"] < start["time"]


async def test_a_request_that_waits_too_long_for_a_place_is_told_so(fakes: Fakes) -> None:
    models = {"busy": fakes.model(TOKENS=4800, TOKEN_MS=25), "other": fakes.model()}
    async with running_proxy(fakes.config(models, size=1, swap_after_s=0.05, queue_timeout_s=0.5)) as proxy:
        async with streaming(proxy, "busy") as stream:
            await stream.until_text()
            started = time.monotonic()
            answer = await chat(proxy, "other")
            assert time.monotonic() - started >= 0.5 - EARLY_S
            assert answer.status == 503 and answer.error["code"] == "queue_timeout"
            assert int(answer.header("retry-after") or 0) >= 1
            assert await stream.event()  # and the stream goes on
        assert len(fakes.events("start")) == 1


# -- times to live -----------------------------------------------------------------------------------------------------


def idle_s(fakes: Fakes, model: str) -> list[float]:
    """Of each server of `model` that was told to stop: seconds from the arrival of its last chat to that."""
    found = []
    for start in fakes.events("start"):
        if start["argv"][start["argv"].index("--alias") + 1] == model:
            mine = [event for event in fakes.events("request", "stop") if event["pid"] == start["pid"]]
            asked = max(event["time"] for event in mine if event.get("path") == CHAT)
            found += [event["time"] - asked for event in mine if event["event"] == "stop"]
    return found


async def test_an_idle_model_is_unloaded_after_its_time_to_live(fakes: Fakes) -> None:
    models = {
        "default": fakes.model(),
        "own": fakes.model(fields={"keep_alive": 0.3}),
        "at-once": fakes.model(fields={"keep_alive": 0}),
        "never": fakes.model(fields={"keep_alive": -1}),
    }
    async with running_proxy(fakes.config(models, size=4, keep_alive=0.6)) as proxy:
        for name in models:
            assert (await chat(proxy, name)).status == 200
        for name, least_s in (("at-once", 0.0), ("own", 0.3), ("default", 0.6)):
            await until(lambda name=name: idle_s(fakes, name), what=f"the end of {name}")  # type: ignore[misc]
            assert min(idle_s(fakes, name)) >= least_s - EARLY_S
            await until(is_(proxy, name, "unloaded"))
        await until(lambda: live_children(proxy.pid) == 1, what="one last server")
        assert await state(proxy, "never") == "loaded"


async def test_use_prolongs_the_life_of_a_model(fakes: Fakes) -> None:
    models = {"m": fakes.model(TOKENS=1, TOKEN_MS=300, fields={"keep_alive": 0.5})}
    async with running_proxy(fakes.config(models)) as proxy:
        for _ in range(4):
            assert (await chat(proxy, "m")).status == 200
        await until(is_(proxy, "m", "unloaded"))
        await until(lambda: len(idle_s(fakes, "m")) == len(fakes.events("start")), what="the end of each server")
        assert min(idle_s(fakes, "m")) >= 0.3 + 0.5 - EARLY_S  # the answer, and the time to live behind it


async def test_a_preloaded_model_is_loaded_before_anybody_asks(fakes: Fakes) -> None:
    models = {"later": fakes.model(), "first": fakes.model(fields={"preload": True})}
    async with running_proxy(fakes.config(models)) as proxy:
        await until(is_(proxy, "first", "loaded"))
        assert await state(proxy, "later") == "unloaded"
        assert fakes.generated() == []


async def test_a_pinned_model_is_never_evicted(fakes: Fakes) -> None:
    models = {"kept": fakes.model(fields={"pinned": True, "keep_alive": 0}), "a": fakes.model(), "b": fakes.model()}
    async with running_proxy(fakes.config(models, size=2, swap_after_s=0.05)) as proxy:
        for name in ("kept", "a", "b", "a", "b"):
            assert (await chat(proxy, name)).status == 200
            assert await state(proxy, "kept") == "loaded"
        assert [event["argv"][event["argv"].index("--alias") + 1] for event in fakes.events("start")] == [
            *("kept", "a", "b", "a", "b")
        ]


# -- servers that die --------------------------------------------------------------------------------------------------


async def kill_server(proxy: Proxy, model: str) -> int:
    """`kill -9` of the server of `model`; its pid."""
    pid = (await instance(proxy, model))["pid"]
    os.kill(pid, signal.SIGKILL)
    return int(pid)


@needs_llama_cpp
async def test_a_server_killed_mid_stream_is_told_in_band_and_replaced(tiny_models: dict[str, Path]) -> None:
    config = embedded({"tiny": tiny(tiny_models["tiny-a"], ctx=32768)})  # half a minute or more of tokens
    async with running_proxy(config) as proxy:
        async with streaming(proxy, "tiny", ignore_eos=True, max_tokens=-1) as stream:
            await stream.until_text()
            killed = await kill_server(proxy, "tiny")
            events = await stream.rest()
        assert events[-1] == DONE
        error = json.loads(events[-2])["error"]
        assert sorted(error) == ["code", "message", "param", "type"]
        assert (error["type"], error["code"]) == ("server_error", "upstream_disconnected")
        assert b'"finish_reason":"' not in b"".join(events)
        assert (await chat(proxy, "tiny", max_tokens=3)).status == 200
        fresh = await instance(proxy, "tiny")
        assert fresh["pid"] != killed and fresh["restarts"] == 1


async def test_a_server_killed_before_the_first_byte_is_replaced_and_asked_again(fakes: Fakes) -> None:
    model = fakes.model(TOKENS=1, DIE_AFTER=0, TIMES=1, COUNTER=fakes.folder / "deaths")
    async with running_proxy(fakes.config({"m": model})) as proxy:
        answer = await chat(proxy, "m")
        assert answer.status == 200 and answer.json()["choices"][0]["message"]["content"] == "t0 "
        assert len(fakes.generated()) == len(fakes.events("start")) == 2


async def test_a_request_is_sent_twice_at_most(fakes: Fakes) -> None:
    async with running_proxy(fakes.config({"m": fakes.model()})) as proxy:
        await chat(proxy, "m")
        async with asking(proxy, "m", fake={"stall_after": 0}) as client:
            for number in (2, 3):
                await until(lambda n=number: len(fakes.generated()) == n)  # type: ignore[misc]
                await kill_server(proxy, "m")
            answer = await client.answer()
        assert answer.status == 502 and answer.error["code"] == "upstream_disconnected"
        assert len(fakes.generated()) == 3
        assert (await chat(proxy, "m")).status == 200


async def test_a_crash_is_noticed_when_it_happens(fakes: Fakes) -> None:
    async with running_proxy(fakes.config({"m": fakes.model(), "other": fakes.model()})) as proxy:
        for name in ("m", "other"):
            await chat(proxy, name)
        await kill_server(proxy, "m")
        await until(is_(proxy, "m", "unloaded"))
        entry = await instance(proxy, "m")
        assert "SIGKILL" in entry["error"] and "main: model loaded" in "".join(entry["log"])
        assert await state(proxy, "other") == "loaded"


async def test_streams_on_other_servers_go_on_when_one_is_killed(fakes: Fakes, gate: Gate) -> None:
    models = {name: fakes.model(TOKENS=30) for name in "ab"}
    held = {"last_at": str(gate)}
    async with running_proxy(fakes.config(models, size=2)) as proxy:
        async with streaming(proxy, "a", fake=held) as broken, streaming(proxy, "b", fake=held) as whole:
            await broken.until_text()
            await whole.until_text()
            await kill_server(proxy, "a")
            assert b"upstream_disconnected" in (await broken.rest())[-2]
            gate.open()
            events = await whole.rest()
        assert events[-1] == DONE and len(text_of(events).split()) == 30
        await until(lambda: idle(proxy))


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_model_that_dies_in_every_answer_gets_a_back_off(fakes: Fakes, streamed: bool) -> None:
    async with running_proxy(fakes.config({"m": fakes.model(DIE_AFTER=3)})) as proxy:
        answers = [await chat(proxy, "m", stream=streamed) for _ in range(8)]
    starts = len(fakes.events("start"))
    assert 1 <= starts <= 3
    refused = [answer for answer in answers if answer.status == 503]
    assert len(refused) >= 8 - starts
    for answer in refused:
        assert answer.error["code"] == "model_crashed"
        assert int(answer.header("retry-after") or 0) >= 1
    if streamed:
        *tokens, error, end = events_of(answers[0].body)
        assert b"t2 " in tokens[-1] and b"upstream_disconnected" in error and end == DONE


async def test_a_crash_in_mid_stream_is_told_as_a_disconnection(fakes: Fakes) -> None:
    names = [f"m{number}" for number in range(4)]
    models = {name: fakes.model(fields={"parallel": 4}) for name in names}
    async with running_proxy(fakes.config(models, size=4)) as proxy, stalled_streams(proxy, names, 4) as streams:
        for name in names:
            os.kill((await instance(proxy, name))["pid"], signal.SIGKILL)
        errors = [error_of(await stream.rest()) for stream in streams]
    assert {error["code"] for error in errors} == {"upstream_disconnected"}
    assert not any("shutting down" in str(error["message"]) for error in errors)
