"""Whatever a chain of agents does to an answer: its client gets a proper one, and everything is closed behind it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.base import Agent, Context
from agents.loader import Place
from proxy.agent_context import AgentContext
from proxy.chain import Active
from proxy.chat import ChatRequest, Chunk, ChunkStream, Timing
from proxy.config import AgentConfig, LimitsConfig
from proxy.dialects import ANTHROPIC, anthropic, ollama, openai
from proxy.dialects.codec import Face, Wire
from proxy.errors import ProxyError, UpstreamFailed
from proxy.layers import layer
from proxy.outlet import Outlet
from proxy.plugins import Made, Plugin
from proxy.scope import Scope
from proxy.source import Frames
from tests.agent_clients import Said, Way

REQUEST = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}
ENDS: dict[str, tuple[Face, Wire, Way]] = {
    "openai": (openai.CHAT, openai.WIRE, Way("/v1/chat/completions", stream=True)),
    "ollama": (ollama.CHAT, ollama.WIRE, Way("/api/chat", stream=True)),
    "anthropic": (anthropic.MESSAGES, anthropic.WIRE, Way("/v1/messages", stream=True)),
}


class Closing:
    """Counts the streams that are open."""

    def __init__(self) -> None:
        self.open = 0

    async def stream(self, chunks: list[Chunk], failure: ProxyError | None = None) -> AsyncIterator[Chunk]:
        self.open += 1
        try:
            for chunk in chunks:
                await asyncio.sleep(0)
                yield chunk
            if failure is not None:
                raise failure
        finally:
            self.open -= 1


class Scripted(Agent):
    """Does to the pieces of an answer what its script says, over and over; `closing` counts it, too."""

    def __init__(self, script: list[str], closing: Closing) -> None:
        super().__init__(Agent.Config())
        self.script, self.closing = script, closing

    async def on_response(self, stream: ChunkStream, ctx: Context) -> AsyncIterator[Chunk]:
        self.closing.open += 1
        held: list[Chunk] = []
        try:
            number = 0
            async for chunk in stream:
                action, number = self.script[number % len(self.script)], number + 1
                if action == "raise":
                    raise ValueError("scripted")
                if action == "stop":
                    break
                for passed in _done(action, chunk, held):
                    yield passed
                if action == "sleep":
                    await asyncio.sleep(0)
            for chunk in held:
                yield chunk
        finally:
            self.closing.open -= 1


def _done(action: str, chunk: Chunk, held: list[Chunk]) -> list[Chunk]:
    match action:
        case "drop":
            return []
        case "hold" if not chunk.tool_calls:  # the parts of a call belong together
            held.append(chunk)
            return []
        case "flush":
            flushed = [*held, chunk]
            held.clear()
            return flushed
        case "split" if chunk.text:
            half = len(chunk.text) // 2
            return [Chunk.of(chunk.text[:half]), chunk.with_text(chunk.text[half:])]
        case "inject":
            return [Chunk.of("+"), chunk]
        case "think":
            return [Chunk.of(reasoning="hm"), chunk]
        case "change":
            chunk.text = chunk.text.upper()
    return [chunk]


class Identity(Agent):
    """Passes everything on, as it comes."""

    async def on_chunk(self, chunk: Chunk, ctx: Context) -> Chunk | None:
        return chunk


def context(agent: Agent, scope: Scope, *, skip: bool = False) -> AgentContext:
    """The context that the proxy makes for an agent, as far as layers look at it."""
    settings = AgentConfig(name="scripted", on_error="skip" if skip else "fail")
    active = Active(Plugin("scripted", settings, Place("scripted"), True), Made(agent), agent.config, settings)
    calls = cast(Any, SimpleNamespace(limits=LimitsConfig()))
    return AgentContext(active, cast(Any, None), scope, calls)


async def answer(
    face: Face, chain: list[AgentContext], frames: Frames, source: AsyncIterator[Chunk]
) -> tuple[bytes, bool]:
    """What the client gets through this chain, and whether its connection is closed properly."""
    outlet = Outlet(face.writer(ChatRequest(dict(REQUEST), True), Timing(0.0)), face.dialect)
    written, layers, stream = [], [], source
    for ctx in chain:
        stream = layer(ctx, stream)
        layers.append(stream)
    intact = True
    try:
        async for chunk in stream:
            written.append(outlet.take(chunk))
        written.append(outlet.end(frames.tail, frames.count))
    except ProxyError as exc:
        written.append(outlet.error(exc))
        intact = not face.dialect.cuts
    finally:
        for opened in reversed(layers):
            await opened.aclose()
        await cast(Any, source).aclose()
    return b"".join(written), intact


# -- what a server sends -----------------------------------------------------------------------------------------------

words = st.lists(st.sampled_from(["a", " b", "c\u2028d", "e\n\nf", '"g"', "ü"]), max_size=6)


def openai_bytes(texts: list[str], tool: bool, pings: bool) -> bytes:
    def event(delta: dict[str, Any], finish: str | None = None) -> bytes:
        value = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m"}
        return (
            b"data: "
            + json.dumps({**value, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}).encode()
            + b"\n\n"
        )

    call = {"index": 0, "id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    events = [event({"role": "assistant", "content": None}), *(event({"content": text}) for text in texts)]
    events += [event({"tool_calls": [call]})] if tool else []
    events += [event({}, "tool_calls" if tool else "stop")]
    return (b":\n\n" if pings else b"").join(events) + b"data: [DONE]\n\n"


def ollama_bytes(texts: list[str], tool: bool, pings: bool) -> bytes:
    def line(message: dict[str, Any], **more: Any) -> bytes:
        return (
            json.dumps(
                {"model": "m", "created_at": "t", "message": {"role": "assistant", **message}, "done": False, **more}
            ).encode()
            + b"\n"
        )

    lines = [line({"content": text}) for text in texts]
    lines += [line({"content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]})] if tool else []
    return b"".join(lines) + line({"content": ""}, done=True, done_reason="stop", eval_count=len(texts))


def anthropic_bytes(texts: list[str], tool: bool, pings: bool) -> bytes:
    def event(kind: str, **fields: Any) -> bytes:
        return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()

    message = {
        "id": "1",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [],
        "usage": {"input_tokens": 1},
    }
    events = [event("message_start", message=message)]
    ping = [event("ping")] if pings else []
    if texts:
        events += [event("content_block_start", index=0, content_block={"type": "text", "text": ""}), *ping]
        events += [event("content_block_delta", index=0, delta={"type": "text_delta", "text": text}) for text in texts]
        events += [event("content_block_stop", index=0), *ping]
    if tool:
        index = 1 if texts else 0
        block = {"type": "tool_use", "id": "1", "name": "f", "input": {}}
        delta = {"type": "input_json_delta", "partial_json": "{}"}
        events += [
            event("content_block_start", index=index, content_block=block),
            event("content_block_delta", index=index, delta=delta),
        ]
        events += [event("content_block_stop", index=index)]
    ended = {"stop_reason": "tool_use" if tool else "end_turn", "stop_sequence": None}
    return b"".join([*events, event("message_delta", delta=ended, usage={"output_tokens": 1}), event("message_stop")])


SERVERS: dict[str, Callable[[list[str], bool, bool], bytes]] = {
    "openai": openai_bytes,
    "ollama": ollama_bytes,
    "anthropic": anthropic_bytes,
}
actions = st.sampled_from(
    ["pass", "drop", "hold", "flush", "split", "inject", "think", "change", "sleep", "stop", "raise"]
)
chains = st.lists(st.lists(actions, min_size=1, max_size=5), min_size=1, max_size=3)


def read(wire: Wire, data: bytes, cuts: list[int] = []) -> tuple[Frames, list[Chunk]]:  # noqa: B006
    """The chunks of an answer that arrives in these pieces."""
    frames = Frames(wire, ChatRequest(dict(REQUEST), True), verbatim=True)
    at = sorted(min(cut, len(data)) for cut in cuts)
    chunks = [chunk for a, b in zip([0, *at], [*at, len(data)], strict=True) for chunk in frames.feed(data[a:b])]
    chunks += frames.finish()
    assert frames.failure is None
    return frames, chunks


@pytest.mark.parametrize("api", ENDS)
def test_chunks_and_tail_are_what_the_server_sent_however_it_arrives(api: str) -> None:
    _, wire, _ = ENDS[api]

    @given(words, st.booleans(), st.booleans(), st.lists(st.integers(0, 3000), max_size=8))
    def check(texts: list[str], tool: bool, pings: bool, cuts: list[int]) -> None:
        data = SERVERS[api](texts, tool, pings)
        frames, chunks = read(wire, data, cuts)
        assert b"".join(chunk.frame or b"?" for chunk in chunks) + frames.tail == data
        assert [chunk.seen for chunk in chunks] == [chunk.seen for chunk in read(wire, data)[1]]
        assert [chunk.serial for chunk in chunks] == list(range(frames.count))

    check()


@pytest.mark.parametrize("api", ENDS)
def test_identity_agents_leave_every_byte_as_it_is(api: str) -> None:
    face, wire, _ = ENDS[api]

    @given(words, st.booleans(), st.booleans(), st.integers(1, 3))
    def check(texts: list[str], tool: bool, pings: bool, agents: int) -> None:
        data = SERVERS[api](texts, tool, pings)

        async def run() -> bytes:
            frames, chunks = read(wire, data)
            scope, closing = Scope(), Closing()
            made = [Identity(Agent.Config()), Scripted(["pass"], closing), Identity(Agent.Config())][:agents]
            chain = [context(agent, scope) for agent in made]
            return (await answer(face, chain, frames, closing.stream(chunks)))[0]

        assert asyncio.run(run()) == data

    check()


@pytest.mark.parametrize("api", ENDS)
def test_whatever_agents_do_the_answer_is_proper_and_all_is_closed(api: str) -> None:
    face, wire, way = ENDS[api]

    @settings(max_examples=150)
    @given(words, st.booleans(), st.booleans(), chains, st.booleans(), st.booleans())
    def check(texts: list[str], tool: bool, pings: bool, scripts: list[list[str]], skip: bool, breaks: bool) -> None:
        closing = Closing()

        async def run() -> tuple[bytes, bool]:
            frames, chunks = read(wire, SERVERS[api](texts, tool, pings))
            failure = UpstreamFailed("gone") if breaks else None
            chain = [context(Scripted(script, closing), Scope(), skip=skip) for script in scripts]
            return await answer(face, chain, frames, closing.stream(chunks, failure))

        written, intact = asyncio.run(run())
        said: Said = way.read_stream(written, intact)
        assert closing.open == 0, "every stream is closed"
        if said.error is None:
            assert said.finish is not None
        if not any("raise" in script for script in scripts) and not breaks:
            assert said.error is None
        if face.dialect is ANTHROPIC and said.error is None:
            assert written.count(b"event: message_stop") == 1

    check()
