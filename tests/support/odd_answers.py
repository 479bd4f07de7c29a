"""Builds the streams of odd servers, and decodes them."""

from __future__ import annotations

from typing import Any

import orjson

from llama_smart_proxy.proxy.chat import ChatRequest, Chunk, Fold, Json, Timing
from llama_smart_proxy.proxy.dialects import anthropic, ollama, openai
from llama_smart_proxy.proxy.dialects.anthropic.reader import MessageReader
from llama_smart_proxy.proxy.dialects.base import UpstreamCodec
from llama_smart_proxy.proxy.dialects.framing import event_data
from llama_smart_proxy.proxy.stream.decoder import StreamDecoder

CHAT: Json = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
CITY, ROME = '{"city":"Paris"}', '{"city":"Rome"}'
WEATHER, TIME = ("get_weather", CITY), ("get_time", ROME)
DONE = b"data: [DONE]\n\n"


def event(value: Any) -> bytes:
    return b"data: " + (value if isinstance(value, bytes) else orjson.dumps(value)) + b"\n\n"


def delta(finish: Any = None, /, **fields: Any) -> bytes:
    return event({"choices": [{"index": 0, "delta": fields, "finish_reason": finish}]})


def part(name: Any = None, arguments: Any = None, /, **fields: Any) -> bytes:
    """One part of a tool call; a field of `...` is left out."""
    function = {"name": name, "arguments": arguments}
    return delta(tool_calls=[{**fields, "function": {key: value for key, value in function.items() if value != ...}}])


def both(*parts: bytes, finish: str = "tool_calls") -> bytes:
    return delta(role="assistant", content=None) + b"".join(parts) + delta(finish) + DONE


def decoded(data: bytes, codec: UpstreamCodec = openai.WIRE, **fields: Any) -> tuple[StreamDecoder, list[Chunk]]:
    decoder = StreamDecoder(codec, ChatRequest({**CHAT, **fields}, True), verbatim=codec is openai.OWN_WIRE)
    return decoder, decoder.feed(data) + decoder.finish()


def folded(data: bytes, codec: UpstreamCodec = openai.WIRE, **fields: Any) -> Json:
    decoder, chunks = decoded(data, codec, **fields)
    assert decoder.failure is None, decoder.failure
    fold = Fold()
    for chunk in chunks:
        fold.add(chunk.seen)
    return fold.completion()


def calls_of(completion: Json) -> list[tuple[str, str]]:
    calls = completion["choices"][0]["message"].get("tool_calls") or []
    assert all(call["id"] for call in calls) and len({call["id"] for call in calls}) == len(calls)
    return [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


def ollama_calls(data: bytes) -> list[tuple[str, Any]]:
    """The calls of the lines that an Ollama client gets."""
    writer = ollama.CHAT.writer(ChatRequest(dict(CHAT), True), Timing(0.0))
    lines = b"".join(writer.chunk(chunk.seen) for chunk in decoded(data)[1]) + writer.end()
    messages = [orjson.loads(line).get("message") or {} for line in lines.splitlines()]
    found = [call["function"] for message in messages for call in message.get("tool_calls") or ()]
    return [(call["name"], call["arguments"]) for call in found]


def anthropic_calls(data: bytes) -> list[tuple[str, Any]]:
    """The calls that an Anthropic client gets, whose blocks may not overlap."""
    writer = anthropic.MESSAGES.writer(ChatRequest(dict(CHAT), True), Timing(0.0))
    events = b"".join(writer.chunk(chunk.seen) for chunk in decoded(data)[1]) + writer.end()
    reader, fold, block = MessageReader(), Fold(), -1
    for frame in events.split(b"\n\n"):
        if (found := event_data(frame)) is not None:
            kind = orjson.loads(found)
            if kind["type"] == "content_block_start":
                block = kind["index"]
            assert not kind["type"].startswith("content_block") or kind["index"] == block
        if (chunk := reader.read(frame)) is not None:
            fold.add(chunk)
    return calls_of(fold.completion())
