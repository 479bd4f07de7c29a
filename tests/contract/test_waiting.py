"""What a client gets while it waits for a stream, by the official clients of each API and by Open WebUI's rules.

A second is 50 ms here, and the server is behind a gate: what comes before it opens came while the client waited.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anthropic
import ollama
import openai
import pytest

from llama_smart_proxy.proxy.chat.status import STATUS_MARK
from llama_smart_proxy.proxy.stream import waiting
from tests.support import raw_client
from tests.support.agent_clients import WAYS, Said, Way, write_agent
from tests.support.e2e_support import MESSAGES, Fakes, Gate, fakes, gate
from tests.support.here import served_here

__all__ = ["fakes", "gate"]  # fixtures
CHAT_OF_ONE: Any = MESSAGES
STREAMS = [way for way in WAYS if way.stream]
OPEN_WEBUI = [("X-OpenWebUI-Chat-Id", "6f5e")]
SIGNS = (b": waiting\n\n", b'event: ping\ndata: {"type": "ping"}\n\n')
by_way = pytest.mark.parametrize("way", STREAMS, ids=lambda way: way.name)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("LOOK_S", 0.05), ("SIGN_S", 0.1), ("STATUS_S", 0.1), ("THOUGHT_S", 0.1), ("SLACK_S", 0.01)):
        monkeypatch.setattr(waiting, name, seconds)


@asynccontextmanager
async def served(fakes: Fakes, gate: Gate, agents: dict[str, str] | None = None, **server: Any) -> AsyncIterator[int]:
    """The port of a proxy with the models `slow`, which loads until the gate opens, and `bad`, which fails then."""
    models = {"slow": fakes.model(LOAD_UNTIL=gate), "bad": fakes.model(LOAD_UNTIL=gate, EXIT="3@loaded")}
    config = fakes.config(models, size=1) | {"server": server, "agents": list(agents or ())}
    for name, source in (agents or {}).items():
        if source:  # else it is one of those that are shipped
            write_agent(fakes.folder / "agents", name, source)
            config["agents_dirs"] = [str(fakes.folder / "agents")]
    async with served_here(config) as (_, port):
        yield port


@asynccontextmanager
async def asked(
    port: int, way: Way, body: dict[str, Any], headers: list[tuple[str, str]] | None = None
) -> AsyncIterator[raw_client.RawClient]:
    async with raw_client.connected(port) as client:
        await client.send(raw_client.request("POST", way.path, body, headers=headers or []))
        yield client


async def rest_of(client: raw_client.RawClient) -> tuple[bytes, bool]:
    """What follows, and whether it ended properly."""
    data = b""
    try:
        while piece := await client.chunk():
            data += piece
    except (raw_client.BrokenAnswer, ConnectionError):
        return data, False
    return data, True


def read(way: Way, data: bytes, intact: bool = True) -> Said:
    for sign in SIGNS:
        data = data.replace(sign, b"")
    return way.read_stream(data, intact)


def is_sign(way: Way, frame: bytes) -> bool:
    """Whether `frame` adds nothing, in the API of `way`."""
    if not way.path.startswith("/api/"):
        return frame == SIGNS[way.path == "/v1/messages"]
    line = json.loads(frame)
    assert line["model"] in ("slow", "bad") and line["created_at"] and frame.endswith(b"}\n")
    return not line["done"] and (line["message"] if way.path == "/api/chat" else line) in (
        {"role": "assistant", "content": ""},
        {**line, "response": ""},
    )


# -- headers and signs of life -----------------------------------------------------------------------------------------


@by_way
async def test_a_stream_has_headers_and_signs_of_life_while_its_model_loads(fakes: Fakes, gate: Gate, way: Way) -> None:
    async with served(fakes, gate) as port, asked(port, way, way.body("hi", model="slow")) as client:
        _, status, headers = await client.head()
        found = dict(headers)
        kind = "application/x-ndjson" if way.path.startswith("/api/") else "text/event-stream"
        assert (status, found["content-type"].partition(";")[0]) == (200, kind) and found["x-request-id"]
        first, second = await client.chunk(), await client.chunk()
        assert is_sign(way, first) and is_sign(way, second), (first, second)
        gate.open()
        said = read(way, *await rest_of(client))
    assert said.error is None and said.text.startswith("t0 t1")


@by_way
async def test_a_failure_after_the_headers_is_the_error_of_the_api(fakes: Fakes, gate: Gate, way: Way) -> None:
    async with served(fakes, gate) as port, asked(port, way, way.body("hi", model="bad")) as client:
        await client.head()
        assert is_sign(way, await client.chunk())
        gate.open()
        data, intact = await rest_of(client)
    if way.path == "/v1/responses":
        assert b"event: error\n" in data and b'"code":"model_load_failed"' in data and intact
        return
    said = read(way, data, intact)
    assert said.error is not None and "exit" in said.error, data
    assert intact is not way.path.startswith("/api/"), "a clean end would be a complete answer to clients of Ollama"


async def _openai_text(port: int, model: str) -> str:
    async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
        stream: Any = await client.chat.completions.create(model=model, messages=CHAT_OF_ONE, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])


async def _responses_text(port: int, model: str) -> str:
    async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
        stream = await client.responses.create(model=model, input="hi", stream=True)
        return "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])


async def _anthropic_text(port: int, model: str) -> str:
    async with (
        anthropic.AsyncAnthropic(base_url=f"http://127.0.0.1:{port}", api_key="none", max_retries=0) as client,
        client.messages.stream(model=model, messages=CHAT_OF_ONE, max_tokens=100) as stream,
    ):
        return await stream.get_final_text()


async def _ollama_text(port: int, model: str) -> str:
    async with ollama.AsyncClient(host=f"http://127.0.0.1:{port}", verify=False) as client:
        return "".join(
            [part.message.content or "" async for part in await client.chat(model, CHAT_OF_ONE, stream=True)]
        )


CLIENTS: dict[str, tuple[Callable[[int, str], Awaitable[str]], Callable[[Any], object], object]] = {
    "openai": (_openai_text, lambda exc: exc.code, "model_load_failed"),
    "responses": (_responses_text, lambda exc: exc.code, "model_load_failed"),
    "anthropic": (_anthropic_text, lambda exc: exc.body["error"]["type"], "overloaded_error"),
    "ollama": (_ollama_text, lambda exc: "exit" in str(exc), True),
}


@pytest.mark.parametrize("name", CLIENTS)
async def test_official_clients_ignore_signs_of_life_and_raise_for_an_error_after_them(
    fakes: Fakes, gate: Gate, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, code_of, code = CLIENTS[name]
    signs: list[int] = []
    look = waiting.Wait.look

    def counted(wait: waiting.Wait, now: float) -> bool:
        again = look(wait, now)
        signs.append(wait.response.opened)
        if len(signs) > 4:
            gate.open()
        return again

    monkeypatch.setattr(waiting.Wait, "look", counted)
    async with served(fakes, gate) as port:
        async with asyncio.timeout(raw_client.DEADLINE_S):
            assert (await text(port, "slow")).startswith("t0 t1")
        (fakes.folder / "gate").unlink()
        signs.clear()
        with pytest.raises((openai.APIError, anthropic.APIError, ollama.ResponseError)) as raised:
            await text(port, "bad")
    assert all(signs) and code_of(raised.value) == code


# -- status lines and events -------------------------------------------------------------------------------------------

CHAT = next(way for way in STREAMS if way.path == "/v1/chat/completions")
RESEARCH = """
import asyncio
from pathlib import Path

class Research(Agent):
    command = "research"

    async def on_request(self, request, ctx):
        await ctx.status("Searching for   papers")
        await ctx.event("source", {"source": {"name": "A"}, "document": ["a"], "metadata": [{"source": "A"}]})

    async def on_response(self, stream, ctx):
        async for chunk in stream:
            yield chunk
            if chunk.text == "t1 ":
                await ctx.event("notification", {"type": "info", "content": "half"})
                await ctx.status("Counting")
                if "x-until" in ctx.headers:
                    await asyncio.wait_for(asyncio.to_thread(Path(ctx.headers["x-until"]).read_bytes), 60)
"""
"""An agent that waits in the middle of an answer until something is written into the pipe that the client names."""


def events_of(data: bytes) -> list[Any]:
    """The events of a stream in their order, and each piece of the text."""
    found: list[Any] = []
    for frame in data.split(b"\n\n"):
        if frame.startswith(b"data: {"):
            value = json.loads(frame[6:])
            found.append(value["event"] if "event" in value else value["choices"][0]["delta"].get("content"))
    return [item for item in found if item]


def lines_of(events: list[Any]) -> list[tuple[str, bool, bool]]:
    """The status lines among them: text, done, hidden."""
    data = [event["data"] for event in events if isinstance(event, dict) and event["type"] == "status"]
    return [(one["description"], one["done"], one.get("hidden", False)) for one in data]


@pytest.mark.parametrize(
    ("headers", "server", "shown"),
    [
        ([("x-openwebui-user-name", "Ann")], {}, True),
        ([("User-Agent", "Open WebUI/0.13")], {}, True),
        ([], {"status_events": "on"}, True),
        (OPEN_WEBUI, {"status_events": "off"}, False),
        ([("User-Agent", "Python/3.11 aiohttp/3.14.5")], {}, False),
    ],
    ids=["headers", "user-agent", "on", "off", "others"],
)
async def test_open_webui_gets_status_lines_that_are_gone_before_the_answer(
    fakes: Fakes, gate: Gate, headers: list[tuple[str, str]], server: dict[str, Any], shown: bool
) -> None:
    body = CHAT.body("hi", model="slow")
    async with served(fakes, gate, **server) as port, asked(port, CHAT, body, headers) as client:
        await client.head()
        before = b"".join([await client.chunk() for _ in range(3)])
        gate.open()
        rest, intact = await rest_of(client)
    assert intact and read(CHAT, rest.partition(b'"hidden":true}}}\n\n')[2] or rest).text.startswith("t0 t1")
    events = events_of(before + rest)
    lines = lines_of(events)
    if not shown:
        assert lines == [] and set(before.split(b"\n\n")) == {b": waiting", b""}
        return
    assert len(lines) >= 4 and lines[-1] == (lines[-2][0], True, True) and all(text for text, _, _ in lines)
    assert [done for _, done, _ in lines] == [False] * (len(lines) - 1) + [True]
    assert [type(event) for event in events[: len(lines) + 1]] == [dict] * len(lines) + [str]


async def test_a_status_line_is_gone_before_an_error(fakes: Fakes, gate: Gate) -> None:
    async with served(fakes, gate) as port, asked(port, CHAT, CHAT.body("hi", model="bad"), OPEN_WEBUI) as client:
        await client.head()
        first = await client.chunk()
        gate.open()
        rest, _ = await rest_of(client)
    hidden, _, after = rest.partition(b'"hidden":true}}}\n\n')
    assert b'"status"' in first and b'"error"' not in hidden and after.startswith(b'data: {"error"')


@pytest.mark.parametrize("headers", [OPEN_WEBUI, []], ids=["open-webui", "others"])
async def test_what_an_agent_reports_is_shown_beside_the_answer_at_its_place(
    fakes: Fakes, gate: Gate, headers: list[tuple[str, str]]
) -> None:
    gate.open()
    until, body = fakes.folder / "until", CHAT.body("/research hi", model="slow")
    os.mkfifo(until)
    named = [*headers, ("X-Until", str(until))]
    data = b""
    async with served(fakes, gate, {"research": RESEARCH}) as port, asked(port, CHAT, body, named) as client:
        await client.head()
        while (b"Counting" if headers else SIGNS[0]) not in data.partition(b"t1 ")[2]:
            data += await client.chunk()
        await asyncio.to_thread(until.write_bytes, b"go on")
        rest, _ = await rest_of(client)
    events = events_of(data + rest)
    texts = [event for event in events if isinstance(event, str)]
    assert "".join(texts).startswith("t0 t1 t2")
    if not headers:
        assert texts == events
        return
    kinds = [event if isinstance(event, str) else event["type"] for event in events]
    assert kinds[0] == "source" and kinds.index("notification") == kinds.index("t1 ") + 1
    assert ("Counting", True, True) in lines_of(events[kinds.index("t1 ") : kinds.index("t2 ")])


@by_way
async def test_events_of_agents_reach_no_other_api(fakes: Fakes, gate: Gate, way: Way) -> None:
    gate.open()
    async with served(fakes, gate, {"research": RESEARCH}, status_events="on") as port:
        body = way.body("/research hi", model="slow")
        async with asked(port, way, body) as client:
            await client.head()
            data, intact = await rest_of(client)
    assert (b'{"event"' in data) is (way is CHAT)
    if way is not CHAT:
        assert read(way, data, intact).text.startswith("t0 t1 t2")


READING = b"Reading your prompt: 40 %"
REPORT = b'"prompt_progress"'


@pytest.mark.parametrize(
    ("headers", "fields", "awaited"),
    [(OPEN_WEBUI, {}, READING), (OPEN_WEBUI, {"return_progress": True}, REPORT), ([], {}, b": waiting")],
    ids=["open-webui", "asked for", "others"],
)
@pytest.mark.parametrize("command", ["", "/research "], ids=["relayed", "agent"])
async def test_open_webui_is_shown_how_far_the_prompt_is_read_and_gets_no_reports_that_it_did_not_ask_for(
    fakes: Fakes,
    gate: Gate,
    headers: list[tuple[str, str]],
    fields: dict[str, Any],
    awaited: bytes,
    command: str,
) -> None:
    gate.open()
    token = fakes.folder / "token"
    body = CHAT.body(command + json.dumps({"fake": {"tokens": 1, "last_at": str(token)}}), model="slow", **fields)
    data = b""
    async with served(fakes, gate, {"research": RESEARCH}) as port, asked(port, CHAT, body, headers) as client:
        await client.head()
        while awaited not in data or not fakes.generated():
            data += await client.chunk()
        token.touch()
        rest, _ = await rest_of(client)
    assert (READING in data + rest, REPORT in data + rest) == (awaited == READING, awaited == REPORT)
    assert [bool(body.get("return_progress")) for body in fakes.generated()] == [bool(headers)]
    assert "".join(event for event in events_of(rest) if isinstance(event, str)) == "t0 "


@by_way
async def test_other_clients_get_the_status_as_reasoning_if_that_is_configured(
    fakes: Fakes, gate: Gate, way: Way
) -> None:
    body = way.body("hi", model="slow")
    async with served(fakes, gate, loading_status="reasoning") as port, asked(port, way, body) as client:
        await client.head()
        first = await client.chunk()
        gate.open()
        said = read(way, *await rest_of(client))
    if way.path in ("/v1/chat/completions", "/api/chat", "/api/generate"):
        status = read(way, first + way_end(way))
        assert status.reasoning.startswith(STATUS_MARK + "Loading slow") and status.text == ""
    else:
        assert is_sign(way, first), "there is no place for it that does not depend on the rest of the answer"
    assert said.text.startswith("t0 t1")


def way_end(way: Way) -> bytes:
    """The end of a stream without text."""
    if way.path.startswith("/api/"):
        return b'{"message": {"content": ""}, "response": "", "done": true, "done_reason": "stop"}\n'
    return b'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'


async def test_parallel_reports_whom_it_asks_in_place_of_silence(fakes: Fakes, gate: Gate) -> None:
    body, data = CHAT.body("/parallel hi", model="slow"), b""
    async with served(fakes, gate, {"parallel": ""}) as port, asked(port, CHAT, body, OPEN_WEBUI) as client:
        await client.head()
        while b"Asking slow, 3 times" not in data:
            data += await client.chunk()
        gate.open()
        rest, _ = await rest_of(client)
    events = events_of(data + rest)
    first = next(at for at, event in enumerate(events) if isinstance(event, str))
    lines = lines_of(events)
    assert lines == lines_of(events[:first]) and lines[-1][1:] == (True, True)


async def test_half_a_character_in_the_status_of_an_agent_costs_no_answer(fakes: Fakes, gate: Gate) -> None:
    gate.open()
    until, body = fakes.folder / "until", CHAT.body("/research hi", model="slow")
    os.mkfifo(until)
    source, data = RESEARCH.replace("Counting", "Half \\ud83d"), b""
    headers = [*OPEN_WEBUI, ("X-Until", str(until))]
    async with served(fakes, gate, {"research": source}) as port, asked(port, CHAT, body, headers) as client:
        await client.head()
        while b"t1 " not in data:
            data += await client.chunk()
        data += await client.chunk() + await client.chunk()  # the notification, and the status
        await asyncio.to_thread(until.write_bytes, b"go on")
        rest, intact = await rest_of(client)
    assert intact and ("Half ?", True, True) in lines_of(events_of(data + rest)) and b"t2 " in rest
