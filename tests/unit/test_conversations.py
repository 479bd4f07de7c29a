"""Requests for resumable streams: who stops one ends it, in whichever moment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, cast

import pytest

from llama_smart_proxy.backends.base import Model, UpstreamRequest
from llama_smart_proxy.proxy.api.conversations import Conversations
from llama_smart_proxy.proxy.errors import BadRequest

REQUEST = UpstreamRequest("POST", "/v1/chat/completions", b"{}")


class Loading:
    """A model that loads until `loaded` is set, and counts the requests that it gets."""

    name = "m"

    def __init__(self) -> None:
        self.loaded = asyncio.Event()
        self.requests = 0

    async def load(self, *, wait: bool = True) -> None:
        await self.loaded.wait()

    @asynccontextmanager
    async def open(self, request: UpstreamRequest) -> AsyncIterator[Any]:
        self.requests += 1
        yield None


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.mark.parametrize("later", range(6))
@pytest.mark.parametrize("stopped", [True, False])
async def test_a_request_that_is_stopped_is_never_sent_however_soon_after_its_client_left(
    later: int, stopped: bool
) -> None:
    conversations, model = Conversations(), Loading()
    task = asyncio.create_task(conversations.load("c", cast(Model, model), REQUEST, limit=1))
    await turns(2)
    assert conversations.waits("c")
    task.cancel()
    await turns(later)
    assert conversations.waits("c")
    if stopped:
        conversations.stop("c")
        assert not conversations.waits("c")
    with suppress(asyncio.CancelledError):
        await task
    model.loaded.set()
    await turns(10)
    assert model.requests == (not stopped) and not conversations.waits("c")
    await conversations.close()


async def test_stopping_ends_the_wait_of_a_client_that_is_there() -> None:
    conversations, model = Conversations(), Loading()
    task = asyncio.create_task(conversations.load("c", cast(Model, model), REQUEST, limit=1))
    await turns(2)
    conversations.stop("c")
    with pytest.raises(BadRequest):
        await task
    assert model.requests == 0 and not conversations.waits("c")
