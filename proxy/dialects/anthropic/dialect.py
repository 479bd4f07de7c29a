"""How Anthropic's API reports errors and ends a stream."""

from __future__ import annotations

from contextlib import suppress

import orjson

from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.dialects.base import Dialect, counts, has_line, has_only, last_objects
from llama_smart_proxy.proxy.dialects.limits import anthropic_headers
from llama_smart_proxy.proxy.errors import ContextExceeded, ProxyError

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
    kind = _ANTHROPIC_KINDS.get(exc.status, "invalid_request_error" if exc.status < 500 else "api_error")
    message = exc.message
    if isinstance(exc, ContextExceeded) and exc.tokens and exc.limit:  # Claude Code compacts the chat on this text
        message = f"prompt is too long: {exc.tokens} tokens > {exc.limit} maximum"
    elif isinstance(exc, ContextExceeded):
        message = f"prompt is too long: {message}"
    return orjson.dumps({"type": "error", "error": {"type": kind, "message": message}})


def _usage(frames: bytes) -> Json | None:
    """The usage of a whole Message, or of the `message_delta` that ends a stream, which may lack the input tokens."""
    for event in last_objects(frames):
        if isinstance(usage := event.get("usage"), dict):
            cached = usage.get("cache_read_input_tokens")
            return counts(usage.get("input_tokens", 0) + (cached or 0), usage.get("output_tokens"), cached)
    return None


def _is_error_body(body: bytes) -> bool:
    """llama-server answers errors of `/v1/messages` in OpenAI's format (b11434)."""
    with suppress(orjson.JSONDecodeError):
        parsed = orjson.loads(body)
        return isinstance(parsed, dict) and parsed.get("type") == "error"
    return False


ANTHROPIC = Dialect(
    name="anthropic",
    error_body=_anthropic_error,
    error_event=lambda exc: b"event: error\ndata: " + _anthropic_error(exc) + b"\n\n",
    is_end=lambda events: has_line(events, b"event: message_stop"),
    is_error=lambda events: has_line(events, b"event: error"),
    usage=_usage,
    is_error_body=_is_error_body,
    end_mark=b"message_stop",
    stateful_frames=True,
    id_headers=("request-id",),
    limit_headers=anthropic_headers,
    is_announcement=has_only(b"message_start", b"content_block_start", b"ping"),
    sign_of_life=b'event: ping\ndata: {"type": "ping"}\n\n',
)
"""Source: the Anthropic API reference, Messages streaming and errors."""
