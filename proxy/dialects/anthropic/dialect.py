"""How Anthropic's API reports errors and ends a stream."""

from __future__ import annotations

import orjson

from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.dialects.base import Dialect, counts, has_line, last_objects
from llama_smart_proxy.proxy.errors import ProxyError

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


def _usage(frames: bytes) -> Json | None:
    """The usage of a whole Message, or of the `message_delta` that ends a stream, which may lack the input tokens."""
    for event in last_objects(frames):
        if isinstance(usage := event.get("usage"), dict):
            cached = usage.get("cache_read_input_tokens")
            return counts(usage.get("input_tokens", 0) + (cached or 0), usage.get("output_tokens"), cached)
    return None


ANTHROPIC = Dialect(
    name="anthropic",
    error_body=_anthropic_error,
    error_event=lambda exc: b"event: error\ndata: " + _anthropic_error(exc) + b"\n\n",
    is_end=lambda events: has_line(events, b"event: message_stop"),
    is_error=lambda events: has_line(events, b"event: error"),
    usage=_usage,
    stateful_frames=True,
    id_headers=("request-id",),
)
"""Source: the Anthropic API reference, Messages streaming and errors."""
