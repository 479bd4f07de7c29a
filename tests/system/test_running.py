"""Requests that are being processed: listed, and cancelled by an administrator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.support import raw_client
from tests.support.agent_clients import write_agent
from tests.support.e2e_support import CHAT, Fakes, body_of, idle, instance, steered
from tests.support.harness import Proxy, session_proxy, until
from tests.support.raw_client import Answer, RawClient
from tests.support.speakers import SPEAKERS, Speaker
from tests.support.stages import Stage

NOTES = '''
from pathlib import Path

class Notes(Agent):
    """Waits before or behind the model, and writes down that it has ended."""
    command = "notes"

    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        if "early" not in str(request.messages):
            return None
        try:
            await asyncio.Event().wait()
        finally:
            Path({path!r}).write_text("ended early")

    async def on_response(self, chunks: ChunkStream, ctx: Context) -> ChunkStream:
        try:
            async for chunk in chunks:
                yield chunk
        finally:
            Path({path!r}).write_text("ended late")
'''


@pytest.fixture(scope="module")
def fakes(tmp_path_factory: pytest.TempPathFactory) -> Fakes:
    return Fakes(tmp_path_factory.mktemp("running"))


@pytest.fixture(scope="module")
def narrow(fakes: Fakes) -> Iterator[Proxy]:
    """A proxy whose model answers one request at a time, with the agent `notes`."""
    write_agent(fakes.folder / "agents", "notes", NOTES.format(path=str(fakes.folder / "notes")))
    fields = {"parallel": 1, "resumable_streams": True}
    config = fakes.config({"m": fakes.model(fields=fields)}, keep_alive=-1)
    with session_proxy(config | {"agents_dirs": [str(fakes.folder / "agents")], "agents": ["notes"]}) as proxy:
        yield proxy


@asynccontextmanager
async def asked(
    proxy: Proxy, name: str, body: dict[str, Any], path: str = CHAT, headers: tuple[tuple[str, str], ...] = ()
) -> AsyncIterator[RawClient]:
    """A request with this id, once it is listed."""
    async with raw_client.connected(proxy.port) as client:
        await client.send(raw_client.request("POST", path, body, headers=[("X-Request-Id", name), *headers]))
        await until(lambda: shown(proxy, name), what="the request in the list")
        yield client


async def shown(proxy: Proxy, name: str) -> list[dict[str, Any]]:
    """What `GET /running` has for the requests with this id."""
    requests = (await raw_client.get(proxy.port, "/running")).json()["requests"]
    return [request for request in requests if request["id"] == name]


async def comes_to(proxy: Proxy, name: str, state: str) -> None:
    async def is_so() -> bool:
        return [request["state"] for request in await shown(proxy, name)] == [state]

    await until(is_so, what=f"the state {state}")


async def cancel(proxy: Proxy, name: str, headers: tuple[tuple[str, str], ...] = ()) -> Answer:
    return await raw_client.ask(proxy.port, raw_client.request("DELETE", f"/running/{name}", headers=headers))


@pytest.mark.parametrize("speaker", SPEAKERS.values(), ids=SPEAKERS)
@pytest.mark.parametrize(("begun", "stream"), [(False, False), (False, True), (True, True)])
async def test_the_client_of_a_cancelled_request_gets_the_error_of_its_api(
    stage: Stage, speaker: Speaker, begun: bool, stream: bool
) -> None:
    name = f"cancelled-{speaker.name}-{begun}-{stream}"
    body = speaker.body("local", steered(**({"stall_after": 2} if begun else {"mute": 1})), stream=stream)
    async with asked(stage.proxy, name, body, speaker.path) as client:
        await comes_to(stage.proxy, name, "streaming" if begun else "answering")
        (request,) = await shown(stage.proxy, name)
        assert (request["model"], request["path"], request["method"]) == ("local", speaker.path, "POST")
        assert (await cancel(stage.proxy, name)).json() == {"id": name, "cancelled": 1}
        outcome = await speaker.received(client, stream=stream)
    assert outcome.error is not None and "cancelled by an administrator" in outcome.error
    assert outcome.status == (200 if begun else 410)
    assert await shown(stage.proxy, name) == []
    await until(lambda: idle(stage.proxy))


async def test_the_slot_of_a_cancelled_request_is_free_and_a_queued_one_leaves_the_queue(narrow: Proxy) -> None:
    stalled = body_of("m", stream=True, fake={"stall_after": 2})
    async with asked(narrow, "holds", stalled) as first, asked(narrow, "waits", body_of("m")) as second:
        await comes_to(narrow, "holds", "streaming")
        await comes_to(narrow, "waits", "queued")
        assert (await cancel(narrow, "waits")).status == 200
        answer = await second.answer()
        assert (answer.status, answer.error["code"]) == (410, "cancelled")
        assert (await instance(narrow, "m"))["queue"] == 0
        async with asked(narrow, "next", body_of("m")) as third:
            await cancel(narrow, "holds")
            assert (await third.answer()).status == 200
        assert b'"code":"cancelled"' in (await first.answer()).body


async def test_the_slot_is_free_although_the_client_reads_nothing(narrow: Proxy) -> None:
    flood = body_of("m", stream=True, fake={"tokens": 10**6})
    async with raw_client.connected(narrow.port, receive_buffer=4096) as client:
        await client.send(raw_client.request("POST", CHAT, flood, headers=[("X-Request-Id", "unread")]))
        await comes_to(narrow, "unread", "streaming")
        cancelling = asyncio.ensure_future(cancel(narrow, "unread"))
        assert (await raw_client.post(narrow.port, CHAT, body_of("m"))).status == 200
        assert (await cancelling).status == 200


@pytest.mark.parametrize("when", ["early", "late"])
async def test_an_agent_of_a_cancelled_request_cleans_up(narrow: Proxy, fakes: Fakes, when: str) -> None:
    notes = fakes.folder / "notes"
    notes.unlink(missing_ok=True)
    text = f"/notes {when}" if when == "early" else f"/notes {steered(stall_after=2)}"
    body = body_of("m", stream=True) | {"messages": [{"role": "user", "content": text}]}
    async with asked(narrow, when, body) as client:
        await comes_to(narrow, when, "queued" if when == "early" else "streaming")
        assert (await shown(narrow, when))[0]["agents"] == ["notes"]
        await cancel(narrow, when)
        assert notes.read_text() == f"ended {when}", "it has ended before the answer to DELETE"
        answer = await client.answer()
    assert b'"code":"cancelled"' in answer.body and answer.body.endswith(b"data: [DONE]\n\n") is (when == "late")
    assert (await raw_client.post(narrow.port, CHAT, body_of("m"))).status == 200


async def test_an_id_that_several_clients_have_chosen_cancels_all_of_them_and_not_the_one_that_asks(
    narrow: Proxy,
) -> None:
    silent = body_of("m", fake={"stall_after": 0})
    async with asked(narrow, "same", silent) as first, asked(narrow, "same", silent) as second:
        await until(lambda: _is(2, shown(narrow, "same")))
        answer = await cancel(narrow, "same", headers=(("X-Request-Id", "same"),))
        assert answer.json() == {"id": "same", "cancelled": 2}
        assert [(await client.answer()).status for client in (first, second)] == [410, 410]
    answer = await cancel(narrow, "same", headers=(("X-Request-Id", "same"),))
    assert (answer.status, answer.error["code"]) == (404, "not_found")


async def _is(count: int, listing: Any) -> bool:
    return len(await listing) == count


async def test_pulls_and_embeddings_are_cancelled_too(stage: Stage) -> None:
    await stage.distant.set(registry=None, pull_step_s=600, hang=["/api/embed"])
    async with asked(stage.proxy, "pull", {"model": "new:1b"}, "/api/pull") as client:
        await client.head()
        await comes_to(stage.proxy, "pull", "streaming")
        await cancel(stage.proxy, "pull")
        lines = b""
        while piece := await client.chunk():
            lines += piece
        assert b'"error":"This request was cancelled' in lines.splitlines()[-1]
    body = {"model": "distant", "input": "x"}
    async with asked(stage.proxy, "embed", body, "/v1/embeddings") as client:
        await until(lambda: any(event["path"] == "/api/embed" for event in stage.distant.events("request")))
        await cancel(stage.proxy, "embed")
        answer = await client.answer()
        assert (answer.status, answer.error["code"]) == (410, "cancelled")


async def test_a_resumable_stream_ends_on_its_server_too(narrow: Proxy, fakes: Fakes) -> None:
    body = body_of("m", stream=True, fake={"stall_after": 2})
    async with asked(narrow, "kept", body, headers=(("X-Conversation-Id", "chat 1"),)):
        await comes_to(narrow, "kept", "streaming")
        await cancel(narrow, "kept")
    sent = [(event["method"], event["path"]) for event in fakes.events("request")]
    assert ("DELETE", "/v1/stream?conv_id=chat+1") in sent


async def test_a_stream_of_events_is_closed(narrow: Proxy) -> None:
    async with raw_client.connected(narrow.port) as client:
        await client.send(raw_client.request("GET", "/models/sse", headers=[("X-Request-Id", "watches")]))
        await comes_to(narrow, "watches", "streaming")
        assert (await cancel(narrow, "watches")).status == 200
        await client.closed_by_peer()
    narrow.check_log()


async def test_why_explains_a_request_that_is_under_way(narrow: Proxy) -> None:
    async with asked(narrow, "slow", body_of("m", stream=True, fake={"stall_after": 2})):
        await comes_to(narrow, "slow", "streaming")
        explained = (await raw_client.get(narrow.port, "/admin/why/slow")).json()
        assert (explained["outcome"], explained["model"]) == ("under way", "m")
