"""Clients that leave: whatever they waited for, their place is free again at once and their model server is told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests import raw_client
from tests.e2e_support import (
    CHAT,
    Fakes,
    asking,
    body_of,
    chat,
    embedded,
    fakes,
    idle,
    instance,
    needs_llama_cpp,
    queued,
    state,
    streaming,
    tiny,
)
from tests.gguf_fixture import tiny_models
from tests.harness import Proxy, running_proxy, until

__all__ = ["fakes", "tiny_models"]  # fixtures
PROMPTLY_S = 1.0
"""Ten times what is promised: these machines are shared."""


def waits(proxy: Proxy, model: str, number: int) -> Callable[[], Awaitable[bool]]:
    """Whether so many wait for `model`, as a condition."""

    async def check() -> bool:
        return await queued(proxy, model) == number

    return check


async def test_l1_clients_that_leave_while_their_model_loads_leave_no_trace(fakes: Fakes) -> None:
    async with running_proxy(fakes.config({"m": fakes.model(LOAD_S=1.5)})) as proxy:
        async with AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(asking(proxy, "m")) for _ in range(10)]
            await until(waits(proxy, "m", 10))
            for left, client in enumerate(clients, 1):  # ten different moments of the load
                client.leave()
                await until(waits(proxy, "m", 10 - left), PROMPTLY_S)
            assert await state(proxy, "m") == "loading"

        async def loaded() -> bool:
            return await state(proxy, "m") == "loaded"

        await until(loaded)  # the load went on, and stays warm
        assert await idle(proxy) and fakes.generated() == []
        assert (await chat(proxy, "m")).status == 200
        assert len(fakes.events("start")) == 1


async def test_l1_a_load_that_others_wait_for_goes_on_for_them(fakes: Fakes) -> None:
    async with running_proxy(fakes.config({"m": fakes.model(LOAD_S=0.5)})) as proxy:
        async with asking(proxy, "m", user="first") as first, asking(proxy, "m", user="second") as second:
            await until(waits(proxy, "m", 2))
            first.leave()
            assert (await second.answer()).status == 200
        assert [body["user"] for body in fakes.generated()] == ["second"]
        assert len(fakes.events("start")) == 1


async def test_l1_clients_that_leave_the_queue_of_a_busy_model_leave_no_trace(fakes: Fakes) -> None:
    model = fakes.model(TOKENS=1000, TOKEN_MS=20, fields={"args": ["--parallel", "1"]})
    async with running_proxy(fakes.config({"m": model})) as proxy:
        async with streaming(proxy, "m") as stream, AsyncExitStack() as stack:
            await stream.until_text()
            clients = [await stack.enter_async_context(asking(proxy, "m")) for _ in range(10)]
            await until(waits(proxy, "m", 10))
            for left, client in enumerate(clients, 1):
                client.leave()
                await until(waits(proxy, "m", 10 - left), PROMPTLY_S)
            assert await stream.event()
        await until(lambda: idle(proxy), PROMPTLY_S)
        assert len(fakes.generated()) == 1


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_l1_a_client_that_leaves_an_answer_closes_it_upstream(fakes: Fakes, stream: bool) -> None:
    async with running_proxy(fakes.config({"m": fakes.model(TOKENS=1000, TOKEN_MS=50)})) as proxy:
        async with asking(proxy, "m", stream=stream) as client:
            if stream:
                await client.head()
            await until(lambda: len(fakes.generated()) == 1)
            client.leave()
            left = time.monotonic()
            await until(lambda: fakes.events("closed"), PROMPTLY_S, what="the close at the server")
        assert fakes.events("closed")[0]["time"] - left < PROMPTLY_S
        await until(lambda: idle(proxy), PROMPTLY_S)
        assert await state(proxy, "m") == "loaded"


async def test_s7_a_client_that_closes_only_its_sending_side_gets_its_answer_or_a_clean_close(fakes: Fakes) -> None:
    async with running_proxy(fakes.config({"m": fakes.model(TOKENS=3, TOKEN_MS=50)})) as proxy:
        async with asking(proxy, "m") as client:
            client.half_close()
            said = await client.rest()
        assert said == b"" or said.endswith(b"}")
        await until(lambda: idle(proxy), PROMPTLY_S)


@needs_llama_cpp
@pytest.mark.parametrize("moment", ["mid-stream", "whole"])
async def test_s6_a_slot_of_llama_cpp_is_idle_soon_after_its_client_has_left(
    tiny_models: dict[str, Path], moment: str
) -> None:
    async with running_proxy(embedded({"m": tiny(tiny_models["tiny-a"])})) as proxy:

        async def busy_slots() -> int:
            slots = (await raw_client.get(proxy.port, "/slots?model=m")).json()
            return sum(slot["is_processing"] for slot in slots)

        async def busy() -> bool:
            return await busy_slots() == 1

        async def rested() -> bool:
            return await busy_slots() == 0

        body = body_of("m", stream=moment == "mid-stream", ignore_eos=True, max_tokens=-1)
        async with raw_client.connected(proxy.port) as client:
            await client.send(raw_client.request("POST", CHAT, body))
            await until(busy)
            client.leave()
            left = time.monotonic()
            await until(rested)
            assert time.monotonic() - left < 5.0  # llama.cpp looks once a second whether its client is there
        await until(lambda: idle(proxy), PROMPTLY_S)


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
