"""Converts an Anthropic Messages request to OpenAI's shape, and back.

| Anthropic | OpenAI |
|---|---|
| `model max_tokens temperature top_p top_k stream`, and llama-server's `chat_template_kwargs` | the same |
| `stop_sequences` | `stop` |
| `tools[]` `name description input_schema` | `tools[].function` `name description parameters` |
| `tool_choice` auto, any, tool, none | `tool_choice` auto, required, {function}, none |
| `tool_choice.disable_parallel_tool_use` | `parallel_tool_calls`, the opposite |
| `thinking` enabled, disabled | `chat_template_kwargs.enable_thinking`, unless the client sets those itself |
| `thinking.budget_tokens` | `thinking_budget_tokens` (llama-server's) |
| `output_config.format` | `response_format` |
| `metadata.user_id` | `user` |

Everything else becomes extensions; so do null and empty values, and `thinking` of other types (`adaptive`), for which
the model decides; and so does what OpenAI's API cannot express, with the reason. Tools of other types are the extension
`tools`: pairs of position and tool. Messages: `proxy.dialects.anthropic.messages`.
Source: the Anthropic API reference and its Python package 2.12; llama.cpp tools/server, b11434.
"""

from __future__ import annotations

from typing import Any

from llama_smart_proxy.proxy.chat import EXTENSIONS, ChatRequest, Json, attach, is_kept, kept
from llama_smart_proxy.proxy.dialects.anthropic.messages import decode_messages, decode_system, encode_messages
from llama_smart_proxy.proxy.dialects.anthropic.shape import (
    NAME,
    anthropic_extensions,
    check,
    need,
    type_of,
    without,
)
from llama_smart_proxy.proxy.errors import BadRequest

_SAME = ("model", "max_tokens", "temperature", "top_p", "top_k", "stream", "chat_template_kwargs")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_CHOICES_BACK = {openai: anthropic for anthropic, openai in _CHOICES.items()}


def decode(body: Json) -> ChatRequest:
    """Convert a body of `POST /v1/messages`; what cannot be converted is kept (`proxy.chat.extensions`).

    Raises: BadRequest if `messages` or `stream` make no sense.
    """
    stream = body.get("stream")
    if stream is not None:
        check(stream, bool, "stream")
    remaining, problem = dict(body), None
    result: Json = {key: remaining.pop(key) for key in _SAME if key in remaining}
    result["messages"] = decode_messages(need(body, "messages", list))
    del remaining["messages"]
    for convert in _CONVERSIONS:
        before = dict(remaining), dict(result)
        try:
            convert(remaining, result)
        except BadRequest as exc:
            (remaining, result), problem = before, problem or exc
    return ChatRequest(attach(result, NAME, remaining, problem), stream is True)


def encode(request: ChatRequest) -> Json:
    """The inverse of `decode`. OpenAI fields that are not in the table are dropped."""
    body = request.body
    result = anthropic_extensions(body)
    result |= {key: body[key] for key in _SAME if key in body}
    if bool(result.get("stream")) != request.stream:
        result["stream"] = request.stream
    result |= encode_messages(body["messages"])
    if "stop" in body:
        result["stop_sequences"] = [body["stop"]] if isinstance(body["stop"], str) else body["stop"]
    _encode_tools(body, result)
    for convert in (_encode_tool_choice, _encode_thinking, _encode_format, _encode_user):
        convert(body, result)
    return result


def _check_limit(remaining: Json, result: Json) -> None:
    if need(result, "max_tokens", int) < 0:
        raise BadRequest("max_tokens: Input should be greater than or equal to 0")


def _decode_system(remaining: Json, result: Json) -> None:
    if remaining.get("system"):
        result["messages"] = [decode_system(remaining.pop("system")), *result["messages"]]


def _decode_stop(remaining: Json, result: Json) -> None:
    if remaining.get("stop_sequences"):
        result["stop"] = check(remaining.pop("stop_sequences"), list, "stop_sequences")


def _decode_tools(remaining: Json, result: Json) -> None:
    if not remaining.get("tools"):
        return
    given = enumerate(check(remaining.pop("tools"), list, "tools"))
    tools = [(at, _tool_or_kept(tool, f"tools.{at}")) for at, tool in given]
    result["tools"] = [tool for _, tool in tools if not is_kept(tool)]
    if others := _Others((at, tool) for at, tool in tools if is_kept(tool)):
        remaining["tools"] = others
        if len(others) == len(tools):
            del result["tools"]


def _encode_tools(body: Json, result: Json) -> None:
    others = result.pop("tools") if isinstance(result.get("tools"), _Others) else _Others()
    if "tools" not in body and not others:
        return
    tools = [_tool_back(tool) for tool in body.get("tools") or ()]
    for at, tool in others:
        tools.insert(at, without(tool, EXTENSIONS))
    result["tools"] = tools


class _Others(list[tuple[int, Json]]):
    """The tools that OpenAI's API cannot express, with their positions among all tools."""


def _tool_or_kept(tool: Any, path: str) -> Json:
    try:
        return _tool(tool, path)
    except BadRequest as exc:
        if not isinstance(tool, dict):
            raise
        return kept(tool, NAME, exc)


def _tool(tool: Any, path: str) -> Json:
    if check(tool, dict, path).get("type") not in (None, "custom"):
        kind = type_of(tool, path)
        raise BadRequest(f"{path}: tools of type {kind!r} are not available here, only those with an input_schema")
    where = f"{path}.custom"
    function: Json = {"name": need(tool, "name", str, where)}
    if tool.get("description") is not None:
        function["description"] = need(tool, "description", str, where)
    function["parameters"] = need(tool, "input_schema", dict, where)
    moved = ("name", "input_schema", *(["description"] if "description" in function else []))
    return attach({"type": "function", "function": function}, NAME, without(tool, *moved))


def _tool_back(tool: Json) -> Json:
    function = tool["function"]
    result = {"name": function["name"], "input_schema": function.get("parameters", {"type": "object"})}
    if "description" in function:
        result["description"] = function["description"]
    return {**anthropic_extensions(tool), **result}


def _decode_tool_choice(remaining: Json, result: Json) -> None:
    if remaining.get("tool_choice") is None:
        return
    choice = remaining.pop("tool_choice")
    kind = type_of(choice, "tool_choice")
    moved = ["type"]
    if kind == "tool":
        moved.append("name")
        result["tool_choice"] = {"type": "function", "function": {"name": need(choice, "name", str, "tool_choice")}}
    elif kind in _CHOICES:
        result["tool_choice"] = _CHOICES[kind]
    else:
        expected = "'auto', 'any', 'tool', 'none'"
        raise BadRequest(f"tool_choice: Input tag {kind!r} does not match any of the expected tags: {expected}")
    if isinstance(choice.get("disable_parallel_tool_use"), bool):
        moved.append("disable_parallel_tool_use")
        result["parallel_tool_calls"] = not choice["disable_parallel_tool_use"]
    remaining |= {"tool_choice": rest} if (rest := without(choice, *moved)) else {}


def _encode_tool_choice(body: Json, result: Json) -> None:
    choice, parallel = body.get("tool_choice"), body.get("parallel_tool_calls")
    given = result.get("tool_choice")
    remaining = given if isinstance(given, dict) else {}
    if choice is None and parallel is None:
        if remaining and "type" not in remaining:  # what is left of a choice that an agent has removed
            del result["tool_choice"]
        return
    if isinstance(choice, dict):
        remaining |= {"type": "tool", "name": choice["function"]["name"]}
    else:
        remaining["type"] = _CHOICES_BACK.get(choice or "auto", "auto")
    if parallel is not None:
        remaining["disable_parallel_tool_use"] = not parallel
    result["tool_choice"] = remaining


def _decode_thinking(remaining: Json, result: Json) -> None:
    """Move `type` and `budget_tokens`; the remaining `thinking` without a `type` marks that they were moved."""
    if remaining.get("thinking") is None:
        return
    kind = type_of(remaining["thinking"], "thinking")
    if kind not in ("enabled", "disabled") or "chat_template_kwargs" in result:
        return
    remaining["thinking"] = rest = without(remaining["thinking"], "type")
    result["chat_template_kwargs"] = {"enable_thinking": kind == "enabled"}
    if kind == "enabled" and rest.get("budget_tokens") is not None:
        result["thinking_budget_tokens"] = check(rest.pop("budget_tokens"), int, "thinking.budget_tokens")


def _encode_thinking(body: Json, result: Json) -> None:
    remaining = result.get("thinking")
    if not isinstance(remaining, dict) or "type" in remaining:
        return
    others = dict(result.pop("chat_template_kwargs", None) or {})
    enabled = others.pop("enable_thinking", None)
    if others:
        result["chat_template_kwargs"] = others
    del result["thinking"]
    if enabled is not None:
        budget = {"budget_tokens": body["thinking_budget_tokens"]} if "thinking_budget_tokens" in body else {}
        result["thinking"] = {**remaining, "type": "enabled" if enabled else "disabled", **budget}


def _decode_format(remaining: Json, result: Json) -> None:
    config = remaining.get("output_config") or {}
    output_format = check(config, dict, "output_config").get("format")
    if output_format is None:
        return
    where = "output_config.format"
    if type_of(output_format, where) != "json_schema":
        raise BadRequest(f"{where}.type: Input should be 'json_schema'")
    schema = {"name": "response", "schema": need(output_format, "schema", dict, where)}
    rest = without(output_format, "type", "schema")
    result["response_format"] = attach({"type": "json_schema", "json_schema": schema}, NAME, rest)
    remaining["output_config"] = without(config, "format")


def _encode_format(body: Json, result: Json) -> None:
    response_format = body.get("response_format") or {}
    if response_format.get("type") == "json_schema":
        output_format = {
            **anthropic_extensions(response_format),
            "type": "json_schema",
            "schema": response_format["json_schema"]["schema"],
        }
        result["output_config"] = {**(result.get("output_config") or {}), "format": output_format}


def _decode_user(remaining: Json, result: Json) -> None:
    metadata = check(remaining.get("metadata") or {}, dict, "metadata")
    if metadata.get("user_id") is None:
        return
    result["user"] = need(metadata, "user_id", str, "metadata")
    remaining["metadata"] = without(metadata, "user_id")


def _encode_user(body: Json, result: Json) -> None:
    if "user" in body:
        result["metadata"] = {**(result.get("metadata") or {}), "user_id": body["user"]}


_CONVERSIONS = (
    _check_limit,
    _decode_system,
    _decode_stop,
    _decode_tools,
    _decode_tool_choice,
    _decode_thinking,
    _decode_format,
    _decode_user,
)
