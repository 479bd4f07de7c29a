"""Converts Ollama's `options`, and the other fields that control generation, in both directions.

No defaults are added. Source: Ollama's api/types.go (names, types, error messages) and llm/llama_server.go (their
conversion); llama.cpp's tools/server/server-schema.cpp, b11434 (names and limits).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llama_smart_proxy.proxy.chat import ChatRequest, Json, without_extensions
from llama_smart_proxy.proxy.errors import BadRequest

SAMPLING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repeat_last_n": "repeat_last_n",
    "repeat_penalty": "repeat_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "seed": "seed",
    "stop": "stop",
    "num_predict": "max_tokens",
    "num_keep": "n_keep",
}
"""Ollama's option -> llama-server's top-level field."""

WHOLE_CONTEXT = 2**20
"""llama-server has no value for the whole context, `repeat_last_n` -1 of Ollama's. It allocates 4 bytes per token, so
this is a number larger than any context, but not the largest possible one."""

EXTRAS = ("format", "think", "keep_alive", "truncate", "shift", "options")
"""Ollama's own fields, which clients of other APIs may also send (`extra_body` of the openai package)."""

_INTEGERS = {"num_keep", "seed", "num_predict", "top_k", "repeat_last_n", "num_ctx", "num_batch", "num_gpu", "main_gpu"}
_INTEGERS |= {"num_thread", "draft_num_predict"}
_FLOATS = {"temperature", "top_p", "min_p", "typical_p", "repeat_penalty", "presence_penalty", "frequency_penalty"}
_LOWEST = {"num_keep": -1, "top_k": 0, "num_predict": 0, "repeat_last_n": 0}
_INT32_MAX = 2**31 - 1
_LEVELS = ("low", "medium", "high", "max")
_EFFORTS = {"minimal": "low", "xhigh": "max"} | {level: level for level in _LEVELS}
_THINK_VALUES = '"high", "medium", "low", "max", true, or false'


def decode_options(options: Mapping[str, Any] | None) -> Json:
    """The samplers among `options`, with llama-server's names and limits.

    Raises: BadRequest for a known option of the wrong type.
    """
    result = {}
    for name, value in (options or {}).items():
        if value is None:
            continue
        _check_option(name, value)
        if name in SAMPLING and not (name == "num_predict" and value < 0):  # unlimited, as without the option
            result[SAMPLING[name]] = _limited(name, value)
    return result


def encode_options(body: Mapping[str, Any]) -> Json:
    """The `options` for the samplers of `body`; its own `options`, if any, take precedence."""
    result = {option: body[field] for option, field in SAMPLING.items() if body.get(field) is not None}
    limit = next(
        (body[key] for key in ("max_completion_tokens", "max_tokens", "n_predict") if body.get(key) is not None), None
    )
    if limit is not None:
        result["num_predict"] = limit
    if isinstance(result.get("stop"), str):
        result["stop"] = [result["stop"]]
    explicit = body.get("options")
    return result | explicit if isinstance(explicit, dict) else result


def decode_format(value: object, *, text: bool) -> Json:
    """The field for JSON output: `response_format`, or `json_schema` for a text completion. Raises: BadRequest."""
    if value in (None, ""):
        return {}
    if value != "json" and not isinstance(value, dict):
        shown = json.dumps(json.dumps(value, ensure_ascii=False), ensure_ascii=False)
        raise BadRequest(f'invalid format: {shown}; expected "json" or a valid JSON Schema object', param="format")
    if text:
        return {"json_schema": {} if value == "json" else value}
    if value == "json":
        return {"response_format": {"type": "json_object"}}
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "schema", "schema": value}}}


def unconstrained(request: ChatRequest) -> ChatRequest | None:
    """The request for JSON of any shape in place of a schema; None if it has no schema."""
    body = request.body
    if (body.get("response_format") or {}).get("type") == "json_schema":
        body = {**body, "response_format": {"type": "json_object"}}
    elif body.get("json_schema"):
        body = {**body, "json_schema": {}}
    return ChatRequest(body, request.stream, request.asked) if body is not request.body else None


def encode_format(body: Mapping[str, Any]) -> Any:
    """`format`; None for unconstrained text. `strict` and `name` of a schema are dropped."""
    requested = body.get("response_format")
    requested = requested if isinstance(requested, dict) else {}
    if requested.get("type") in ("json_object", "json_schema"):
        holder = requested.get("json_schema") if requested["type"] == "json_schema" else requested
        return (without_extensions(holder.get("schema")) if isinstance(holder, dict) else None) or "json"
    schema = body.get("json_schema")
    return None if schema is None else without_extensions(schema) or "json"


def decode_think(value: object) -> Json:
    """`think` as variables of the chat template: whether to think, and the effort. Raises: BadRequest."""
    if value is None:
        return {}
    if isinstance(value, bool):
        return {"chat_template_kwargs": {"enable_thinking": value}}
    if not isinstance(value, str):
        raise BadRequest(f"think must be a boolean or string ({_THINK_VALUES})", param="think")
    if value not in _LEVELS:
        shown = json.dumps(value, ensure_ascii=False)
        raise BadRequest(f"invalid think value: {shown} (must be {_THINK_VALUES})", param="think")
    return {"chat_template_kwargs": {"enable_thinking": True, "reasoning_effort": value}}


def encode_think(body: Mapping[str, Any]) -> Any:
    """`think`; None for the model's default. Levels that Ollama lacks are mapped to the nearest."""
    variables = body.get("chat_template_kwargs")
    variables = variables if isinstance(variables, dict) else {}
    effort = variables.get("reasoning_effort", body.get("reasoning_effort"))
    enabled = variables.get("enable_thinking")
    if enabled is False or effort == "none":
        return False
    return _EFFORTS.get(effort, True) if isinstance(effort, str) else enabled


def decode_logprobs(sent: Mapping[str, Any], *, text: bool) -> Json:
    """The fields for logprobs. For 0 alternatives llama-server sends no logprobs at all, so at least one is requested.
    Raises: BadRequest."""
    count = sent.get("top_logprobs") or 0
    if not 0 <= count <= 20:
        raise BadRequest("top_logprobs must be between 0 and 20", param="top_logprobs")
    if not sent.get("logprobs"):
        return {}
    count = max(int(count), 1)
    return {"logprobs": count} if text else {"logprobs": True, "top_logprobs": count}


def encode_logprobs(body: Mapping[str, Any]) -> Json:
    """`logprobs` and `top_logprobs`; in OpenAI's text completions, `logprobs` is the number of alternatives."""
    enabled, count = body.get("logprobs"), body.get("top_logprobs")
    if isinstance(enabled, int) and not isinstance(enabled, bool):
        enabled, count = True, enabled
    if not enabled:
        return {}
    return {"logprobs": True} if count is None else {"logprobs": True, "top_logprobs": count}


def _check_option(name: str, value: object) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if name in _INTEGERS and not is_number:
        expected = "of type integer"
    elif name in _FLOATS and not is_number:
        expected = "of type float32"
    elif name == "use_mmap" and not isinstance(value, bool):
        expected = "of type boolean"
    elif name == "stop" and not isinstance(value, list):
        expected = "of type array"
    elif name == "stop" and isinstance(value, list) and not all(isinstance(item, str) for item in value):
        expected = "of an array of strings"
    else:
        return
    raise BadRequest(f'option "{name}" must be {expected}', param="options")


def _limited(name: str, value: Any) -> Any:
    """`value` within llama-server's limits, which exclude some numbers that are valid in Ollama."""
    if name not in _INTEGERS:
        return value
    value = int(value)
    if name == "seed":
        return value
    if name == "repeat_last_n" and value < 0:
        return WHOLE_CONTEXT
    return max(_LOWEST[name], min(value, _INT32_MAX))
