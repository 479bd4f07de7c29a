"""Ollama's `options`, and the other fields that say how to generate rather than from what, in both directions.

Only what a client says is passed on; no default is made up. Source: Ollama's api/types.go (names, types, error texts)
and llm/llama_server.go (what they become); llama.cpp's tools/server/server-schema.cpp, b11434 (names and limits).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llama_smart_proxy.proxy.chat import Json, bare
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
"""Ollama's option and what llama-server calls it at the top level of a request."""

WHOLE_CONTEXT = 2**20
"""`repeat_last_n` -1 means the whole context, which llama-server has no number for. It sets aside 4 bytes for each
token it shall look back at, so this is not the largest number there is, but one beyond every context."""

EXTRAS = ("format", "think", "keep_alive", "truncate", "shift", "options")
"""Ollama's own fields, which clients of other APIs may send, too (`extra_body` of the openai package)."""

_INTEGERS = {"num_keep", "seed", "num_predict", "top_k", "repeat_last_n", "num_ctx", "num_batch", "num_gpu", "main_gpu"}
_INTEGERS |= {"num_thread", "draft_num_predict"}
_FLOATS = {"temperature", "top_p", "min_p", "typical_p", "repeat_penalty", "presence_penalty", "frequency_penalty"}
_LOWEST = {"num_keep": -1, "top_k": 0, "num_predict": 0, "repeat_last_n": 0}
_INT32_MAX = 2**31 - 1
_LEVELS = ("low", "medium", "high", "max")
_EFFORTS = {"minimal": "low", "xhigh": "max"} | {level: level for level in _LEVELS}
_THINK_VALUES = '"high", "medium", "low", "max", true, or false'


def decode_options(options: Mapping[str, Any] | None) -> Json:
    """The samplers among `options`, under llama-server's names and within its limits.

    Raises: BadRequest for a value of the wrong type; unknown options may hold anything.
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
    """The `options` that mean what `body` says; its own `options`, if any, go before."""
    result = {theirs: body[ours] for theirs, ours in SAMPLING.items() if body.get(ours) is not None}
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
    """The field that asks for JSON: `response_format`, or `json_schema` where a text is to be continued."""
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


def encode_format(body: Mapping[str, Any]) -> Any:
    """`format`, None if any text will do. `strict` and `name` of a schema have no place in Ollama."""
    wanted = body.get("response_format")
    wanted = wanted if isinstance(wanted, dict) else {}
    if wanted.get("type") in ("json_object", "json_schema"):
        holder = wanted.get("json_schema") if wanted["type"] == "json_schema" else wanted
        return (bare(holder.get("schema")) if isinstance(holder, dict) else None) or "json"
    schema = body.get("json_schema")
    return None if schema is None else bare(schema) or "json"


def decode_think(value: object) -> Json:
    """Whether the model shall think, and how hard, as variables of its chat template."""
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
    """`think`, None if the model may decide. Levels that Ollama has not become the nearest it has."""
    variables = body.get("chat_template_kwargs")
    variables = variables if isinstance(variables, dict) else {}
    effort = variables.get("reasoning_effort", body.get("reasoning_effort"))
    enabled = variables.get("enable_thinking")
    if enabled is False or effort == "none":
        return False
    return _EFFORTS.get(effort, True) if isinstance(effort, str) else enabled


def decode_logprobs(said: Mapping[str, Any], *, text: bool) -> Json:
    """How many alternatives to tell for each token. llama-server tells none at all for 0, so it is asked for one."""
    count = said.get("top_logprobs") or 0
    if not 0 <= count <= 20:
        raise BadRequest("top_logprobs must be between 0 and 20", param="top_logprobs")
    if not said.get("logprobs"):
        return {}
    count = max(int(count), 1)
    return {"logprobs": count} if text else {"logprobs": True, "top_logprobs": count}


def encode_logprobs(body: Mapping[str, Any]) -> Json:
    """`logprobs` and `top_logprobs`; a text request of OpenAI's has the number in the former."""
    wanted, count = body.get("logprobs"), body.get("top_logprobs")
    if isinstance(wanted, int) and not isinstance(wanted, bool):
        wanted, count = True, wanted
    if not wanted:
        return {}
    return {"logprobs": True} if count is None else {"logprobs": True, "top_logprobs": count}


def _check_option(name: str, value: object) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if name in _INTEGERS and not is_number:
        wanted = "of type integer"
    elif name in _FLOATS and not is_number:
        wanted = "of type float32"
    elif name == "use_mmap" and not isinstance(value, bool):
        wanted = "of type boolean"
    elif name == "stop" and not isinstance(value, list):
        wanted = "of type array"
    elif name == "stop" and isinstance(value, list) and not all(isinstance(item, str) for item in value):
        wanted = "of an array of strings"
    else:
        return
    raise BadRequest(f'option "{name}" must be {wanted}', param="options")


def _limited(name: str, value: Any) -> Any:
    """The value as llama-server takes it; it refuses some numbers that mean something to Ollama."""
    if name not in _INTEGERS:
        return value
    value = int(value)
    if name == "seed":
        return value
    if name == "repeat_last_n" and value < 0:
        return WHOLE_CONTEXT
    return max(_LOWEST[name], min(value, _INT32_MAX))
