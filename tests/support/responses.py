"""Answers in the Responses API as its writer makes them, without ids and times, which differ each time."""

from __future__ import annotations

import re
from typing import Any

import orjson

from llama_smart_proxy.proxy.chat import Fold, Json, Timing
from llama_smart_proxy.proxy.dialects.base import Writer
from llama_smart_proxy.proxy.dialects.framing import EventSplitter, event_data
from llama_smart_proxy.proxy.dialects.responses import CODEC

USAGE = {"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15}
COUNTED = {
    "input_tokens": 12,
    "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
    "output_tokens": 3,
    "output_tokens_details": {"reasoning_tokens": 0},
    "total_tokens": 15,
}
LOOK = {"type": "function", "name": "look", "parameters": {"type": "object"}, "strict": True}
TOOLS = [LOOK, {"type": "custom", "name": "patch"}, {"type": "namespace", "name": "mcp", "tools": [LOOK]}]
_ID = re.compile(rb'"((?:resp|msg|rs|fc|ctc|call)_)[0-9a-f]{24,32}"')
_NOW = re.compile(rb'("(?:created|completed)_at"):\d+')


def writer(**fields: Any) -> Writer:
    return CODEC.writer(CODEC.decode({"model": "asked", "input": "hi", **fields}), Timing(0.0))


def delta(finish: str | None = None, **fields: Any) -> Json:
    return {"id": "chatcmpl-7", "choices": [{"index": 0, "delta": fields, "finish_reason": finish}]}


def call(index: int, arguments: str, **fields: str) -> Json:
    """A piece of a tool call; the first has `id` and `name`, too."""
    identity = {"id": fields["id"], "type": "function"} if fields else {}
    function = {"name": fields["name"]} if fields else {}
    return delta(tool_calls=[{"index": index, **identity, "function": {**function, "arguments": arguments}}])


def written(*chunks: Json, **fields: Any) -> bytes:
    target = writer(**fields)
    return b"".join([*(target.chunk(chunk) for chunk in chunks), target.end()])


def fixed(data: bytes) -> bytes:
    """`data` with ids numbered in their order, and no times."""
    known: dict[bytes, bytes] = {}

    def numbered(found: re.Match[bytes]) -> bytes:
        return known.setdefault(found[0], b'"%b%d"' % (found[1], len(known)))

    return _NOW.sub(rb"\1:0", _ID.sub(numbered, data))


def events(data: bytes) -> list[Json]:
    """The data of all events, each of which is named like its type; they are numbered from 0."""
    splitter = EventSplitter()
    frames = splitter.split(splitter.push(fixed(data)))
    assert splitter.rest == b""
    found = [orjson.loads(event_data(frame) or b"") for frame in frames]
    assert [frame.split(b"\n")[0] for frame in frames] == [f"event: {event['type']}".encode() for event in found]
    assert [event.pop("sequence_number") for event in found] == list(range(len(found)))
    return found


def whole(*chunks: Json, **fields: Any) -> Json:
    folded = Fold()
    for chunk in chunks:
        folded.add(chunk)
    response: Json = orjson.loads(fixed(writer(**fields).reply(folded.completion())))
    return response
