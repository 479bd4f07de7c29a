"""Encodes answers for Ollama clients: newline-delimited JSON, or one object.

A line always has `message.content` or `response`; other empty fields are left out; no line is blank, and only the last
one may be without content. Source: Ollama's api/types.go and server/routes.go.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import orjson

from llama_smart_proxy.proxy.chat import ChatRequest, Json, Timing, extensions_of, own_fields
from llama_smart_proxy.proxy.dialects.ollama.dialect import error_line
from llama_smart_proxy.proxy.dialects.ollama.fields import NAME, restore_spelling
from llama_smart_proxy.proxy.dialects.ollama.messages import arguments_object
from llama_smart_proxy.proxy.dialects.ollama.options import encode_logprobs
from llama_smart_proxy.proxy.errors import ProxyError, UpstreamFailed, error_text

LONGEST_TEXT = 1_000_000
"""Most characters in one line: each takes up to 6 bytes, and Ollama's Go client rejects lines over 8 MB."""

_NS = 1e9
_LINE_ENDS = [(char.encode(), f"\\u{ord(char):04x}".encode()) for char in "\x85\u2028\u2029"]


class OllamaWriter:
    """Encodes the answer to one request, in the form of `/api/chat` (`chat`) or of `/api/generate`.

    `timing.extra` are further fields of the last line or of the object (the `context` of a generated text). `clock` is
    the clock of `timing`.

    Raises: UpstreamFailed, from any method, for a tool call whose arguments are not a JSON object. The last call of an
    answer that reached its token limit may be incomplete; it is left out.
    """

    content_type = "application/x-ndjson"

    def __init__(
        self,
        request: ChatRequest,
        timing: Timing,
        *,
        chat: bool,
        clock: Callable[[], float] = time.monotonic,
        wall_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._model = request.asked or request.model
        self._timing = timing
        self._chat = chat
        self._clock = clock
        self._timestamps = Timestamps(wall_ns)
        requested = restore_spelling(encode_logprobs(request.body), request.body)
        # `id` is llama-server's; alternatives may be in the answer without a request for them (`decode_logprobs`)
        self._hidden = {"id"} if requested.get("top_logprobs") else {"id", "top_logprobs"}
        self._calls: dict[int, Json] = {}
        self._with_calls: Json = {}  # extensions received with them
        self._held: Json = {}  # extensions for the last line
        self._logprobs: list[Json] = []
        self._last: Json = {}  # the latest usage, timings, finish_reason

    def chunk(self, chunk: Json) -> bytes:
        """The lines for this chunk; tool calls are delayed until they are complete."""
        for name in ("usage", "timings"):
            if chunk.get(name):
                self._last[name] = chunk[name]
        choices = chunk.get("choices")
        if not choices or choices[0].get("index"):
            return b""
        choice = choices[0]
        delta = choice.get("delta") or {}
        content, thinking = delta.get("content") or delta.get("refusal"), delta.get("reasoning_content")
        calls = delta.get("tool_calls")
        fields = dict(extensions_of(chunk, NAME))
        of_calls: Json = {name: fields.pop(name) for name in ("message", "tool_calls") if calls and name in fields}
        if choice.get("finish_reason"):
            self._last["finish_reason"] = choice["finish_reason"]
            self._held |= own_fields(chunk)
        if choice.get("finish_reason") or not (content or thinking):
            self._held |= fields
            fields = {}
        if isinstance(logprobs := choice.get("logprobs"), dict):
            self._logprobs += logprobs.get("content") or ()
        lines = b""
        if content or thinking:
            complete = all(arguments_object(call["arguments"] or None) is not None for call in self._calls.values())
            lines = self._flush_calls() if complete else b""
            lines += self._say(content or "", thinking or "", fields)
        return lines + self._add_calls(calls, of_calls) if calls else lines

    def adopt(self, chunk: Json) -> None:
        """Does nothing: no line depends on an earlier one."""

    def end(self) -> bytes:
        """The line with `done`, after the remaining tool calls."""
        cut = self._last.get("finish_reason") == "length"
        return self._flush_calls(cut=cut) + _dump(self._closed(self._object("", {})))

    def error(self, exc: ProxyError) -> bytes:
        """The error line, which a chat UI can show as a part of the answer; nothing may follow it."""
        return error_line(exc, **self._object(error_text(exc), {}))

    def reply(self, completion: Json) -> bytes:
        """The object of an answer that is not streamed."""
        choice = completion["choices"][0]
        message = choice["message"]
        self._last = {name: completion[name] for name in ("usage", "timings") if completion.get(name)}
        self._last["finish_reason"] = choice.get("finish_reason")
        self._held = {**extensions_of(completion, NAME), **own_fields(completion)}
        self._logprobs = list((choice.get("logprobs") or {}).get("content") or ())
        fields: Json = {"thinking": message["reasoning_content"]} if message.get("reasoning_content") else {}
        if message.get("tool_calls"):
            self._add_calls([{**call, "index": index} for index, call in enumerate(message["tool_calls"])], {})
        if calls := _written_calls(self._calls, cut=choice.get("finish_reason") == "length"):
            fields["tool_calls"] = calls
        return orjson.dumps(self._closed(self._object(message.get("content") or message.get("refusal") or "", fields)))

    def _say(self, content: str, thinking: str, besides: Json) -> bytes:
        if len(content) + len(thinking) <= LONGEST_TEXT:
            return self._say_piece(content, thinking, besides)
        pieces = [self._say_piece("", piece, {}) for piece in _pieces(thinking)]
        return b"".join(pieces + [self._say_piece(piece, "", {}) for piece in _pieces(content)])

    def _say_piece(self, content: str, thinking: str, besides: Json) -> bytes:
        line = self._object(content, {"thinking": thinking} if thinking else {})
        if besides:
            line = _merged(line, besides)
        if self._logprobs:
            line["logprobs"] = self._take_logprobs()
        return _dump(line)

    def _object(self, content: str, fields: Json) -> Json:
        line = {"model": self._model, "created_at": self._timestamps.now()}
        if self._chat:
            return line | {"message": {"role": "assistant", "content": content, **fields}, "done": False}
        return line | {"response": content, **fields, "done": False}

    def _add_calls(self, deltas: list[Json], besides: Json) -> bytes:
        """Merge parts of tool calls. A new call means that those before are complete, so they are returned."""
        new = deltas[0].get("index", 0) not in self._calls
        lines = self._flush_calls() if new else b""
        self._with_calls |= besides
        for delta in deltas:
            call = self._calls.setdefault(delta.get("index", 0), {"id": "", "name": "", "arguments": ""})
            function = delta.get("function") or {}
            call["id"] = delta.get("id") or call["id"]
            call["name"] += function.get("name") or ""
            call["arguments"] += function.get("arguments") or ""
        return lines

    def _flush_calls(self, *, cut: bool = False) -> bytes:
        if not self._calls:
            return b""
        calls, besides = _written_calls(self._calls, cut=cut), self._with_calls
        self._calls, self._with_calls = {}, {}
        return _dump(_merged(self._object("", {"tool_calls": calls}), besides)) if calls else b""

    def _take_logprobs(self) -> list[Json]:
        """Those not sent yet, without llama-server's token ids, and without alternatives that were not requested."""
        taken, self._logprobs = self._logprobs, []
        items = [{key: value for key, value in item.items() if key not in self._hidden} for item in taken]
        for item in items:
            if item.get("top_logprobs"):
                item["top_logprobs"] = [{k: v for k, v in top.items() if k != "id"} for top in item["top_logprobs"]]
        return items

    def _closed(self, line: Json) -> Json:
        """`line` with the fields of the last line."""
        besides = {name: value for name, value in self._held.items() if name not in ("total_duration", "load_duration")}
        reason = "length" if self._last.get("finish_reason") == "length" else "stop"
        line |= {"done": True, "done_reason": besides.get("done_reason", reason), **self._metrics()}
        if self._logprobs:
            line["logprobs"] = self._take_logprobs()
        return {**_merged(line, besides), **self._timing.extra}

    def _metrics(self) -> Json:
        """Counts, and times in nanoseconds; those that are 0 or not known are left out. `load_duration` includes the
        wait in the queue and the time that an Ollama server took to load the model."""
        now = self._clock()
        arrived, sent = self._timing.arrived_s, self._timing.sent_s or self._timing.arrived_s
        usage, timings = _numbers(self._last.get("usage")), _numbers(self._last.get("timings"))
        prompt = (
            timings["prompt_n"] + timings.get("cache_n", 0) if "prompt_n" in timings else usage.get("prompt_tokens")
        )
        metrics = {
            "total_duration": (now - arrived) * _NS,
            "load_duration": (sent - arrived) * _NS + _numbers(self._held).get("load_duration", 0),
            "prompt_eval_count": prompt,
            "prompt_eval_duration": timings.get("prompt_ms", 0) * 1e6,
            "eval_count": timings.get("predicted_n", usage.get("completion_tokens")),
            "eval_duration": timings.get("predicted_ms", 0) * 1e6,
        }
        return {name: round(value) for name, value in metrics.items() if value and value > 0}


def _numbers(counts: object) -> dict[str, float]:
    """The finite numbers in what a server or an agent has sent as its counts."""
    found = counts.items() if isinstance(counts, dict) else ()
    return {name: value for name, value in found if value.__class__ in (int, float) and abs(value) < 1e18}


class Timestamps:
    """Formats the current time as Ollama does: RFC 3339, UTC, with nanoseconds. Caches the text of the second, as every
    line has a timestamp."""

    __slots__ = ("_second", "_text", "_wall_ns")

    def __init__(self, wall_ns: Callable[[], int] = time.time_ns) -> None:
        self._wall_ns = wall_ns
        self._second = -1
        self._text = ""

    def now(self) -> str:
        second, nanosecond = divmod(self._wall_ns(), 10**9)
        if second != self._second:
            self._second, self._text = second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return f"{self._text}.{nanosecond:09d}Z"


def _written_calls(calls: Mapping[int, Json], *, cut: bool) -> list[Json]:
    """Complete calls in Ollama's shape; `cut`: the last one may be incomplete and is then left out.

    Raises: UpstreamFailed for arguments that are not a JSON object.
    """
    written = []
    for index in sorted(calls):
        name, arguments = calls[index]["name"], arguments_object(calls[index]["arguments"])
        if arguments is None:
            if cut and index == max(calls):
                break
            raise UpstreamFailed(f"the model gave invalid arguments for the tool {name!r}", code="invalid_tool_call")
        identity: Json = {"id": calls[index]["id"]} if calls[index]["id"] else {}
        written.append(identity | {"function": {"index": index, "name": name, "arguments": arguments}})
    return written


def _merged(line: Any, besides: Any) -> Any:
    """`line`, with the fields that only `besides` has added at every level."""
    if isinstance(line, dict) and isinstance(besides, dict):
        return besides | {key: _merged(value, besides.get(key)) for key, value in line.items()}
    if isinstance(line, list) and isinstance(besides, list):
        return [_merged(*pair) for pair in zip(line, besides, strict=False)] + line[len(besides) :]
    return line


def _pieces(text: str) -> list[str]:
    return [text[start : start + LONGEST_TEXT] for start in range(0, len(text), LONGEST_TEXT)]


def _dump(line: Json) -> bytes:
    """`line` as JSON, with the characters escaped that some clients (such as ollama-python) treat as line ends; Go
    escapes the last two of them, too."""
    data = orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)
    for separator, escaped in _LINE_ENDS:
        if separator in data:
            data = data.replace(separator, escaped)
    return data
