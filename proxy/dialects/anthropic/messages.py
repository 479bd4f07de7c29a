"""The messages of an Anthropic request as OpenAI messages, and back.

| Anthropic | OpenAI |
|---|---|
| `system` | a first message of role `system` |
| message of role `system` | the same; it keeps `role`, so that it does not become `system` |
| text, image block; document block with plain text | text, image_url part (base64: a data URI); text part |
| thinking blocks | `reasoning_content`, all of them joined; the message keeps them |
| tool_use block | an entry of `tool_calls` |
| tool_result block | a message of role `tool`; what comes before and after it become messages of their own |

A message keeps its further fields and, under `content`, what its content does not say: for an assistant the order of
its blocks, for a tool result its further fields, for a system prompt the original.
Source: the Anthropic API reference; `server_chat_convert_anthropic_to_oai` in llama.cpp tools/server, b11434.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

from llama_smart_proxy.proxy.chat import Json, keep
from llama_smart_proxy.proxy.dialects.anthropic.blocks import (
    decode_call,
    decode_part,
    decode_text,
    encode_call,
    encode_part,
    steady,
    steady_part,
    unsteady,
)
from llama_smart_proxy.proxy.dialects.anthropic.shape import NAME, aside, check, need, set_aside, type_of, without
from llama_smart_proxy.proxy.errors import BadRequest

_PART, _CALL = "part", "call"
"""In the kept order of an assistant's blocks: the next part of the content, the next tool call. A thinking block stands
for itself."""
_CONTINUES: Json = {"role": None}
"""Kept by a message that is of the same Anthropic message as the one before it."""


# -- to OpenAI's shape -------------------------------------------------------------------------------------------------


def decode_system(system: Any) -> Json:
    """The message that the field `system` becomes. Raises: BadRequest."""
    if isinstance(system, str):
        text = steady(system)
        return keep({"role": "system", "content": text}, NAME, {"content": system} if text != system else {})
    blocks = enumerate(check(system, list, "system"))
    return {"role": "system", "content": [steady_part(decode_text(block, f"system.{at}")) for at, block in blocks]}


def decode_messages(messages: list[Any]) -> list[Json]:
    """The messages that these become: one each, or more where there are tool results. Raises: BadRequest."""
    if not messages:
        raise BadRequest("messages: at least one message is required")
    return [made for at, message in enumerate(messages) for made in _decode(message, f"messages.{at}")]


def _decode(message: Any, path: str) -> list[Json]:
    role = need(check(message, dict, path), "role", str, path)
    if role not in _BLOCKS:
        raise BadRequest(f"{path}.role: Input should be 'user', 'assistant' or 'system'")
    if isinstance(message.get("content"), str):
        made = [{"role": role, "content": message["content"]}]
    else:
        made = _BLOCKS[role](need(message, "content", list, path), f"{path}.content")
    set_aside(made[0], without(message, "content", *([] if role == "system" else ["role"])))
    for further in made[1:]:
        set_aside(further, _CONTINUES)
    return made


def _system(blocks: list[Any], path: str) -> list[Json]:
    return [{"role": "system", "content": [decode_text(block, f"{path}.{at}") for at, block in enumerate(blocks)]}]


def _user(blocks: list[Any], path: str) -> list[Json]:
    made: list[Json] = []
    for at, block in enumerate(blocks):
        where = f"{path}.{at}"
        if type_of(block, where) == "tool_result":
            made.append(_tool_message(block, where))
            continue
        if not made or made[-1]["role"] != "user":
            made.append({"role": "user", "content": []})
        made[-1]["content"].append(decode_part(block, where))
    return made or [{"role": "user", "content": []}]


def _tool_message(block: Json, path: str) -> Json:
    """An empty `content` means nothing: which one it was, or none, is set aside."""
    content = block.get("content")
    told: str | list[Json] = ""
    if isinstance(content, list):
        told = [decode_part(part, f"{path}.content.{at}") for at, part in enumerate(content)] or ""
    elif content is not None:
        told = check(content, str, f"{path}.content")
    message = {"role": "tool", "tool_call_id": need(block, "tool_use_id", str, path), "content": told}
    left = without(block, "type", "tool_use_id", *(["content"] if told else []))
    return keep(message, NAME, {"content": left} if left else {})


def _assistant(blocks: list[Any], path: str) -> list[Json]:
    parts, calls, thoughts = list[Json](), list[Json](), list[str]()
    order = list[Json | str]()
    for at, block in enumerate(blocks):
        where = f"{path}.{at}"
        match type_of(block, where):
            case "thinking":
                thoughts.append(need(block, "thinking", str, where))
                order.append(block)
            case "redacted_thinking":
                order.append(block)
            case "tool_use":
                calls.append(decode_call(block, where))
                order.append(_CALL)
            case _:
                parts.append(decode_part(block, where))
                order.append(_PART)
    message: Json = {"role": "assistant", "content": parts if parts or not blocks else ""}
    if reasoning := "".join(thoughts):
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    for usual in (_CALL, _PART):  # parts, then calls, needs no telling
        while order and order[-1] == usual:
            order.pop()
    return [keep(message, NAME, {"content": order} if order else {})]


_BLOCKS = {"system": _system, "user": _user, "assistant": _assistant}


# -- and back ----------------------------------------------------------------------------------------------------------


def encode_messages(messages: list[Json]) -> Json:
    """`messages` of the Anthropic request, and `system` if system messages stand first that do not keep their role."""
    system: list[str | list[Json]] = []
    made: list[Json] = []
    for message in messages:
        left = aside(message)
        if message["role"] == "system" and not made and "role" not in left:
            content = _content(message)
            system.append(unsteady(content, left.get("content")) if isinstance(content, str) else content)
        else:
            _append(made, message, left)
    if not system:
        return {"messages": made}
    joined = [block for content in system for block in _as_blocks(content)]
    return {"system": system[0] if len(system) == 1 else joined, "messages": made}


def _append(made: list[Json], message: Json, left: Json) -> None:
    role, mine = message["role"], left.pop("content", None)
    continues = "role" in left and left.pop("role") is None
    content: str | list[Json]
    if role == "tool":
        role, content = "user", [_tool_result(message, mine or {})]
    elif role == "assistant":
        content = _assistant_content(message, mine or [])
    else:
        content = _content(message)
    if continues and made and made[-1]["role"] == role:
        made[-1]["content"] = [*_as_blocks(made[-1]["content"]), *_as_blocks(content)]
    else:
        made.append({**left, "role": role, "content": content})


def _content(message: Json) -> str | list[Json]:
    content = message.get("content")
    if isinstance(content, list):
        return [encode_part(part) for part in content]
    return str(content or "")


def _as_blocks(content: str | list[Json]) -> list[Json]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return content


def _tool_result(message: Json, left: Json) -> Json:
    content = _content(message)
    made = {"type": "tool_result", "tool_use_id": message["tool_call_id"]} | ({"content": content} if content else {})
    return {**left, **made}


def _assistant_content(message: Json, order: list[Json | str]) -> str | list[Json]:
    content = _content(message)
    reasoning = message.get("reasoning_content") or ""
    calls = message.get("tool_calls") or []
    if isinstance(content, str) and not (order or reasoning or calls):
        return content
    thoughts = (entry["thinking"] for entry in order if isinstance(entry, dict) and entry["type"] == "thinking")
    if reasoning != "".join(thoughts):
        order = _rethought(order, reasoning)
    parts, uses = iter(_as_blocks(content)), (encode_call(call) for call in calls)
    blocks: list[Json] = []
    for entry in order:
        blocks.extend([entry] if isinstance(entry, dict) else islice(parts if entry == _PART else uses, 1))
    return [*blocks, *parts, *uses]


def _rethought(order: list[Json | str], reasoning: str) -> list[Json | str]:
    """The order with `reasoning` in the place of the first thinking block, and no other."""
    made: list[Json | str] = []
    for entry in order:
        if not isinstance(entry, dict) or entry["type"] != "thinking":
            made.append(entry)
        elif reasoning:
            made.append({**entry, "thinking": reasoning})
            reasoning = ""
    return [{"type": "thinking", "thinking": reasoning, "signature": ""}, *made] if reasoning else made
