"""OpenAI's chat and text completions, whose JSON is also the internal shape, and llama-server's stream of `/infill`.

Source: the OpenAI API reference; llama.cpp tools/server, b11434, for `timings`, `reasoning_content` and `/infill`.
"""

from __future__ import annotations

import re
import secrets
import time
from contextlib import suppress
from typing import Any

import orjson

from llama_smart_proxy.proxy.chat import EXTENSIONS, ChatRequest, Json, Timing, without_extensions
from llama_smart_proxy.proxy.chat.chunk import has_content
from llama_smart_proxy.proxy.dialects.arguments import has_calls, mend_arguments
from llama_smart_proxy.proxy.dialects.base import ClientCodec, Dialect, UpstreamCodec, counts, has_line, last_objects
from llama_smart_proxy.proxy.dialects.framing import EventSplitter, event_data
from llama_smart_proxy.proxy.dialects.loose_json import loose_json
from llama_smart_proxy.proxy.dialects.upstream_errors import bare_error_in, error_in, error_text
from llama_smart_proxy.proxy.errors import BadRequest, ContextExceeded, ProxyError, UpstreamFailed, UpstreamRefused

_DONE = re.compile(rb"(?:^|[\r\n])data:[ \t]*\[DONE\][ \t]*(?:[\r\n]|$)")
"""The event that ends a stream; some servers send blanks around it."""


def _openai_error(exc: ProxyError) -> bytes:
    details = exc.details if isinstance(exc, UpstreamRefused) else {}
    error = {"message": exc.message, "type": exc.kind, "param": exc.param, "code": exc.code, **details}
    if isinstance(exc, ContextExceeded):  # clients match this code, and shorten the chat
        error |= {"type": exc.kind, "code": exc.code, "n_prompt_tokens": exc.tokens, "n_ctx": exc.limit}
    return orjson.dumps({"error": error})


def _openai_event(exc: ProxyError) -> bytes:
    return b"data: " + _openai_error(exc) + b"\n\n"


def _has_error_event(events: bytes) -> bool:
    """llama-server sends `data: {"error": ...}` (b11434); some servers send `error: {...}` instead."""
    return has_line(events, b'data: {"error"', b'data:{"error"', b"error: ")


def _has_finish_reason(frames: bytes) -> bool:
    """Whether a choice has ended in one of `frames`."""
    if b"finish_reason" not in frames:
        return False
    choices = (choice for event in last_objects(frames) for choice in event.get("choices") or ())
    return any(isinstance(choice, dict) and choice.get("finish_reason") for choice in choices)


def _has_only_role(events: bytes) -> bool:
    """Whether no more has come than who speaks, as in the first event of OpenAI's own servers."""
    choices = [choice for event in last_objects(events) for choice in event.get("choices") or (None,)]
    return bool(choices) and all(
        isinstance(choice, dict) and isinstance(choice.get("delta"), dict) and not has_content(choice)
        for choice in choices
    )


def _is_error_body(body: bytes) -> bool:
    """Clients show the message of an `error`, and of nothing else."""
    with suppress(orjson.JSONDecodeError):
        parsed = orjson.loads(body)
        return isinstance(parsed, dict) and bool(parsed.get("error"))
    return False


def _counts_alone(frames: bytes) -> Json | None:
    """llama-server's `timings` at the end of the last event before `[DONE]`, without parsing the rest of it: every
    answer is counted. None if they are not there, or if the server has sent `usage`."""
    end = frames.rfind(b"}}")
    begin = frames.rfind(b'"timings":{"cache_n":', 0, end)  # generated text cannot match, as JSON escapes its quotes
    if begin < 0 or b"}" in frames[begin:end] or b'"usage":{' in frames:
        return None
    try:
        timings = orjson.loads(frames[begin + 10 : end + 1])
    except orjson.JSONDecodeError:
        return None
    return counts(timings["cache_n"] + timings.get("prompt_n", 0), timings.get("predicted_n"), timings["cache_n"])


def _usage(frames: bytes) -> Json | None:
    """llama-server sends `timings` with every answer, and `usage` with a stream only if the client requested it."""
    found = _counts_alone(frames)
    if found is not None:
        return found
    for event in last_objects(frames):
        if isinstance(usage := event.get("usage"), dict):
            return usage
        if isinstance(timings := event.get("timings"), dict):
            cached = timings.get("cache_n", 0)
            return counts(timings.get("prompt_n", 0) + cached, timings.get("predicted_n"), cached)
    return None


COMMENT = b": waiting\n\n"
"""An event that clients ignore. Source: WHATWG HTML, "Event stream interpretation"."""

OPENAI = Dialect(
    name="openai",
    error_body=_openai_error,
    error_event=_openai_event,
    is_end=lambda events: b"[DONE]" in events and _DONE.search(events) is not None,
    is_finished=_has_finish_reason,
    is_error=_has_error_event,
    bind=lambda body, params: mend_arguments(body),
    binds_slowly=has_calls,
    ending=b"data: [DONE]\n\n",
    end_mark=b"[DONE]",
    is_error_body=_is_error_body,
    usage=_usage,
    is_announcement=_has_only_role,
    sign_of_life=COMMENT,
)
"""Source: the OpenAI API reference; llama-server and vLLM both end a stream with `[DONE]`, TGI and ik_llama.cpp do
not."""

NATIVE = Dialect(
    name="llama.cpp",
    error_body=_openai_error,
    error_event=_openai_event,
    is_end=lambda events: b'"stop":true' in events,
    is_error=_has_error_event,
    matched_context_error=False,
    usage=_usage,
    sign_of_life=COMMENT,
)
"""llama-server's own `/completion` and `/infill`: the last event contains `"stop":true`, and no `[DONE]` follows.
Generated text cannot match, as JSON escapes its quotes. Source: llama.cpp tools/server/server-context.cpp, b11434."""


_TOKEN_LIMITS = ("max_completion_tokens", "max_tokens")


def _streams(body: Json) -> bool:
    stream = body.get("stream", False)
    if not isinstance(stream, bool) and stream is not None:
        raise BadRequest("stream must be a boolean", param="stream")
    return bool(stream)


class ChatWriter:
    """Writes `chat.completion.chunk` events, and `chat.completion` bodies."""

    content_type = "text/event-stream"
    object = "chat.completion"
    prefix = "chatcmpl-"

    def __init__(self, request: ChatRequest, timing: Timing) -> None:
        options = request.body.get("stream_options")
        self._include_usage = isinstance(options, dict) and options.get("include_usage") is True
        self._usage: Json = {}
        self._begun = False
        self._own: Json = {
            "id": f"{self.prefix}{secrets.token_hex(12)}",
            "object": self._name(),
            "created": int(time.time()),
            "model": request.model,
        }

    def chunk(self, chunk: Json) -> bytes:
        written = {**self._own, **chunk}
        written.pop(EXTENSIONS, None)
        if "usage" in written:
            self._usage["usage"] = written.pop("usage")
        if not written.get("choices"):
            self._usage |= written
            return b""
        return _event(self._shaped(written))

    def adopt(self, chunk: Json) -> None:
        self._begun = True
        self._own |= {name: chunk[name] for name in self._own if name in chunk}

    def end(self) -> bytes:
        last = b""
        if self._include_usage and "usage" in self._usage:
            last = _event({**self._own, **self._usage, "choices": []})
        return last + OPENAI.ending

    def error(self, exc: ProxyError) -> bytes:
        return OPENAI.error_event(exc) + OPENAI.ending

    def reply(self, completion: Json) -> bytes:
        whole = {**self._own, **completion, "object": self.object}
        return orjson.dumps(without_extensions(self._whole(whole)))

    def _name(self) -> str:
        return f"{self.object}.chunk"

    def _shaped(self, chunk: Json) -> Json:
        if not self._begun:
            self._begun = True
            for choice in chunk["choices"]:
                choice["delta"] = {"role": "assistant", **choice.get("delta", {})}
        return chunk

    def _whole(self, completion: Json) -> Json:
        return completion


class TextWriter(ChatWriter):
    """Writes `text_completion` events and bodies."""

    object = "text_completion"
    prefix = "cmpl-"

    def _name(self) -> str:
        return self.object

    def _shaped(self, chunk: Json) -> Json:
        return {**chunk, "choices": [_text_choice(choice, choice.get("delta") or {}) for choice in chunk["choices"]]}

    def _whole(self, completion: Json) -> Json:
        return {**completion, "choices": [_text_choice(choice, choice["message"]) for choice in completion["choices"]]}


def _text_choice(choice: Json, message: Json) -> Json:
    rest = {key: value for key, value in choice.items() if key not in ("delta", "message")}
    return {"text": message.get("content") or "", **rest}


_HEARTBEATS = frozenset({b"ping", b"keepalive", b"keep-alive", b"keep_alive", b"heartbeat"})
"""Data of events without content. Other servers send a comment as the data of an event."""


def _named_error(frame: bytes, data: bytes) -> ProxyError:
    """The error of an event that is named one, or of a line `error: ...`. Its data may be of any form."""
    if not data:
        data = next(line[6:] for line in frame.splitlines() if line.startswith(b"error:"))
    with suppress(ValueError):
        value = loose_json(data)
        found = bare_error_in(value) if isinstance(value, dict) else None
        return found or UpstreamFailed(error_text(value), code="upstream_error")
    return UpstreamFailed(data.decode(errors="replace").strip(), code="upstream_error")


class EventReader:
    """Reads the events of a chat, of a text completion and of llama-server's `/infill`."""

    def __init__(self, request: ChatRequest) -> None:
        self.done = False

    def read(self, frame: bytes) -> Json | None:
        try:  # fast path: nearly all events are one `data: ` line of JSON
            event = orjson.loads(frame[6:]) if frame.startswith(b"data: {") else self._lines(frame)
        except orjson.JSONDecodeError:
            event = self._lines(frame)
        if event is None:
            return None
        if not isinstance(event, dict):
            raise UpstreamFailed(error_text(event), code="upstream_error")
        choices = event.get("choices")
        if "error" in event or not choices:
            if (error := error_in(event)) is not None:
                raise error
            if not choices:
                return self._native(event) if "content" in event or "stop" in event else event
        for choice in choices:
            if choice and "text" in choice:
                choice["delta"] = {"content": choice.pop("text")}
        return event

    def _lines(self, frame: bytes) -> Any:
        """The JSON of an event of any form; None for one without data, for `[DONE]`, and for a heartbeat."""
        data = (event_data(frame) or b"").strip()
        if has_line(frame, b"event: error", b"event:error", b"error:"):
            raise _named_error(frame, data)
        if not data or data.strip(b'"').upper() == b"[DONE]":
            self.done = self.done or data != b""
            return None
        if data.startswith(b":") or data.lower() in _HEARTBEATS:
            return None
        try:
            event = loose_json(data)
        except ValueError:
            raise UpstreamFailed("the model server sent an event that is not JSON", code="upstream_error") from None
        if event is None:
            raise UpstreamFailed(error_text(event), code="upstream_error")
        return event

    def _native(self, event: Json) -> Json:
        finish = None
        if event.get("stop"):
            self.done = True
            finish = "length" if event.get("stop_type") == "limit" else "stop"
        choice = {"index": 0, "delta": {"content": event.get("content", "")}, "finish_reason": finish}
        chunk: Json = {"choices": [choice]}
        if "timings" in event:
            chunk["timings"] = event["timings"]
        return chunk


def _event(value: Json) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


def _to_openai(request: ChatRequest) -> tuple[str, Json]:
    """The request for any OpenAI-compatible server, streamed; with usage, because other APIs always report it."""
    body = without_extensions(request.body)
    options = body.get("stream_options")
    body |= {
        "stream": True,
        "stream_options": {**(options if isinstance(options, dict) else {}), "include_usage": True},
    }
    return ("/v1/completions" if request.is_text else "/v1/chat/completions"), body


def _as_requested(request: ChatRequest) -> tuple[str, Json]:
    """The request as its client sent it, streamed; without usage if the client requested a stream without it."""
    path, body = _to_openai(request)
    if not request.stream:
        return path, body
    body.pop("stream_options")
    options = request.body.get("stream_options")
    return path, body | ({} if options is None else {"stream_options": options})


def _to_llama_cpp(request: ChatRequest) -> tuple[str, Json]:
    """The same for llama-server, which has a separate endpoint for infill."""
    path, body = _to_openai(request)
    if request.is_text and body.get("suffix"):
        limits = [body.pop(key) for key in _TOKEN_LIMITS if key in body]
        body |= {"input_prefix": body.pop("prompt"), "input_suffix": body.pop("suffix")}
        body |= {"n_predict": limits[0]} if limits else {}
        return "/infill", body
    return path, body


WIRE = UpstreamCodec(OPENAI, EventSplitter, _to_openai, EventReader)
"""Any OpenAI-compatible server."""
OWN_WIRE = UpstreamCodec(OPENAI, EventSplitter, _as_requested, EventReader, renames=False)
"""The same, for clients of that API."""
LLAMA_CPP = UpstreamCodec(OPENAI, EventSplitter, _to_llama_cpp, EventReader)
"""llama-server."""


class ChatCodec(ClientCodec):
    """`POST /v1/chat/completions`."""

    dialect = OPENAI
    same_api = OWN_WIRE
    limit_fields = ("max_tokens", "max_completion_tokens", "n_predict")
    has_events = True

    def decode(self, body: Json) -> ChatRequest:
        messages = body.get("messages")
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise BadRequest("messages must be a list of objects", param="messages")
        if not messages:
            raise BadRequest("messages must not be empty", param="messages")
        return ChatRequest(body, _streams(body))

    def encode(self, request: ChatRequest) -> Json:
        return request.body

    def writer(self, request: ChatRequest, timing: Timing) -> ChatWriter:
        return ChatWriter(request, timing)

    def event(self, kind: str, data: Json) -> bytes:
        """Open WebUI executes such an event, and does not keep it. Source: Open WebUI 0.12.4."""
        return _event({"event": {"type": kind, "data": data}})

    def thought(self, model: str, text: str) -> bytes:
        choice = {"index": 0, "delta": {"role": "assistant", "reasoning_content": text}, "finish_reason": None}
        own = {"id": f"{ChatWriter.prefix}{secrets.token_hex(12)}", "object": "chat.completion.chunk"}
        return _event({**own, "created": int(time.time()), "model": model, "choices": [choice]})

    def fits(self, request: ChatRequest) -> bool:
        return True  # `decode` and `encode` keep unknown fields


class TextCodec(ChatCodec):
    """`POST /v1/completions`."""

    resends_chat = False
    has_events = False

    def decode(self, body: Json) -> ChatRequest:
        if "prompt" not in body:
            raise BadRequest("prompt is required", param="prompt")
        fields = {name: value for name, value in body.items() if name != "messages"}  # these would make it a chat
        return ChatRequest(fields, _streams(body))

    def writer(self, request: ChatRequest, timing: Timing) -> TextWriter:
        return TextWriter(request, timing)

    def thought(self, model: str, text: str) -> bytes:
        return b""


CHAT = ChatCodec()
TEXT = TextCodec()
