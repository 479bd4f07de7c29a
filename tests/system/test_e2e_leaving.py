"""Clients that leave: whatever they waited for, their place is free again at once and their model server is told."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support import raw_client
from tests.support.e2e_support import (
    Fakes,
    Gate,
    asking,
    chat,
    embedded,
    fakes,
    gate,
    idle,
    instance,
    needs_llama_cpp,
    queued,
    state,
    streaming,
    tiny,
)
from tests.support.gguf_fixture import tiny_models
from tests.support.harness import Proxy, running_proxy, until

__all__ = ["fakes", "gate", "tiny_models"]  # fixtures
ENDLESS: dict[str, Any] = {"TOKENS": 2400, "TOKEN_MS": 50}
"""Answers of two minutes: what comes true within the patience of `until` did not wait for their end."""


def waits(proxy: Proxy, model: str, number: int) -> Callable[[], Awaitable[bool]]:
    """Whether so many wait for `model`, as a condition."""

    async def check() -> bool:
        return await queued(proxy, model) == number

    return check


async def test_clients_that_leave_while_their_model_loads_leave_no_trace(fakes: Fakes, gate: Gate) -> None:
    async with running_proxy(fakes.config({"m": fakes.model(LOAD_UNTIL=gate)})) as proxy:
        async with AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(asking(proxy, "m")) for _ in range(10)]
            await until(waits(proxy, "m", 10))
            for left, client in enumerate(clients, 1):  # ten different moments of the load
                client.leave()
                await until(waits(proxy, "m", 10 - left))
            assert await state(proxy, "m") == "loading"
            gate.open()

        async def loaded() -> bool:
            return await state(proxy, "m") == "loaded"

        await until(loaded)  # the load went on, and stays warm
        assert await idle(proxy) and fakes.generated() == []
        assert (await chat(proxy, "m")).status == 200
        assert len(fakes.events("start")) == 1


async def test_a_load_that_others_wait_for_goes_on_for_them(fakes: Fakes, gate: Gate) -> None:
    async with running_proxy(fakes.config({"m": fakes.model(LOAD_UNTIL=gate)})) as proxy:
        async with asking(proxy, "m", user="first") as first, asking(proxy, "m", user="second") as second:
            await until(waits(proxy, "m", 2))
            first.leave()
            await until(waits(proxy, "m", 1))
            gate.open()
            assert (await second.answer()).status == 200
        assert [body["user"] for body in fakes.generated()] == ["second"]
        assert len(fakes.events("start")) == 1


async def test_clients_that_leave_the_queue_of_a_busy_model_leave_no_trace(fakes: Fakes) -> None:
    model = fakes.model(**ENDLESS, fields={"args": ["--parallel", "1"]})
    async with running_proxy(fakes.config({"m": model})) as proxy:
        async with streaming(proxy, "m") as stream, AsyncExitStack() as stack:
            await stream.until_text()
            clients = [await stack.enter_async_context(asking(proxy, "m")) for _ in range(10)]
            await until(waits(proxy, "m", 10))
            for left, client in enumerate(clients, 1):
                client.leave()
                await until(waits(proxy, "m", 10 - left))
            assert await stream.event()
        await until(lambda: idle(proxy))
        assert len(fakes.generated()) == 1


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_a_client_that_leaves_an_answer_closes_it_upstream(fakes: Fakes, stream: bool) -> None:
    async with running_proxy(fakes.config({"m": fakes.model(**ENDLESS)})) as proxy:
        async with asking(proxy, "m", stream=stream) as client:
            if stream:
                await client.head()
            await until(lambda: len(fakes.generated()) == 1)
            client.leave()
            await until(lambda: fakes.events("closed"), what="the close at the server")
        await until(lambda: idle(proxy))
        assert await state(proxy, "m") == "loaded"


async def test_a_client_that_closes_only_its_sending_side_gets_its_answer_or_a_clean_close(fakes: Fakes) -> None:
    async with running_proxy(fakes.config({"m": fakes.model(TOKENS=3, TOKEN_MS=50)})) as proxy:
        async with asking(proxy, "m") as client:
            client.half_close()
            said = await client.rest()
        assert said == b"" or said.endswith(b"}")
        await until(lambda: idle(proxy))


@needs_llama_cpp
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_a_slot_of_llama_cpp_is_idle_soon_after_its_client_has_left(
    tiny_models: dict[str, Path], stream: bool
) -> None:
    context = 32768  # half a minute or more of tokens
    async with running_proxy(embedded({"m": tiny(tiny_models["tiny-a"], ctx=context)})) as proxy:

        async def slots() -> list[dict[str, Any]]:
            return list((await raw_client.get(proxy.port, "/slots?model=m")).json())

        async def busy() -> bool:
            return [slot["is_processing"] for slot in await slots()].count(True) == 1

        async def rested() -> bool:
            return not any(slot["is_processing"] for slot in await slots())

        async with asking(proxy, "m", stream=stream, ignore_eos=True, max_tokens=-1) as client:
            await until(busy)
            client.leave()
            for _ in range(45):
                if stream or await rested():
                    break
                # llama.cpp looks for the client of a whole answer when it has had nothing to tell anybody for a second,
                # not even of its slots.
                await asyncio.sleep(2)
            await until(rested, 90)
        (tokens,) = [slot["n_prompt_tokens"] for slot in await slots() if "n_prompt_tokens" in slot]
        assert tokens < context - 1, "the answer came to its end"
        await until(lambda: idle(proxy))


async def test_a_hundred_leaving_clients_leave_the_proxy_as_it_was(fakes: Fakes) -> None:
    model = fakes.model(TOKENS=1000, TOKEN_MS=20, fields={"args": ["--parallel", "8"]})
    async with running_proxy(fakes.config({"m": model})) as proxy:
        await chat(proxy, "m", fake={"tokens": 1})
        before = proxy.fds()

        async def come_and_go(number: int) -> None:
            async with asking(proxy, "m", stream=bool(number % 2)) as client:
                await asyncio.sleep(number / 100 * 0.3)  # different moments, whatever is going on then
                client.leave()

        async with asyncio.TaskGroup() as clients:
            for number in range(100):
                clients.create_task(come_and_go(number))
        await until(lambda: idle(proxy))
        await until(lambda: proxy.fds() <= before + 5, what="the return of the file descriptors")
        assert (await instance(proxy, "m"))["restarts"] == 0
        assert (await chat(proxy, "m", fake={"tokens": 1})).status == 200
