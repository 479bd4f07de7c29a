"""An Anthropic Messages request in OpenAI's shape, and back.

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

All else is set aside. So is what is null or empty, and `thinking` of other types (`adaptive`): they leave it to the
model. Messages: `proxy.dialects.anthropic_messages`.
Source: the Anthropic API reference and its Python package 2.12; llama.cpp tools/server, b11434.
"""

from __future__ import annotations

from typing import Any

from llama_smart_proxy.proxy.chat import ChatRequest, Json, keep
from llama_smart_proxy.proxy.dialects.anthropic.messages import decode_messages, decode_system, encode_messages
from llama_smart_proxy.proxy.dialects.anthropic.shape import NAME, aside, check, need, type_of, without
from llama_smart_proxy.proxy.errors import BadRequest

_SAME = ("model", "max_tokens", "temperature", "top_p", "top_k", "stream", "chat_template_kwargs")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_CHOICES_BACK = {theirs: ours for ours, theirs in _CHOICES.items()}


def decode(body: Json) -> ChatRequest:
    """The request that a body of `POST /v1/messages` makes. Raises: BadRequest."""
    if need(body, "max_tokens", int) < 0:
        raise BadRequest("max_tokens: Input should be greater than or equal to 0")
    stream = body.get("stream")
    if stream is not None:
        check(stream, bool, "stream")
    left = dict(body)
    made: Json = {key: left.pop(key) for key in _SAME if key in left}
    made["messages"] = [decode_system(left.pop("system"))] if left.get("system") else []
    made["messages"] += decode_messages(need(body, "messages", list))
    del left["messages"]
    if left.get("stop_sequences"):
        made["stop"] = check(left.pop("stop_sequences"), list, "stop_sequences")
    if left.get("tools"):
        tools = check(left.pop("tools"), list, "tools")
        made["tools"] = [_tool(tool, f"tools.{number}") for number, tool in enumerate(tools)]
    for take in (_take_tool_choice, _take_thinking, _take_format, _take_user):
        take(left, made)
    return ChatRequest(keep(made, NAME, left), stream is True)


def encode(request: ChatRequest) -> Json:
    """The body that `decode` would make `request` of. OpenAI fields that are not in the table have no place in it."""
    body = request.body
    made = aside(body)
    made |= {key: body[key] for key in _SAME if key in body}
    if bool(made.get("stream")) != request.stream:
        made["stream"] = request.stream
    made |= encode_messages(body["messages"])
    if "stop" in body:
        made["stop_sequences"] = [body["stop"]] if isinstance(body["stop"], str) else body["stop"]
    if "tools" in body:
        made["tools"] = [_tool_back(tool) for tool in body["tools"]]
    for give in (_give_tool_choice, _give_thinking, _give_format, _give_user):
        give(body, made)
    return made


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
    return keep({"type": "function", "function": function}, NAME, without(tool, *moved))


def _tool_back(tool: Json) -> Json:
    function = tool["function"]
    made = {"name": function["name"], "input_schema": function.get("parameters", {"type": "object"})}
    if "description" in function:
        made["description"] = function["description"]
    return {**aside(tool), **made}


def _take_tool_choice(left: Json, made: Json) -> None:
    if left.get("tool_choice") is None:
        return
    choice = left.pop("tool_choice")
    kind = type_of(choice, "tool_choice")
    moved = ["type"]
    if kind == "tool":
        moved.append("name")
        made["tool_choice"] = {"type": "function", "function": {"name": need(choice, "name", str, "tool_choice")}}
    elif kind in _CHOICES:
        made["tool_choice"] = _CHOICES[kind]
    else:
        expected = "'auto', 'any', 'tool', 'none'"
        raise BadRequest(f"tool_choice: Input tag {kind!r} does not match any of the expected tags: {expected}")
    if isinstance(choice.get("disable_parallel_tool_use"), bool):
        moved.append("disable_parallel_tool_use")
        made["parallel_tool_calls"] = not choice["disable_parallel_tool_use"]
    left |= {"tool_choice": rest} if (rest := without(choice, *moved)) else {}


def _give_tool_choice(body: Json, made: Json) -> None:
    choice, parallel = body.get("tool_choice"), body.get("parallel_tool_calls")
    left = made.pop("tool_choice") if made.get("tool_choice") else {}
    if choice is None and parallel is None:
        return
    if isinstance(choice, dict):
        left |= {"type": "tool", "name": choice["function"]["name"]}
    else:
        left["type"] = _CHOICES_BACK.get(choice or "auto", "auto")
    if parallel is not None:
        left["disable_parallel_tool_use"] = not parallel
    made["tool_choice"] = left


def _take_thinking(left: Json, made: Json) -> None:
    """What is kept of `thinking` has no `type` once that has moved."""
    if left.get("thinking") is None:
        return
    kind = type_of(left["thinking"], "thinking")
    if kind not in ("enabled", "disabled") or "chat_template_kwargs" in made:
        return
    left["thinking"] = rest = without(left["thinking"], "type")
    made["chat_template_kwargs"] = {"enable_thinking": kind == "enabled"}
    if kind == "enabled" and rest.get("budget_tokens") is not None:
        made["thinking_budget_tokens"] = check(rest.pop("budget_tokens"), int, "thinking.budget_tokens")


def _give_thinking(body: Json, made: Json) -> None:
    left = made.get("thinking")
    if not isinstance(left, dict) or "type" in left:
        return
    others = dict(made.pop("chat_template_kwargs", None) or {})
    enabled = others.pop("enable_thinking", None)
    if others:
        made["chat_template_kwargs"] = others
    del made["thinking"]
    if enabled is not None:
        budget = {"budget_tokens": body["thinking_budget_tokens"]} if "thinking_budget_tokens" in body else {}
        made["thinking"] = {**left, "type": "enabled" if enabled else "disabled", **budget}


def _take_format(left: Json, made: Json) -> None:
    config = left.get("output_config") or {}
    wanted = check(config, dict, "output_config").get("format")
    if wanted is None:
        return
    where = "output_config.format"
    if type_of(wanted, where) != "json_schema":
        raise BadRequest(f"{where}.type: Input should be 'json_schema'")
    schema = {"name": "response", "schema": need(wanted, "schema", dict, where)}
    rest = without(wanted, "type", "schema")
    made["response_format"] = keep({"type": "json_schema", "json_schema": schema}, NAME, rest)
    left["output_config"] = without(config, "format")


def _give_format(body: Json, made: Json) -> None:
    wanted = body.get("response_format") or {}
    if wanted.get("type") == "json_schema":
        told = {**aside(wanted), "type": "json_schema", "schema": wanted["json_schema"]["schema"]}
        made["output_config"] = {**(made.get("output_config") or {}), "format": told}


def _take_user(left: Json, made: Json) -> None:
    metadata = check(left.get("metadata") or {}, dict, "metadata")
    if metadata.get("user_id") is None:
        return
    made["user"] = need(metadata, "user_id", str, "metadata")
    left["metadata"] = without(metadata, "user_id")


def _give_user(body: Json, made: Json) -> None:
    if "user" in body:
        made["metadata"] = {**(made.get("metadata") or {}), "user_id": body["user"]}
