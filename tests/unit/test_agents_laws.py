"""Whatever a chain of agents does to an answer: its client gets a proper one, and everything is closed behind it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llama_smart_proxy.agents.base import Agent, Context
from llama_smart_proxy.agents.loader import AgentSource
from llama_smart_proxy.proxy.chat import ChatRequest, Chunk, ChunkStream, Timing
from llama_smart_proxy.proxy.config import AgentConfig, LimitsConfig
from llama_smart_proxy.proxy.dialects import ANTHROPIC, anthropic, ollama, openai
from llama_smart_proxy.proxy.dialects.base import ClientCodec, UpstreamCodec
from llama_smart_proxy.proxy.errors import ProxyError, UpstreamFailed
from llama_smart_proxy.proxy.middleware.chain import ActiveAgent, Selection
from llama_smart_proxy.proxy.middleware.context import AgentContext, RequestFacts
from llama_smart_proxy.proxy.middleware.layers import response_layer
from llama_smart_proxy.proxy.middleware.loaded import LoadedAgent
from llama_smart_proxy.proxy.middleware.plugins import Plugin
from llama_smart_proxy.proxy.middleware.scope import Scope
from llama_smart_proxy.proxy.stream.decoder import StreamDecoder
from llama_smart_proxy.proxy.stream.encoder import StreamEncoder
from tests.support.agent_clients import Said, Way
from tests.support.laws import law

REQUEST = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}
ENDS: dict[str, tuple[ClientCodec, UpstreamCodec, Way]] = {
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

    def __init__(self, script: list[str], closing: Closing, *, pumps: bool = False) -> None:
        super().__init__(Agent.Config())
        self.script, self.closing, self.pumps = script, closing, pumps

    async def on_response(self, stream: ChunkStream, ctx: Context) -> AsyncIterator[Chunk]:
        self.closing.open += 1
        held: list[Chunk] = []
        try:
            number = 0
            async for chunk in _pumped(stream) if self.pumps else stream:
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


async def _pumped(stream: ChunkStream) -> AsyncIterator[Chunk]:
    """The same, read ahead by a task that nobody ends."""
    queue: asyncio.Queue[Chunk | Exception | None] = asyncio.Queue()

    async def pump() -> None:
        try:
            async for chunk in stream:
                queue.put_nowait(chunk)
        except Exception as exc:
            queue.put_nowait(exc)
        queue.put_nowait(None)

    task = asyncio.get_running_loop().create_task(pump())
    while (got := await queue.get()) is not None:
        if isinstance(got, Exception):
            raise got
        yield got
    await task


def _done(action: str, chunk: Chunk, held: list[Chunk]) -> list[Chunk]:
    match action:
        case "drop":
            return []
        case "hold" if not (chunk.tool_calls or chunk.index):  # the parts of a call belong together
            held.append(chunk)
            return []
        case "flush":
            flushed = [*held, chunk]
            held.clear()
            return flushed
        case "split" if chunk.text:
            half = len(chunk.text) // 2
            first, chunk.text = Chunk.of(chunk.text[:half]), chunk.text[half:]
            return [first, chunk]
        case "inject":
            return [Chunk.of("+"), chunk]
        case "merge" if held and chunk.text and not chunk.finish_reason:
            chunk.text = "".join(piece.text for piece in held) + chunk.text
            held.clear()
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
    plugin = Plugin("scripted", settings, AgentSource("scripted"), True)
    active = ActiveAgent(plugin, LoadedAgent(agent), agent.config, settings, explicit=True)
    calls = cast(Any, SimpleNamespace(limits=LimitsConfig()))
    return AgentContext(active, RequestFacts({}, "", "", "", Selection()), scope, calls)


async def answer(
    face: ClientCodec,
    chain: list[AgentContext],
    frames: StreamDecoder,
    source: AsyncIterator[Chunk],
    *,
    several: bool = False,
) -> tuple[bytes, bool]:
    """What the client gets through this chain, and whether its connection is closed properly."""
    outlet = StreamEncoder(face.writer(ChatRequest(dict(REQUEST), True), Timing(0.0)), face.dialect, several=several)
    written, layers, stream = [], [], source
    for ctx in chain:
        stream = response_layer(ctx, stream, 2 if several else 1)
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


@dataclass(frozen=True)
class Told:
    """What a model answers. `twice`: for `n` = 2, in a server's API that has it."""

    texts: list[str]
    thoughts: list[str]
    tool: bool
    usage: bool
    pings: bool
    twice: bool = False


words = st.lists(st.sampled_from(["a", " b", "c\u2028d", "e\n\nf", '"g"', "ü"]), max_size=6)
answers = st.builds(Told, words, words, st.booleans(), st.booleans(), st.booleans())


def openai_bytes(told: Told) -> bytes:
    def event(index: int, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return {"choices": [{"index": index, "delta": delta, "finish_reason": finish}]}

    call = {"index": 0, "id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": None}]
    deltas += [{"reasoning_content": text} for text in told.thoughts] + [{"content": text} for text in told.texts]
    deltas += [{"tool_calls": [call]}] if told.tool else []
    indexes = (0, 1) if told.twice else (0,)
    events = [event(index, delta) for delta in deltas for index in indexes]
    events += [event(index, {}, "tool_calls" if told.tool else "stop") for index in indexes]
    events += [{"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}}] if told.usage else []
    base = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    lines = [f"data: {json.dumps({**base, **event})}\n\n" for event in events]
    return (":\n\n" if told.pings else "").join([*lines, "data: [DONE]\n\n"]).encode()


def ollama_bytes(told: Told) -> bytes:
    def line(message: dict[str, Any], **more: Any) -> bytes:
        value = {"model": "m", "created_at": "t", "message": {"role": "assistant", **message}, "done": False}
        return json.dumps({**value, **more}).encode() + b"\n"

    lines = [line({"content": "", "thinking": text}) for text in told.thoughts]
    lines += [line({"content": text}) for text in told.texts]
    lines += [line({"content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]})] if told.tool else []
    counted = {"eval_count": len(told.texts)} if told.usage else {}
    lines.append(line({"content": ""}, done=True, done_reason="stop", **counted))
    return (b"\n" if told.pings else b"").join(lines)


def anthropic_bytes(told: Told) -> bytes:
    def event(kind: str, **fields: Any) -> bytes:
        return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()

    blocks: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []
    if told.thoughts:
        deltas = [{"type": "thinking_delta", "thinking": text} for text in told.thoughts]
        blocks.append(({"type": "thinking", "thinking": "", "signature": ""}, deltas))
    if told.texts:
        blocks.append(({"type": "text", "text": ""}, [{"type": "text_delta", "text": text} for text in told.texts]))
    if told.tool:
        block = {"type": "tool_use", "id": "1", "name": "f", "input": {}}
        blocks.append((block, [{"type": "input_json_delta", "partial_json": "{}"}]))
    ping = [event("ping")] if told.pings else []
    message = {"id": "1", "type": "message", "role": "assistant", "model": "m", "content": []}
    events = [event("message_start", message={**message, "usage": {"input_tokens": 1}})]
    for index, (block, deltas) in enumerate(blocks):
        events += [event("content_block_start", index=index, content_block=block), *ping]
        events += [event("content_block_delta", index=index, delta=delta) for delta in deltas]
        events += [event("content_block_stop", index=index), *ping]
    ended = {"stop_reason": "tool_use" if told.tool else "end_turn", "stop_sequence": None}
    counted = {"output_tokens": 1} if told.usage else {}
    return b"".join([*events, event("message_delta", delta=ended, usage=counted), event("message_stop")])


SERVERS: dict[str, Callable[[Told], bytes]] = {
    "openai": openai_bytes,
    "ollama": ollama_bytes,
    "anthropic": anthropic_bytes,
}
actions = st.sampled_from(
    ["pass", "drop", "hold", "flush", "split", "inject", "merge", "think", "change", "sleep", "stop", "raise"]
)
chains = st.lists(st.lists(actions, min_size=1, max_size=5), min_size=1, max_size=3)


def read(wire: UpstreamCodec, data: bytes, cuts: list[int] = []) -> tuple[StreamDecoder, list[Chunk]]:  # noqa: B006
    """The chunks of an answer that arrives in these pieces."""
    frames = StreamDecoder(wire, ChatRequest(dict(REQUEST), True), verbatim=True)
    at = sorted(min(cut, len(data)) for cut in cuts)
    chunks = [chunk for a, b in zip([0, *at], [*at, len(data)], strict=True) for chunk in frames.feed(data[a:b])]
    chunks += frames.finish()
    assert frames.failure is None
    return frames, chunks


@pytest.mark.parametrize("api", ENDS)
def test_chunks_and_tail_are_what_the_server_sent_however_it_arrives(api: str) -> None:
    _, wire, _ = ENDS[api]

    @law(1000)
    @given(answers, st.lists(st.integers(0, 3000), max_size=8))
    def check(told: Told, cuts: list[int]) -> None:
        data = SERVERS[api](told)
        frames, chunks = read(wire, data, cuts)
        assert b"".join(chunk.frame or b"?" for chunk in chunks) + frames.tail == data
        assert [chunk.seen for chunk in chunks] == [chunk.seen for chunk in read(wire, data)[1]]
        assert [chunk.serial for chunk in chunks] == list(range(frames.count))

    check()


@pytest.mark.parametrize("api", ENDS)
def test_identity_agents_leave_every_byte_as_it_is(api: str) -> None:
    face, wire, _ = ENDS[api]

    @law(1000)
    @given(answers, st.integers(1, 3), st.booleans())
    def check(told: Told, agents: int, pumps: bool) -> None:
        data = SERVERS[api](told)

        async def run() -> bytes:
            frames, chunks = read(wire, data)
            scope, closing = Scope(), Closing()
            made = [Identity(Agent.Config()), Scripted(["pass"], closing, pumps=pumps), Identity(Agent.Config())]
            chain = [context(agent, scope) for agent in made[:agents]]
            return (await answer(face, chain, frames, closing.stream(chunks)))[0]

        assert asyncio.run(run()) == data

    check()


@pytest.mark.parametrize("api", ENDS)
def test_whatever_agents_do_the_answer_is_proper_and_all_is_closed(api: str) -> None:
    face, wire, way = ENDS[api]

    @law(1500)
    @given(answers, chains, st.booleans(), st.booleans(), st.booleans())
    def check(told: Told, scripts: list[list[str]], skip: bool, breaks: bool, pumps: bool) -> None:
        closing = Closing()

        async def run() -> tuple[bytes, bool]:
            frames, chunks = read(wire, SERVERS[api](told))
            failure = UpstreamFailed("gone") if breaks else None
            agents = [Scripted(script, closing, pumps=pumps) for script in scripts]
            chain = [context(agent, Scope(), skip=skip) for agent in agents]
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

    lost = [["drop", "drop", "pass"]]
    check = example(Told([], [], True, False, True), lost, False, False, False)(check)  # a ping comes first then
    check()


@law(1500)
@given(
    answers, st.lists(st.lists(actions.filter(lambda action: action != "hold"), min_size=1), max_size=2), st.booleans()
)
def test_each_of_two_answers_has_one_end(told: Told, scripts: list[list[str]], skip: bool) -> None:
    face, wire, way = ENDS["openai"]
    closing = Closing()

    async def run() -> bytes:
        frames, chunks = read(wire, openai_bytes(replace(told, twice=True)))
        chain = [context(Scripted(script, closing), Scope(), skip=skip) for script in scripts]
        return (await answer(face, chain, frames, closing.stream(chunks), several=True))[0]

    events = asyncio.run(run()).split(b"\n\n")
    for index in (0, 1):
        other = f'"index": {1 - index}, "delta"'.encode(), f'"index":{1 - index},"delta"'.encode()
        own = [event for event in events if not any(words in event for words in other)]
        if index == 0 or any(b'"index"' in event for event in own):  # all of the other one may have been dropped
            said = way.read_stream(b"\n\n".join(own), True)
            assert said.finish is not None or said.error is not None
    assert closing.open == 0
