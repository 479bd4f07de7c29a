"""A remote with a limit: how many requests it gets at one time, and what becomes of the others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from llama_smart_proxy.backends.base import UpstreamRequest
from llama_smart_proxy.backends.openai import Remote, RemoteModel
from llama_smart_proxy.backends.progress import Progress
from llama_smart_proxy.proxy.config import RemoteConfig
from llama_smart_proxy.proxy.errors import Overloaded
from tests.support.harness import until
from tests.support.toxic import Link, RawUpstream, Request, plain, raw_upstream

CHAT = "/v1/chat/completions"


class Busy:
    """A server that answers no chat until it is let to."""

    def __init__(self) -> None:
        self.go = asyncio.Event()

    async def script(self, link: Link, asked: Request) -> None:
        if CHAT in asked.line:
            await self.go.wait()
        await link.send(plain(b"{}"))


@asynccontextmanager
async def limited(most: int, **settings: object) -> AsyncIterator[tuple[RemoteModel, Busy, RawUpstream]]:
    busy = Busy()
    async with raw_upstream(busy.script) as upstream:
        url = f"http://127.0.0.1:{upstream.port}"
        config = RemoteConfig.model_validate({"url": url, "models": ["m"], "concurrent": most, **settings})
        remote = Remote("r", config)
        yield RemoteModel(remote, "m"), busy, upstream
        busy.go.set()
        await remote.close()


async def ask(model: RemoteModel, **fields: object) -> int:
    request = UpstreamRequest("POST", CHAT, b"{}")
    for name, value in fields.items():
        setattr(request, name, value)
    async with model.open(request) as response:
        await response.read(1024)
        return response.status


async def test_a_remote_gets_no_more_requests_than_its_limit_and_the_others_in_their_order() -> None:
    async with limited(2) as (model, busy, upstream):
        progress = Progress()
        asking = [asyncio.ensure_future(ask(model, progress=progress if number == 4 else None)) for number in range(5)]
        await until(lambda: len(upstream.requests) == 2 and progress.text, what="two requests, and a wait")
        assert progress.text.startswith("Waiting for r")
        assert await ask(model, path="/tokenize", slot=False) == 200, "a question takes no turn"
        asking[2].cancel()  # whose turn goes to the next one
        busy.go.set()
        done = await asyncio.gather(*asking, return_exceptions=True)
        assert [result if isinstance(result, int) else type(result) for result in done] == [
            *(200, 200, asyncio.CancelledError, 200, 200)
        ]
        assert await ask(model) == 200, "all turns are free again"


async def test_who_must_not_wait_or_has_waited_too_long_is_refused() -> None:
    async with limited(1) as (model, _, upstream):
        first = asyncio.ensure_future(ask(model))
        await until(lambda: len(upstream.requests) == 1, what="the first request")
        with pytest.raises(Overloaded, match="must not wait") as refused:
            await ask(model, wait=False)
        assert refused.value.code == "no_slot_now"
        turns = model._remote.turns
        assert turns is not None
        turns._limit_s = 0.05
        with pytest.raises(Overloaded, match=r"not free within 0\.05 s"):
            await ask(model)
        assert not first.done() and len(upstream.requests) == 1
        first.cancel()
        await asyncio.wait([first])
