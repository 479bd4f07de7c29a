"""Converts the lines of an Ollama server's answer to chunks. Source: Ollama's api/types.go."""

from __future__ import annotations

import hashlib
from typing import Any

import orjson

from llama_smart_proxy.proxy.chat import ChatRequest, Json, attach
from llama_smart_proxy.proxy.chat.fold import CALL_ID_LENGTH
from llama_smart_proxy.proxy.dialects.loose_json import loose_json
from llama_smart_proxy.proxy.dialects.ollama.fields import NAME
from llama_smart_proxy.proxy.dialects.upstream_errors import error_in
from llama_smart_proxy.proxy.errors import UpstreamFailed

_MS = 1e6  # nanoseconds


class OllamaReader:
    """Reads the lines of `/api/chat` and of `/api/generate`.

    The last line becomes one chunk with `finish_reason`, `usage` and llama.cpp's `timings`. Other fields become
    extensions of the chunk: `total_duration` and `load_duration` (nanoseconds), `context`, `done_reason` "load" and
    "unload", and unknown fields, also those of the message and its tool calls.
    """

    __slots__ = ("_asked", "_calls", "done")

    def __init__(self, request: ChatRequest | None = None) -> None:
        self.done = False
        self._asked = request.asked if request is not None else ""
        self._calls = 0

    def read(self, frame: bytes) -> Json | None:
        """The chunk of one line; None for a line without content.

        Raises: UpstreamRefused for an error line, UpstreamFailed for an invalid one.
        """
        if frame.isspace():
            return None
        try:
            line = loose_json(frame)
            if (error := error_in(line)) is not None:
                raise error
            line.pop("error", None)
            return self._chunk(line)
        except (ValueError, TypeError, KeyError, AttributeError):  # ValueError: not JSON
            raise UpstreamFailed(
                "the Ollama server sent a line that cannot be read", code="upstream_bad_frame"
            ) from None

    def _chunk(self, line: Json) -> Json | None:
        created_at, model = line.pop("created_at", ""), line.pop("model", None)
        model = self._asked or model
        message = line.pop("message", None)
        if message is None:
            delta = self._delta(line, "response", created_at)
        else:
            message.pop("role", None)
            delta = self._delta(message, "content", created_at)
            if message:
                line["message"] = message
        choice: Json = {"index": 0, "delta": delta, "finish_reason": None}
        if logprobs := line.pop("logprobs", None):
            choice["logprobs"] = {"content": logprobs}
        chunk: Json = {"model": model, "choices": [choice]} if model else {"choices": [choice]}
        if line.pop("done", False):
            self.done = True
            choice["finish_reason"] = self._finish(line)
            _read_metrics(line, chunk)
        elif not delta and not line and not logprobs:
            return None
        return attach(chunk, NAME, line)

    def _delta(self, source: Json, text_field: str, created_at: str) -> Json:
        """The delta of `source`, from which the fields used are removed."""
        delta: Json = {}
        if text := source.pop(text_field, None):
            delta["content"] = text + ""  # TypeError if it is not a string
        if thinking := source.pop("thinking", None):
            delta["reasoning_content"] = thinking + ""
        if given := source.pop("tool_calls", None):
            calls = [call for call in (given if isinstance(given, list) else [given]) if call is not None]
            delta["tool_calls"] = [self._call(call, created_at) for call in calls]
            if any(calls):
                source["tool_calls"] = calls
        return delta

    def _call(self, call: Json, created_at: str) -> Json:
        index, self._calls = self._calls, self._calls + 1
        function = call.pop("function", None) or {
            name: call.pop(name) for name in ("name", "arguments") if name in call
        }
        name, given = function.pop("name"), function.pop("arguments", None)
        arguments = given.encode() if isinstance(given, str) and given else orjson.dumps(given or {})
        function.pop("index", None)
        if function:
            call["function"] = function
        call_id = call.pop("id", None)
        if not call_id:  # deterministic for these bytes, different for every answer
            seed = f"{created_at} {index} {name} ".encode() + arguments
            call_id = hashlib.blake2s(seed, digest_size=8).hexdigest()[:CALL_ID_LENGTH]
        whole = {"name": name + "", "arguments": arguments.decode()}
        return {"index": index, "id": call_id, "type": "function", "function": whole}

    def _finish(self, line: Json) -> str:
        reason = line.get("done_reason")
        if reason in (None, "stop", "length"):
            line.pop("done_reason", None)
        return "length" if reason == "length" else "tool_calls" if self._calls else "stop"


def _number(value: Any) -> float:
    """A count or a duration; 0 if `value` is neither a number nor the text of one."""
    try:
        return max(float(value), 0)
    except (TypeError, ValueError):
        return 0


def _read_metrics(line: Json, chunk: Json) -> None:
    """Set `usage` and `timings` of `chunk`. Ollama's count of a prompt includes cached tokens, llama.cpp's does not;
    newer versions of Ollama report how many there were."""
    prompt, predicted = (round(_number(line.pop(name, 0))) for name in ("prompt_eval_count", "eval_count"))
    cached = line.get("prompt_eval_cached_count")
    for name in ("load_duration", "total_duration"):
        if name in line and not isinstance(line[name], int):
            line[name] = round(_number(line[name]))
    prompt_ms = _number(line.pop("prompt_eval_duration", 0)) / _MS
    predicted_ms = _number(line.pop("eval_duration", 0)) / _MS
    usage: Json = {"prompt_tokens": prompt, "completion_tokens": predicted, "total_tokens": prompt + predicted}
    timings: Json = {
        "prompt_n": prompt - (cached or 0),
        "prompt_ms": prompt_ms,
        "predicted_n": predicted,
        "predicted_ms": predicted_ms,
    }
    if cached is not None:
        usage["prompt_tokens_details"] = {"cached_tokens": cached}
        timings = {"cache_n": cached} | timings
    if prompt_ms:
        timings["prompt_per_second"] = timings["prompt_n"] / prompt_ms * 1e3
    if predicted_ms:
        timings["predicted_per_second"] = predicted / predicted_ms * 1e3
    chunk["usage"], chunk["timings"] = usage, timings
