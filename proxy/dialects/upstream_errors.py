"""Errors that model servers report: in an answer with an error status, inside a stream, or as the body of a 200.

Source: the OpenAI, Anthropic and Ollama API references; llama.cpp tools/server, b11434 (`format_error_response`); vLLM
(`{"object": "error", ...}`); FastAPI (`{"detail": ...}`).
"""

from __future__ import annotations

import re
from typing import Any

import orjson

from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.errors import ContextExceeded, UpstreamRefused

MESSAGE_LENGTH = 2000
"""Characters of a server's error message that are passed to the client; some servers send whole web pages."""
_CONTEXT_CODES = frozenset({"exceed_context_size_error", "context_length_exceeded"})
_CONTEXT_MESSAGES = re.compile(
    r"exceeds? the (?:available|model's) context|maximum context length|context (?:length|size|window) exceeded"
    r"|prompt is too long|exceeds the context length|longer than the (?:model's )?context length"
    r"|longer than the maximum model length|exceeds the maximum number of tokens|context the overflows"
    r"|`inputs` tokens \+ `max_new_tokens` must be",
    re.IGNORECASE,
)
_LIMIT = re.compile(
    r"(?:context (?:length|size) (?:is |of (?:only )?|\()|> |model length of |allowed \(|must be <= )(\d{1,12})",
    re.IGNORECASE,
)
_TOKENS = re.compile(
    r"(?:requested |resulted in |(?:request|input|count|prompt) \((?:length )?|too long: |first |given: )(\d{1,12})",
    re.IGNORECASE,
)
_STATUSES = ("code", "status", "status_code", "http_code")


def error_in(event: Json) -> UpstreamRefused | None:
    """The error that a JSON object of an answer reports, or None if it reports none. An `error` that is null, empty, or
    an object of empty fields is none: some servers send one with every event."""
    error = event.get("error")
    if isinstance(error, dict) and not any(error.values()):
        error = None
    if not error and event.get("error_message"):
        error = {"message": event["error_message"], "type": event.get("error_type")}
    if not error and event.get("object") == "error":
        error = {name: event[name] for name in ("message", "type", "code", "param") if name in event}
    if not error:
        return None
    body = {"error": error}
    return _refused(error_text(body), status=_status(body) or _status(event) or 502, details=error_details(body))


def bare_error_in(body: Json) -> UpstreamRefused | None:
    """The same for an object that stands where an answer is expected: it may be nothing but a message."""
    found = error_in(body)
    if found is None and not body.keys() & {"choices", "content", "response"}:
        text = body.get("detail") or body.get("message") or body.get("errors")
        if isinstance(text, str | list):
            return _refused(error_text(text), status=_status(body) or 502)
    return found


def refused(status: int, body: bytes) -> UpstreamRefused:
    """The error for an answer with an error status, with the server's own message."""
    message, details = body.decode("utf-8-sig", "replace").removeprefix("data:").strip(), Json()
    try:
        parsed = orjson.loads(message)
        parsed = parsed[0] if isinstance(parsed, list) and len(parsed) == 1 else parsed  # as Google's servers send it
    except orjson.JSONDecodeError:
        pass
    else:
        message, details = error_text(parsed), error_details(parsed)
    message = message or f"the model server answered with status {status}"
    return _refused(message, status=status if status >= 400 else 502, details=details)


def error_details(body: Any) -> Json:
    """The fields of a server's error object other than its message: `type`, `code`, `param`, and llama-server's
    numbers (`n_*`)."""
    error = body.get("error") if isinstance(body, dict) else None
    fields = error if isinstance(error, dict) else {}
    names = (name for name in fields if name in ("type", "code", "param") or name.startswith("n_"))
    return {name: fields[name] for name in names if _is_short(fields[name])}


def error_text(body: Any) -> str:
    """The message of a server's error body, in OpenAI's, Anthropic's or Ollama's format; its JSON in any other."""
    error = (body.get("error") or body.get("errors") or body) if isinstance(body, dict) else body
    if isinstance(error, list) and len(error) == 1 and isinstance(error[0], dict):
        error = error[0].get("error") or error[0]
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or error
    return error if isinstance(error, str) else orjson.dumps(error).decode()


def _refused(message: str, *, status: int, details: Json | None = None) -> UpstreamRefused:
    details = details or {}
    message = message[:MESSAGE_LENGTH]
    has_code = {str(details.get("type")), str(details.get("code"))} & _CONTEXT_CODES
    if has_code or (status < 500 and _CONTEXT_MESSAGES.search(message)):
        tokens = _count(details.get("n_prompt_tokens")) or _number(_TOKENS, message)
        limit = _count(details.get("n_ctx")) or _number(_LIMIT, message)
        return ContextExceeded(message, details=details, tokens=tokens, limit=limit)
    return UpstreamRefused(message, status=status, details=details)


def _number(pattern: re.Pattern[str], message: str) -> int | None:
    found = pattern.search(message)
    return int(found[1]) if found else None


def _count(value: Any) -> int | None:
    return value if value.__class__ is int and value > 0 else None


def _status(body: Json) -> int | None:
    """The HTTP status in an error object, as some servers put it there."""
    error = body.get("error")
    fields = error if isinstance(error, dict) else body
    for name in _STATUSES:
        value = fields.get(name)
        if isinstance(value, str) and value.isdecimal() and len(value) == 3:
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool) and 400 <= value <= 599:
            return value
    return None


def _is_short(value: Any) -> bool:
    return value is None or isinstance(value, int | float) or (isinstance(value, str) and len(value) <= 200)
