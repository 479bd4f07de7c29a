"""Laws of answers to clients of the Responses API: the same however their bytes are cut, and events that build them."""

from __future__ import annotations

from typing import Any

import orjson
from hypothesis import given
from hypothesis import strategies as st

from llama_smart_proxy.proxy.chat import Json, Timing
from llama_smart_proxy.proxy.dialects.framing import EventSplitter
from llama_smart_proxy.proxy.dialects.openai import WIRE
from llama_smart_proxy.proxy.dialects.responses import CODEC
from tests.support.laws import TEXT, law, splits
from tests.support.responses import COUNTED, TOOLS, USAGE, call, delta, events, fixed, whole, written

PIECE = TEXT.filter(bool)
OBJECT = st.dictionaries(TEXT, TEXT, max_size=2).map(lambda value: orjson.dumps(value).decode())
SAID = st.tuples(st.sampled_from(["content", "reasoning_content", "refusal"]), PIECE)


@st.composite
def calls(draw: st.DrawFn) -> list[list[Json]]:
    """The pieces of each of several tool calls, cut anywhere; the arguments may be cut short."""
    made = []
    for index, arguments in enumerate(draw(st.lists(OBJECT | OBJECT.map(lambda text: text[:-1]), max_size=3))):
        pieces = [piece.decode(errors="ignore") for piece in draw(splits(arguments.encode()))]
        made.append([call(index, "", id=f"t{index}", name=draw(st.sampled_from(["look", "patch", "mcp__look"])))])
        made[-1] += [call(index, piece) for piece in pieces]
    return made


@st.composite
def answers(draw: st.DrawFn) -> list[Json]:
    """Chunks as servers send them: texts of all kinds, tool calls whose pieces may be interleaved, then the end."""
    chunks = [delta(role="assistant", content=None)]
    chunks += [delta(**{kind: text}) for kind, text in draw(st.lists(SAID, max_size=6))]
    pending = [pieces for pieces in draw(calls()) if pieces]
    interleaved = draw(st.booleans())
    while pending:
        taken = draw(st.integers(0, len(pending) - 1)) if interleaved else 0
        chunks.append(pending[taken].pop(0))
        pending = [pieces for pieces in pending if pieces]
    finish = draw(st.sampled_from(["stop", "tool_calls", "length", "content_filter", None]))
    return [*chunks, delta(finish), {"choices": [], "usage": USAGE}]


def translated(pieces: list[bytes]) -> bytes:
    """The bytes for the client, of the bytes of an OpenAI-style server."""
    request = CODEC.decode({"model": "asked", "input": "hi", "tools": TOOLS})
    splitter, source, target = EventSplitter(), WIRE.reader(request), CODEC.writer(request, Timing(0.0))
    out = b""
    for piece in pieces:
        for frame in splitter.split(splitter.push(piece)):
            chunk = source.read(frame)
            out += b"" if chunk is None else target.chunk(chunk)
    assert source.done and splitter.rest == b""
    return fixed(out + target.end())


@given(st.data(), answers())
@law(400)
def test_any_split_of_the_servers_bytes_gives_the_same_events(data: st.DataObject, chunks: list[Json]) -> None:
    stream = b"".join(b"data: %b\n\n" % orjson.dumps(chunk) for chunk in chunks) + b"data: [DONE]\n\n"
    assert translated(data.draw(splits(stream))) == translated([stream]) == fixed(written(*chunks, tools=TOOLS))


@given(answers(), st.booleans())
@law(500)
def test_events_build_the_response_that_ends_them(chunks: list[Json], summary: bool) -> None:
    fields: Json = {"tools": TOOLS} | ({"reasoning": {"summary": "auto"}} if summary else {})
    created, begun, *steps, last = events(written(*chunks, **fields))
    assert (created["type"], begun["type"]) == ("response.created", "response.in_progress")
    assert created["response"] == begun["response"] and created["response"]["output"] == []
    built = Built()
    for step in steps:
        built.take(step)
    assert built.open == set() and [item["status"] for item in built.items].count("in_progress") == 0
    assert last["response"]["output"] == built.items
    assert last["type"] == f"response.{last['response']['status']}"
    assert last["response"]["usage"] == COUNTED


class Built:
    """A client that builds the items from their events alone, and is strict about their order."""

    def __init__(self) -> None:
        self.items: list[Json] = []
        self.open: set[int] = set()
        self._said: dict[tuple[Any, ...], str] = {}
        self._part: Json | None = None

    def take(self, event: Json) -> None:
        kind, index = event["type"], event["output_index"]
        if kind == "response.output_item.added":
            assert index == len(self.items) and event["item"]["status"] == "in_progress"
            self.items.append(event["item"])
            self.open.add(index)
            return
        assert index in self.open
        if kind == "response.output_item.done":
            assert self.items[index] | {"status": ""} == event["item"] | {"status": ""} and self._part is None
            self.items[index]["status"] = event["item"]["status"]
            self.open.remove(index)
            return
        assert event["item_id"] == self.items[index]["id"]
        if "part" in event:
            self._take_part(event)
        else:
            self._take_text(event)

    def _take_part(self, event: Json) -> None:
        place = "summary" if "summary_index" in event else "content"
        at, parts = event[f"{place}_index"], self.items[event["output_index"]][place]
        if event["type"].endswith(".added"):
            assert self._part is None and at == len(parts)
            parts.append(event["part"])
            self._part = event["part"]
        else:
            assert parts[at] == event["part"]
            self._part = None

    def _take_text(self, event: Json) -> None:
        index = event["output_index"]
        part = event.get("content_index", event.get("summary_index", 0))
        place = (index, event["type"].rpartition(".")[0], part)
        if event["type"].endswith(".delta"):
            self._said[place] = self._said.get(place, "") + event["delta"]
            return
        [key] = event.keys() & {"text", "refusal", "arguments", "input"}
        assert event[key] == self._said.get(place, "")
        (self._part if self._part is not None and key in self._part else self.items[index])[key] = event[key]


@given(answers())
@law(400)
def test_whole_response_says_what_the_stream_says(chunks: list[Json]) -> None:
    streamed, given_whole = events(written(*chunks, tools=TOOLS))[-1]["response"], whole(*chunks, tools=TOOLS)
    assert said(streamed["output"]) == said(given_whole["output"])
    others = {key for key in streamed if key != "output"}
    assert {key: streamed[key] for key in others} == {key: given_whole[key] for key in others}


def said(items: list[Json]) -> dict[str, Any]:
    """All texts by their kind, and all calls by their ids."""
    texts: dict[str, str] = {}
    for item in items:
        for part in item.get("content", []):
            key = "refusal" if "refusal" in part else "text"
            texts[part["type"]] = texts.get(part["type"], "") + part[key]
    called = {item["call_id"]: {**item, "id": "", "status": ""} for item in items if "call_id" in item}
    return {"texts": {kind: text for kind, text in texts.items() if text}, "calls": called}
