"""How Ollama's API reports errors and ends a stream."""

from __future__ import annotations

from contextlib import suppress

import orjson

from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.config import is_ollama_name
from llama_smart_proxy.proxy.dialects.base import Dialect, counts, has_line, last_objects
from llama_smart_proxy.proxy.dialects.ollama.fields import folded
from llama_smart_proxy.proxy.dialects.ollama.models import INVALID_NAME
from llama_smart_proxy.proxy.errors import BadRequest, ContextExceeded, ModelNotFound, ProxyError, error_text

CONTEXT_EXCEEDED = "the input length exceeds the context length"
"""Ollama's message for a prompt that is too long. Source: Ollama's llm package."""


def error_line(exc: ProxyError, **answer: object) -> bytes:
    """The line that ends a stream with an error; `answer` are fields of the answer so far."""
    return orjson.dumps({"error": _error(exc), **answer}) + b"\n"


def _error(exc: ProxyError) -> str:
    message = exc.brief if isinstance(exc, ModelNotFound) else exc.message
    return CONTEXT_EXCEEDED if isinstance(exc, ContextExceeded) else message


def _shown_line(exc: ProxyError) -> bytes:
    """An error line that Open WebUI shows: it reads nothing but `message`. Clients of Ollama raise for `error`."""
    return error_line(exc, message={"role": "assistant", "content": error_text(exc)}, done=False)


def _is_last_line(lines: bytes) -> bool:
    """Whether the last line ends an answer, or a pull."""
    line = lines.strip().rpartition(b"\n")[2]
    if b"done" not in line and b"success" not in line:
        return False  # parsing the line of every token would cost more than everything else
    # not a search for `"done":true`: arguments of tool calls are objects in the line and may contain that, too
    with suppress(orjson.JSONDecodeError):
        event = orjson.loads(line)
        return isinstance(event, dict) and (event.get("done") is True or event.get("status") == "success")
    return False


def _usage(frames: bytes) -> Json | None:
    """The usage of the last line, or of a whole body. Ollama leaves out counts of 0."""
    for line in last_objects(frames):
        if line.get("done") is True:
            cached = line.get("prompt_eval_cached_count")
            return counts(line.get("prompt_eval_count", 0), line.get("eval_count", 0), cached)
    return None


def _is_error_body(body: bytes) -> bool:
    """ollama-python raises its own exception if the body is not a JSON object."""
    with suppress(orjson.JSONDecodeError):
        return isinstance(orjson.loads(body), dict)
    return False


def _not_found(name: object, exc: ModelNotFound) -> ProxyError:
    return exc if isinstance(name, str) and is_ollama_name(name) else BadRequest(INVALID_NAME, param="model")


OLLAMA = Dialect(
    name="ollama",
    error_body=lambda exc: orjson.dumps({"error": _error(exc)}),
    error_event=_shown_line,
    is_end=_is_last_line,
    is_error=lambda lines: has_line(lines, b'{"error":', b'{"error" :'),
    bind=lambda body, params: folded(body),
    usage=_usage,
    not_found=_not_found,
    cuts=True,
    is_error_body=_is_error_body,
    stream_type="application/x-ndjson",
    end_mark=b"true",
    last_frame_sums=True,
)
"""Newline-delimited JSON. The error is a string, never an object: ollama-python expects that. Open WebUI shows an error
line only if the connection is aborted after it. Source: Ollama's server/routes.go."""
