"""Converts a Responses request to OpenAI's chat shape.

| Responses | OpenAI chat |
|---|---|
| `model temperature top_p stream user parallel_tool_calls` | the same |
| `input`, `instructions` | `messages`: `proxy.dialects.responses.items` |
| `tools`, `tool_choice` | the same: `proxy.dialects.responses.tools` |
| `max_output_tokens` | `max_tokens` |
| `text.format` | `response_format` |
| `reasoning.effort` | `reasoning_effort` |
| `top_logprobs`, `include` of `message.output_text.logprobs` | `logprobs`, `top_logprobs` |

The other fields of the Responses API become extensions, which the answer repeats. Fields that neither API has, such as
a server's samplers, are unchanged. Nothing is stored: what refers to stored data is refused.
Source: the OpenAI API reference, and openai-python 3.57.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from llama_smart_proxy.proxy.chat import ChatRequest, Json, attach, extensions_of
from llama_smart_proxy.proxy.dialects.responses.items import decode_input
from llama_smart_proxy.proxy.dialects.responses.shape import NAME, check, invalid, need, unstored
from llama_smart_proxy.proxy.dialects.responses.tools import chosen, offered
from llama_smart_proxy.proxy.errors import BadRequest

_SAME = ("model", "temperature", "top_p", "stream", "user")
_OWN = frozenset(
    {
        *("access_programs", "background", "background_options", "client_metadata", "context_management"),
        *("conversation", "image"),
        *("include", "input", "instructions", "max_output_tokens", "max_tool_calls", "metadata", "moderation"),
        *("parallel_tool_calls", "previous_response_id", "prompt", "prompt_cache_key", "prompt_cache_options"),
        *("prompt_cache_retention", "reasoning", "safety_identifier", "service_tier", "store", "stream_options"),
        *("text", "tool_choice", "tools", "top_logprobs", "truncation", *_SAME),
        *("messages", "n", "function_call", "functions"),  # of the chat API, where they mean what others do here
    }
)
_FORMATS = ("text", "json_schema", "json_object")
_LOGPROBS = "message.output_text.logprobs"
_RESEND = "no responses are stored here; send the whole conversation in 'input'"


def decode(body: Json) -> ChatRequest:
    """Convert a body of `POST /v1/responses`. Raises: BadRequest."""
    _check_nothing_stored(body)
    result = {key: value for key, value in body.items() if key not in _OWN}
    result |= {key: body[key] for key in _SAME if body.get(key) is not None}
    aside: list[Json] = []
    instructions = check(body["instructions"], str, "instructions") if body.get("instructions") is not None else None
    given = need(body, "input", str) if body.get("input") is None else body["input"]
    result["messages"] = decode_input(given, instructions, aside)
    for convert in (_decode_tools, _decode_limit, _decode_format, _decode_reasoning, _decode_logprobs):
        convert(body, result)
    extensions = {key: value for key, value in body.items() if key in _OWN and key != "input"}
    _check_repeatable(extensions)
    attach(result, NAME, extensions | ({"input": aside} if aside else {}))
    streams = check(body["stream"], bool, "stream") if body.get("stream") is not None else False
    return ChatRequest(result, streams)


def _check_repeatable(fields: Json) -> None:
    """Raises: BadRequest for fields that an event of the answer, which has them two levels deep, could not repeat."""
    try:
        orjson.dumps([[fields]])
    except TypeError as exc:  # orjson.JSONEncodeError
        raise BadRequest(f"the answer could not repeat the fields of the request: {exc}") from None


def fields_of(request: ChatRequest) -> Mapping[str, Any]:
    """The fields of the client's body that the answer repeats."""
    return extensions_of(request.body, NAME)


def wants_summary(fields: Mapping[str, Any]) -> bool:
    """Whether the client requested reasoning as a summary instead of in full."""
    reasoning = fields.get("reasoning")
    return isinstance(reasoning, dict) and bool(reasoning.get("summary") or reasoning.get("generate_summary"))


def _check_nothing_stored(body: Json) -> None:
    """Raises: BadRequest for a field that refers to stored data."""
    if body.get("previous_response_id") is not None:
        raise unstored("previous_response_id", _RESEND, code="previous_response_not_found")
    if body.get("conversation") is not None:
        raise unstored("conversation", _RESEND)
    if body.get("prompt") is not None:
        raise unstored("prompt", "no prompts are stored here; send the text in 'instructions' and 'input'")
    if body.get("background"):
        raise unstored("background", "no responses are stored here; set it to false, and wait for the answer")


def _decode_tools(body: Json, result: Json) -> None:
    functions, choice = chosen(body.get("tool_choice"), offered(body.get("tools")))
    if not functions:
        return
    result["tools"] = functions
    if choice is not None:
        result["tool_choice"] = choice
    if body.get("parallel_tool_calls") is not None:
        result["parallel_tool_calls"] = body["parallel_tool_calls"]


def _decode_limit(body: Json, result: Json) -> None:
    if body.get("max_output_tokens") is not None:
        result["max_tokens"] = check(body["max_output_tokens"], int, "max_output_tokens")


def _decode_format(body: Json, result: Json) -> None:
    form = check(body.get("text") or {}, dict, "text").get("format")
    if form is None:
        return
    kind = need(check(form, dict, "text.format"), "type", str, "text.format")
    if kind not in _FORMATS:
        raise invalid(kind, "text.format.type", *_FORMATS)
    if kind == "json_object":
        result["response_format"] = {"type": kind}
    elif kind == "json_schema":
        schema = {"name": form.get("name") or "response", "schema": need(form, "schema", dict, "text.format")}
        schema |= {key: form[key] for key in ("description", "strict") if form.get(key) is not None}
        result["response_format"] = {"type": kind, "json_schema": schema}


def _decode_reasoning(body: Json, result: Json) -> None:
    effort = check(body.get("reasoning") or {}, dict, "reasoning").get("effort")
    if effort is not None:
        result["reasoning_effort"] = check(effort, str, "reasoning.effort")


def _decode_logprobs(body: Json, result: Json) -> None:
    """For 0 alternatives llama-server sends no logprobs at all, so at least one is requested."""
    count = check(body.get("top_logprobs") or 0, int, "top_logprobs")
    if count or _LOGPROBS in check(body.get("include") or [], list, "include"):
        result |= {"logprobs": True, "top_logprobs": max(count, 1)}
