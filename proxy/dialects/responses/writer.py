"""Encodes answers for clients of the Responses API: the events of a response, or the whole response.

Source: the OpenAI API reference, streaming events of the Responses API, and openai-python 3.57.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from typing import Any

import orjson

from llama_smart_proxy.proxy.chat import ChatRequest, Json, Timing, own_fields
from llama_smart_proxy.proxy.dialects.responses.dialect import error_fields
from llama_smart_proxy.proxy.dialects.responses.output import (
    REASONING,
    REFUSAL,
    SUMMARY,
    TEXT,
    CallItem,
    Events,
    Form,
    TextItem,
    new_id,
)
from llama_smart_proxy.proxy.dialects.responses.request import fields_of, wants_summary
from llama_smart_proxy.proxy.dialects.responses.tools import Origin, offered
from llama_smart_proxy.proxy.errors import ProxyError

_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}
"""By OpenAI's finish reason."""
_REPEATED: Json = {
    "background": False,
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "prompt_cache_key": None,
    "safety_identifier": None,
    "service_tier": "default",
    "temperature": None,
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": None,
    "truncation": "disabled",
    "user": None,
}
"""Fields of the request that the response repeats, and their defaults; samplers have none, as servers differ."""


class ResponseWriter:
    """Encodes the events of one response, or the whole response.

    A text ends when something else begins. A tool call ends when something else begins and its arguments are whole,
    else with the answer: some servers interleave the pieces of parallel calls.
    """

    content_type = "text/event-stream"

    def __init__(self, request: ChatRequest, timing: Timing) -> None:
        fields = fields_of(request)
        self._events = Events()
        self._response = _begun_response(request.model, fields)
        self._origins = offered(fields.get("tools")).origins
        self._thoughts = SUMMARY if wants_summary(fields) else REASONING
        self._alternatives = self._response["top_logprobs"]
        self._items: list[TextItem | CallItem] = []
        self._text: TextItem | None = None  # the current item, if it is of text
        self._calls: dict[int, CallItem] = {}
        self._finish = "stop"
        self._begun = False

    def chunk(self, chunk: Json) -> bytes:
        written = b"" if self._begun else self._begin()
        if usage := chunk.get("usage"):
            self._response["usage"] = _usage(usage)
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
            if text := delta.get("reasoning_content"):
                written += self._said(self._thoughts, text)
            if text := delta.get("content"):
                written += self._said(TEXT, text, choice.get("logprobs"))
            if text := delta.get("refusal"):
                written += self._said(REFUSAL, text)
            for call in delta.get("tool_calls") or ():
                written += self._called(call)
            if finish := choice.get("finish_reason"):
                self._finish = finish
                self._response |= own_fields(chunk)
                written += self._annotated(delta.get("annotations"))
        return written

    def adopt(self, chunk: Json) -> None:
        """Does nothing: no frame is ever sent unchanged."""

    def end(self) -> bytes:
        reason = _INCOMPLETE.get(self._finish)
        status = "incomplete" if reason else "completed"
        written = b"" if self._begun else self._begin()
        if not self._items and reason is None:  # clients expect a message, if an empty one
            written += self._said(TEXT, "")
        written += self._end_text(status) + b"".join(call.end(status) for call in self._calls.values())
        ended = {"incomplete_details": {"reason": reason}} if reason else {"completed_at": int(time.time())}
        return written + self._end(status, ended)

    def error(self, exc: ProxyError) -> bytes:
        written = b"" if self._begun else self._begin()
        written += self._events.write("error", **error_fields(exc))
        for item in self._items:
            if item.item["status"] == "in_progress":
                item.current()["status"] = "incomplete"
        return written + self._end("failed", {"error": {"code": "server_error", "message": exc.message}})

    def reply(self, completion: Json) -> bytes:
        choice = completion["choices"][0]
        self.chunk({**completion, "choices": [{**choice, "delta": choice["message"]}]})
        self.end()
        return orjson.dumps(self._response)

    def _begin(self) -> bytes:
        self._begun = True
        written = self._events.write("response.created", response=self._response)
        return written + self._events.write("response.in_progress", response=self._response)

    def _end(self, status: str, fields: Json) -> bytes:
        self._response |= {"status": status, **fields, "output": [item.item for item in self._items]}
        return self._events.write(f"response.{status}", response=self._response)

    def _said(self, form: Form, text: str, logprobs: Any = None) -> bytes:
        thoughts, written = form is self._thoughts, b""
        item = self._text
        if item is None or (item.item["type"] == "reasoning") is not thoughts:
            written = self._end_text() + self._end_whole_calls()
            item = self._text = TextItem(self._events, len(self._items), thoughts=thoughts)
            self._items.append(item)
            written += item.begin()
        return written + item.add(form, text, _logprobs(logprobs, self._alternatives) if logprobs else None)

    def _annotated(self, annotations: Any) -> bytes:
        """The events for the annotations of the text, which are flat in this API."""
        if self._text is None or not isinstance(annotations, list):
            return b""
        found = (one for one in annotations if isinstance(one, dict))
        kinds = [(kind, one.get(kind)) for one in found if isinstance(kind := one.get("type"), str)]
        return self._text.annotate([{"type": kind, **fields} for kind, fields in kinds if isinstance(fields, dict)])

    def _called(self, call: Json) -> bytes:
        number, function = call.get("index", len(self._calls)), call.get("function") or {}
        written, item = b"", self._calls.get(number)
        if item is None:
            name = function.get("name") or ""
            known = call.get("id") or f"call_{secrets.token_hex(12)}"
            written = self._end_text() + self._end_whole_calls()
            item = CallItem(self._events, len(self._items), known, self._origins.get(name, Origin(name)))
            self._calls[number] = item
            self._items.append(item)
            written += item.begin()
        arguments = function.get("arguments")
        return written + (item.add(arguments) if arguments else b"")

    def _end_text(self, status: str = "completed") -> bytes:
        item, self._text = self._text, None
        return item.end(status) if item is not None else b""

    def _end_whole_calls(self) -> bytes:
        return b"".join(call.end() for call in self._calls.values() if call.is_whole())


def _begun_response(model: str, fields: Mapping[str, Any]) -> Json:
    now = int(time.time())
    given = {name: fields[name] for name in _REPEATED if fields.get(name) is not None}
    reasoning = fields.get("reasoning") or {}
    return {
        "id": new_id("resp"),
        "object": "response",
        "created_at": now,
        "status": "in_progress",
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "model": model,
        "output": [],
        "previous_response_id": None,
        "store": False,
        "usage": None,
        **_REPEATED,
        **given,
        "reasoning": {"effort": None, "summary": None, **reasoning},
        "text": {"format": {"type": "text"}, **(fields.get("text") or {})},
        "tools": [_shown(tool) for tool in given.get("tools") or ()],
    }


def _shown(tool: Json) -> Json:
    """A tool as the response shows it: clients expect all fields of a function."""
    defaults = {"description": None, "parameters": None, "strict": False} if tool["type"] == "function" else {}
    return {**defaults, **tool}


def _usage(usage: Json) -> Json:
    prompt, completion = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    reasoning = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": completion,
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": prompt + completion,
    }


def _logprobs(logprobs: Any, alternatives: int) -> list[Json]:
    """The logprobs of a chunk, with as many alternatives as the client requested: more may have been."""
    entries = (logprobs.get("content") if isinstance(logprobs, dict) else None) or ()
    return [{**_logprob(entry), "top_logprobs": _top(entry.get("top_logprobs"), alternatives)} for entry in entries]


def _top(entries: Any, count: int) -> list[Json]:
    return [_logprob(entry) for entry in (entries or ())[:count]]


def _logprob(entry: Json) -> Json:
    return {"token": entry["token"], "logprob": entry["logprob"], "bytes": entry.get("bytes") or []}
