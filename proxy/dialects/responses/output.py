"""The items of an answer: each reports itself by its events, and is then part of the whole response.

Source: the OpenAI API reference, streaming events of the Responses API, and openai-python 3.57.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any

import orjson

from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.dialects.responses.tools import Origin, custom_input
from llama_smart_proxy.proxy.errors import UpstreamFailed


class Events:
    """Encodes the events of one stream, numbered from 0. `number` is that of the next one."""

    def __init__(self) -> None:
        self.number = 0

    def write(self, kind: str, **fields: Any) -> bytes:
        """The event of type `kind`."""
        event = {"type": kind, "sequence_number": self.number, **fields}
        self.number += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), orjson.dumps(event))


@dataclass(frozen=True, slots=True)
class Form:
    """How one kind of text is reported: `events` are the first words of its events' types, `part` is an empty part with
    the text under `key`, and `parts` the events about parts. They are in the item's field `place`, numbered by
    `index`."""

    events: str
    part: Json
    key: str = "text"
    parts: str = "response.content_part"
    place: str = "content"
    index: str = "content_index"


TEXT = Form("response.output_text", {"type": "output_text", "annotations": [], "logprobs": [], "text": ""})
REFUSAL = Form("response.refusal", {"type": "refusal", "refusal": ""}, key="refusal")
REASONING = Form("response.reasoning_text", {"type": "reasoning_text", "text": ""})
SUMMARY = Form(
    "response.reasoning_summary_text",
    {"type": "summary_text", "text": ""},
    parts="response.reasoning_summary_part",
    place="summary",
    index="summary_index",
)


def new_id(prefix: str) -> str:
    """A new id, as OpenAI's: `prefix` names the kind of object."""
    return f"{prefix}_{secrets.token_hex(16)}"


class TextItem:
    """A message or a reasoning item: parts of text, one after the other."""

    def __init__(self, events: Events, index: int, *, thoughts: bool = False) -> None:
        self._events = events
        self._place: Json = {"output_index": index}
        common = {"status": "in_progress", "content": []}
        if thoughts:
            self.item: Json = {"id": new_id("rs"), "type": "reasoning", "summary": [], **common}
        else:
            self.item = {"id": new_id("msg"), "type": "message", "role": "assistant", **common}
        self._form: Form | None = None
        self._pieces: list[str] = []
        self._logprobs: list[Json] = []
        self._annotations: list[Json] = []
        self._head = b""  # of the next delta, up to its number

    def begin(self) -> bytes:
        """The event that announces the item."""
        return self._events.write("response.output_item.added", **self._place, item=self.item)

    def add(self, form: Form, text: str, logprobs: list[Json] | None = None) -> bytes:
        """The events for a piece of text, which begins a part if the one before has another form. Runs for each token,
        so the constant part of the event is cached."""
        written = b"" if form is self._form else self._turn(form)
        self._pieces.append(text)
        if logprobs:
            self._logprobs += logprobs
            return written + self._events.write(f"{form.events}.delta", **self._where, delta=text, logprobs=logprobs)
        number = self._events.number
        self._events.number = number + 1
        return b'%b%b%d,"delta":%b}\n\n' % (written, self._head, number, orjson.dumps(text))

    def annotate(self, annotations: list[Json]) -> bytes:
        """The events for annotations of the current part; none if that is no text of the answer."""
        if self._form is not TEXT:
            return b""
        written, kind = b"", f"{TEXT.events}.annotation.added"
        for annotation in annotations:
            number = len(self._annotations)
            written += self._events.write(kind, **self._where, annotation_index=number, annotation=annotation)
            self._annotations.append(annotation)
        return written

    def end(self, status: str = "completed") -> bytes:
        """The events that end the item."""
        written = self._end_part()
        self.item["status"] = status
        return written + self._events.write("response.output_item.done", **self._place, item=self.item)

    def current(self) -> Json:
        """The item with all of its text so far."""
        if self._form is not None:
            self.item[self._form.place][-1] = self._part(self._form)
        return self.item

    @property
    def _where(self) -> Json:
        form = self._form
        assert form is not None
        where = {"item_id": self.item["id"], **self._place, form.index: len(self.item[form.place]) - 1}
        return where

    def _turn(self, form: Form) -> bytes:
        written = self._end_part()
        self._form, self._pieces, self._logprobs, self._annotations = form, [], [], []
        self.item[form.place].append(form.part)
        written += self._events.write(f"{form.parts}.added", **self._where, part=form.part)
        kind = f"{form.events}.delta"
        fields = {"type": kind, **self._where} | ({"logprobs": []} if "logprobs" in form.part else {})
        self._head = b'event: %b\ndata: %b,"sequence_number":' % (kind.encode(), orjson.dumps(fields)[:-1])
        return written

    def _part(self, form: Form) -> Json:
        own = {"logprobs": self._logprobs, "annotations": self._annotations}
        given = {name: value for name, value in own.items() if name in form.part}
        return {**form.part, **given, form.key: "".join(self._pieces)}

    def _end_part(self) -> bytes:
        if (form := self._form) is None:
            return b""
        part, where = self._part(form), self._where
        self.item[form.place][-1] = part
        said = {key: part[key] for key in (form.key, "logprobs") if key in part}
        self._form = None
        written = self._events.write(f"{form.events}.done", **where, **said)
        return written + self._events.write(f"{form.parts}.done", **where, part=part)


@dataclass(slots=True)
class CallItem:
    """A call of a function or of a custom tool. The input of the latter is reported in one piece, as the model writes
    it as a JSON string."""

    events: Events
    index: int
    call_id: str
    origin: Origin
    item: Json = field(init=False)
    _pieces: list[str] = field(default_factory=list)
    _ended: bool = False

    def __post_init__(self) -> None:
        origin = self.origin
        kind, prefix = ("custom_tool_call", "ctc") if origin.custom else ("function_call", "fc")
        self.item = {"id": new_id(prefix), "type": kind, "status": "in_progress", "call_id": self.call_id}
        self.item |= {"name": origin.name, "input" if origin.custom else "arguments": ""}
        self.item |= {"namespace": origin.namespace} if origin.namespace else {}

    def begin(self) -> bytes:
        """The event that announces the item."""
        return self.events.write("response.output_item.added", output_index=self.index, item=self.item)

    def add(self, arguments: str) -> bytes:
        """The events for a piece of the arguments. Raises: UpstreamFailed if the call has ended."""
        if self._ended:
            if arguments.isspace():
                return b""
            raise UpstreamFailed("the model server continued a tool call that was complete", code="upstream_error")
        self._pieces.append(arguments)
        if self.origin.custom:
            return b""
        return self.events.write("response.function_call_arguments.delta", **self._where, delta=arguments)

    def is_whole(self) -> bool:
        """Whether the arguments are a JSON object, so that nothing can follow."""
        if self._ended:
            return True
        try:
            return isinstance(orjson.loads("".join(self._pieces)), dict)
        except orjson.JSONDecodeError:
            return False

    def end(self, status: str = "completed") -> bytes:
        """The events that end the item; none if it has ended."""
        if self._ended:
            return b""
        self._ended = True
        item = self.current()
        item["status"] = status
        if self.origin.custom:
            kind = "response.custom_tool_call_input"
            written = self.events.write(f"{kind}.delta", **self._where, delta=item["input"])
            written += self.events.write(f"{kind}.done", **self._where, input=item["input"])
        else:
            fields = {"name": item["name"], "arguments": item["arguments"]}
            written = self.events.write("response.function_call_arguments.done", **self._where, **fields)
        return written + self.events.write("response.output_item.done", output_index=self.index, item=item)

    def current(self) -> Json:
        """The item with all of its arguments so far."""
        arguments = "".join(self._pieces)
        self.item |= {"input": custom_input(arguments)} if self.origin.custom else {"arguments": arguments}
        return self.item

    @property
    def _where(self) -> Json:
        return {"item_id": self.item["id"], "output_index": self.index}
