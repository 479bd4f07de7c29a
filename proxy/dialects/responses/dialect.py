"""How OpenAI's Responses API reports errors and ends a stream."""

from __future__ import annotations

import orjson

from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.dialects.base import Dialect, counts, has_line, has_only, last_objects
from llama_smart_proxy.proxy.dialects.openai import OPENAI
from llama_smart_proxy.proxy.errors import ProxyError


def error_fields(exc: ProxyError) -> Json:
    """The fields of an `error` event, twice: flat, as documented, and under `error`, as OpenAI's server sends them and
    its Python client expects them. Source: the OpenAI API reference; openai-python 3.57, `_streaming.py`."""
    flat = {"code": exc.code, "message": exc.message, "param": exc.param}
    return {**flat, "error": {"type": exc.kind, **flat}}


def _error_event(exc: ProxyError) -> bytes:
    return b"event: error\ndata: " + orjson.dumps({"type": "error", **error_fields(exc)}) + b"\n\n"


def _usage(frames: bytes) -> Json | None:
    for event in last_objects(frames):
        usage = event.get("response", event).get("usage")
        if isinstance(usage, dict):
            return counts(usage.get("input_tokens"), usage.get("output_tokens"))
    return None


RESPONSES = Dialect(
    name="openai-responses",
    usage=_usage,
    error_body=OPENAI.error_body,
    error_event=_error_event,
    is_end=lambda events: has_line(
        events, b"event: response.completed", b"event: response.incomplete", b"event: response.failed"
    ),
    is_error=lambda events: has_line(events, b"event: error") or OPENAI.is_error(events),
    is_announcement=has_only(b"response.created", b"response.queued", b"response.in_progress"),
    sign_of_life=OPENAI.sign_of_life,
)
"""Source: the OpenAI API reference, streaming events of the Responses API."""
