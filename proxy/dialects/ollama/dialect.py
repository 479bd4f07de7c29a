"""How Ollama's API reports errors and ends a stream."""

from __future__ import annotations

from contextlib import suppress

import orjson

from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.dialects.base import Dialect, counts, has_line, last_objects
from llama_smart_proxy.proxy.dialects.ollama.fields import folded
from llama_smart_proxy.proxy.errors import ModelNotFound, ProxyError


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


def _usage(frames: bytes) -> Json | None:
    """Of the last line, or the one object. Counts of 0 are left out by Ollama."""
    for line in last_objects(frames):
        if line.get("done") is True:
            cached = line.get("prompt_eval_cached_count")
            return counts(line.get("prompt_eval_count", 0), line.get("eval_count", 0), cached)
    return None


OLLAMA = Dialect(
    name="ollama",
    error_body=_ollama_error,
    error_event=lambda exc: _ollama_error(exc) + b"\n",
    is_end=_is_last_line,
    is_error=lambda lines: has_line(lines, b'{"error":', b'{"error" :'),
    bind=lambda body, params: folded(body),
    usage=_usage,
    cuts=True,
    json_errors=True,
    last_frame_sums=True,
)
"""Newline-delimited JSON. The error is a text, never an object (ollama-python reads it as one). Open WebUI shows an
error line only if the connection breaks off behind it. Source: Ollama's server/routes.go."""
