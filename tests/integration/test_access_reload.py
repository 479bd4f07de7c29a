"""Keys over a reload of the configuration: removed ones are dead at once, and what others have used stays counted."""

from __future__ import annotations

import asyncio
from typing import Any

from llama_smart_proxy.backends.feed import Kind
from tests.support.harness import until
from tests.support.keyed import ADMIN, CHAT, FEW, KEYS, MESSAGES, USER, answering, keyed
from tests.support.raw_client import request
from tests.support.toxic import Link, Request

BODY: dict[str, Any] = {"model": "a1", "messages": MESSAGES}


async def test_a_removed_key_is_unknown_at_once_also_on_a_connection_that_it_has_opened() -> None:
    async with keyed() as proxy, proxy.connected() as client:
        asked = request("POST", CHAT, BODY, headers=[("x-api-key", USER)])
        await client.send(asked)
        assert (await client.answer()).status == 200
        await proxy.reload(api_keys=KEYS[1:])
        await client.send(asked)
        assert (await client.answer()).status == 401
        assert (await proxy.chat(ADMIN)).status == 200
        await proxy.reload(api_keys=[{"name": "root", "key": USER}, *KEYS[2:]])
        assert [(await proxy.chat(key)).status for key in (USER, ADMIN, FEW)] == [200, 401, 200]
        assert (await proxy.ask("POST", "/models/load", {"model": "a1"}, key=USER)).status == 403


async def test_an_answer_under_way_is_completed_for_a_key_that_is_removed() -> None:
    gate = asyncio.Event()

    async def gated(link: Link, asked: Request) -> None:
        if asked.body:
            await gate.wait()
        await answering(link, asked)

    async with keyed(script=gated) as proxy:
        running = asyncio.ensure_future(proxy.chat(USER, stream=True))
        await until(lambda: proxy.sent(CHAT))
        await proxy.reload(api_keys=KEYS[1:])
        gate.set()
        assert b"[DONE]" in (await running).body and (await proxy.chat(USER)).status == 401


async def test_what_a_key_has_used_is_counted_on_over_a_reload() -> None:
    key = {"name": "user", "key": USER}
    async with keyed([{**key, "requests_per_minute": 2, "concurrent": 1}]) as proxy:
        assert (await proxy.chat(USER)).status == 200
        await proxy.reload(api_keys=[{**key, "requests_per_minute": 2}])
        assert [(await proxy.chat(USER)).status for _ in range(2)] == [200, 429]
        await proxy.reload(api_keys=[key])
        assert (await proxy.chat(USER)).status == 200


async def test_who_watches_sees_nothing_more_once_the_key_has_gone() -> None:
    async with keyed() as proxy, proxy.connected() as client, proxy.connected() as other:
        for watching, path in ((client, "/models/sse"), (other, "/events")):
            await watching.send(request("GET", path, headers=[("x-api-key", ADMIN)]))
            assert (await watching.head())[1] == 200
        assert await client.chunk()
        await proxy.reload(api_keys=KEYS[:1])
        assert proxy.app is not None
        proxy.app.lasting.feed.publish(Kind.MODEL, "a1", {"state": "loaded"})
        for watching in (client, other):
            while shown := await watching.chunk():
                assert b'"loaded"' not in shown
