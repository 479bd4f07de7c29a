"""How each wire API says that something went wrong and that a stream is over.

A `Dialect` is pure data and pure functions. The relay needs no more of an API than this: everything else passes through
as bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import orjson

from llama_smart_proxy.proxy.errors import ModelNotFound, ProxyError, UpstreamRefused


@dataclass(frozen=True, slots=True)
class Dialect:
    """One wire API as the relay sees it.

    `error_body` is the JSON of a failed request. `error_event` is the in-stream form, once headers are out. `is_end`
    and `is_error` recognise the last event of a good and of a failed stream in the newest whole events. `ending` is
    what a client waits for after either (empty: nothing). `cuts` says that a failed stream is cut off behind the error,
    because clients of this API take a stream that ends properly for a whole answer.
    """

    name: str
    error_body: Callable[[ProxyError], bytes]
    error_event: Callable[[ProxyError], bytes]
    is_end: Callable[[bytes], bool]
    is_error: Callable[[bytes], bool]
    ending: bytes = b""
    cuts: bool = False


def _openai_error(exc: ProxyError) -> bytes:
    details = exc.details if isinstance(exc, UpstreamRefused) else {}
    error = {"message": exc.message, "type": exc.kind, "param": exc.param, "code": exc.code, **details}
    return orjson.dumps({"error": error})


def _openai_event(exc: ProxyError) -> bytes:
    return b"data: " + _openai_error(exc) + b"\n\n"


def _has_line(events: bytes, *starts: bytes) -> bool:
    """Whether a line begins with one of `starts`. Text of an answer cannot: its line ends are escaped in the JSON."""
    return events.startswith(starts) or any(end + start in events for start in starts for end in (b"\n", b"\r"))


def _has_error_event(events: bytes) -> bool:
    """llama-server sends `data: {"error": ...}` (b11434). `error: {...}` is what some servers send instead."""
    return _has_line(events, b'data: {"error"', b'data:{"error"', b"error: ")


OPENAI = Dialect(
    name="openai",
    error_body=_openai_error,
    error_event=_openai_event,
    is_end=lambda events: _has_line(events, b"data: [DONE]", b"data:[DONE]"),
    is_error=_has_error_event,
    ending=b"data: [DONE]\n\n",
)
"""Source: the OpenAI API reference; llama-server and vLLM both end a stream with `[DONE]`."""

NATIVE = Dialect(
    name="llama.cpp",
    error_body=_openai_error,
    error_event=_openai_event,
    is_end=lambda events: b'"stop":true' in events,
    is_error=_has_error_event,
)
"""llama-server's own `/completion` and `/infill`: the last event carries `"stop":true`, and no `[DONE]` follows.
Source: llama.cpp tools/server/server-context.cpp, b11434. A quote inside generated text is escaped, so text cannot
look like the field."""


def _responses_event(exc: ProxyError) -> bytes:
    event = {"type": "error", "code": exc.code, "message": exc.message, "param": exc.param}
    return b"event: error\ndata: " + orjson.dumps(event) + b"\n\n"


RESPONSES = Dialect(
    name="openai-responses",
    error_body=_openai_error,
    error_event=_responses_event,
    is_end=lambda events: _has_line(
        events, b"event: response.completed", b"event: response.incomplete", b"event: response.failed"
    ),
    is_error=lambda events: _has_line(events, b"event: error") or _has_error_event(events),
)
"""Source: the OpenAI API reference, streaming events of the Responses API."""

_ANTHROPIC_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def _anthropic_error(exc: ProxyError) -> bytes:
    kind = _ANTHROPIC_KINDS.get(exc.status, "api_error")
    return orjson.dumps({"type": "error", "error": {"type": kind, "message": exc.message}})


ANTHROPIC = Dialect(
    name="anthropic",
    error_body=_anthropic_error,
    error_event=lambda exc: b"event: error\ndata: " + _anthropic_error(exc) + b"\n\n",
    is_end=lambda events: _has_line(events, b"event: message_stop"),
    is_error=lambda events: _has_line(events, b"event: error"),
)
"""Source: the Anthropic API reference, Messages streaming and errors."""


def _ollama_error(exc: ProxyError) -> bytes:
    return orjson.dumps({"error": exc.brief if isinstance(exc, ModelNotFound) else exc.message})


def _is_last_line(lines: bytes) -> bool:
    """Whether the last line ends an answer, or a pull. Parsed, as the arguments of tool calls are objects in the line;
    but not for every token, as that would cost more than all the rest."""
    line = lines.strip().rpartition(b"\n")[2]
    if b"done" not in line and b"success" not in line:
        return False
    with suppress(orjson.JSONDecodeError):
        said = orjson.loads(line)
        return isinstance(said, dict) and (said.get("done") is True or said.get("status") == "success")
    return False


OLLAMA = Dialect(
    name="ollama",
    error_body=_ollama_error,
    error_event=lambda exc: _ollama_error(exc) + b"\n",
    is_end=_is_last_line,
    is_error=lambda lines: _has_line(lines, b'{"error":', b'{"error" :'),
    cuts=True,
)
"""Newline-delimited JSON. The error is a text, never an object (ollama-python reads it as one). Open WebUI shows an
error line only if the connection breaks off behind it. Source: Ollama's server/routes.go."""
