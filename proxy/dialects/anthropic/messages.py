"""Converts the messages of an Anthropic request to OpenAI messages, and back.

| Anthropic | OpenAI |
|---|---|
| `system` | a first message of role `system` |
| message of role `system` | the same, with the extension `role`, so that it does not become the field `system` |
| text, image block; document block with plain text | text, image_url part (base64: a data URI); text part |
| thinking blocks | `reasoning_content`, all of them joined; the blocks are in the extension `content` |
| tool_use block | an entry of `tool_calls` |
| tool_result block | a message of role `tool`; the blocks before and after it become separate messages |
| other blocks, and messages of other roles | kept in their own form |

Further fields of a message are its extensions. Its extension `content` is, for an assistant, the order of its blocks;
for a tool result its further fields; for a system prompt the original text.
Source: the Anthropic API reference; `server_chat_convert_anthropic_to_oai` in llama.cpp tools/server, b11434.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

from llama_smart_proxy.proxy.chat import EXTENSIONS, Json, attach, is_kept, kept
from llama_smart_proxy.proxy.dialects.anthropic.blocks import (
    decode_call,
    decode_part,
    decode_text,
    encode_call,
    encode_part,
    normalize_billing_header,
    normalize_part,
    restore_billing_header,
)
from llama_smart_proxy.proxy.dialects.anthropic.shape import (
    NAME,
    add_extensions,
    anthropic_extensions,
    check,
    keeping,
    need,
    type_of,
    without,
)
from llama_smart_proxy.proxy.dialects.base import TextPlace
from llama_smart_proxy.proxy.errors import BadRequest

_PART, _CALL = "part", "call"
"""Entries in the order of an assistant's blocks: the next part of the content, the next tool call. A thinking block is
an entry itself."""
_CONTINUES: Json = {"role": None}
"""Extension of a message that belongs to the same Anthropic message as the one before it."""


# -- to OpenAI's shape -------------------------------------------------------------------------------------------------


def decode_system(system: Any) -> Json:
    """Convert the field `system` to a message. Raises: BadRequest."""
    if isinstance(system, str):
        text = normalize_billing_header(system)
        return attach({"role": "system", "content": text}, NAME, {"content": system} if text != system else {})
    blocks = enumerate(check(system, list, "system"))
    parts = [keeping(decode_text, block, f"system.{at}") for at, block in blocks]
    return {"role": "system", "content": [part if is_kept(part) else normalize_part(part) for part in parts]}


def decode_messages(messages: list[Any]) -> list[Json]:
    """Convert messages: to one each, or to several if they contain tool results. Raises: BadRequest."""
    if not messages:
        raise BadRequest("messages: at least one message is required")
    return [decoded for at, message in enumerate(messages) for decoded in _decode_or_keep(message, f"messages.{at}")]


def _decode_or_keep(message: Any, path: str) -> list[Json]:
    try:
        return _decode(message, path)
    except BadRequest as exc:
        known = not isinstance(message, dict) or message.get("role") in (None, *_BLOCKS)
        if known or not isinstance(message["role"], str):
            raise
        return [kept(message, NAME, exc)]


def _decode(message: Any, path: str) -> list[Json]:
    role = need(check(message, dict, path), "role", str, path)
    if role not in _BLOCKS:
        raise BadRequest(f"{path}.role: Input should be 'user', 'assistant' or 'system'")
    if isinstance(message.get("content"), str):
        result = [{"role": role, "content": message["content"]}]
    else:
        result = _BLOCKS[role](need(message, "content", list, path), f"{path}.content")
    add_extensions(result[0], without(message, "content", *([] if role == "system" else ["role"])))
    for further in result[1:]:
        add_extensions(further, _CONTINUES)
    return result


def _system(blocks: list[Any], path: str) -> list[Json]:
    parts = [keeping(decode_text, block, f"{path}.{at}") for at, block in enumerate(blocks)]
    return [{"role": "system", "content": parts}]


def _user(blocks: list[Any], path: str) -> list[Json]:
    result: list[Json] = []
    for at, block in enumerate(blocks):
        where = f"{path}.{at}"
        is_result = type_of(block, where) == "tool_result"
        decoded = keeping(_tool_message, block, where) if is_result else decode_part(block, where)
        if is_result and not is_kept(decoded):
            result.append(decoded)
            continue
        if not result or result[-1]["role"] != "user":
            result.append({"role": "user", "content": []})
        result[-1]["content"].append(decoded)
    return result or [{"role": "user", "content": []}]


def _tool_message(block: Json, path: str) -> Json:
    """Convert a tool_result block. An empty, null or missing `content` becomes `""`; the original is an extension."""
    given = block.get("content")
    content: str | list[Json] = ""
    if isinstance(given, list):
        content = [decode_part(part, f"{path}.content.{at}") for at, part in enumerate(given)] or ""
    elif given is not None:
        content = check(given, str, f"{path}.content")
    message = {"role": "tool", "tool_call_id": need(block, "tool_use_id", str, path), "content": content}
    remaining = without(block, "type", "tool_use_id", *(["content"] if content else []))
    return attach(message, NAME, {"content": remaining} if remaining else {})


def _assistant(blocks: list[Any], path: str) -> list[Json]:
    parts, calls, thoughts = list[Json](), list[Json](), list[str]()
    order = list[Json | str]()
    for at, block in enumerate(blocks):
        where = f"{path}.{at}"
        kind = type_of(block, where)
        decoded = keeping(_OF_ASSISTANT.get(kind, decode_part), block, where)
        if is_kept(decoded) or kind not in _OF_ASSISTANT:
            parts.append(decoded)
            order.append(_PART)
        elif kind == "tool_use":
            calls.append(decoded)
            order.append(_CALL)
        else:
            thoughts.append(block["thinking"] if kind == "thinking" else "")
            order.append(block)
    message: Json = {"role": "assistant", "content": parts if parts or not blocks else ""}
    if reasoning := "".join(thoughts):
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    for default in (_CALL, _PART):  # parts, then calls, is the default order, which need not be stored
        while order and order[-1] == default:
            order.pop()
    return [attach(message, NAME, {"content": order} if order else {})]


def _thinking(block: Json, path: str) -> Json:
    if block["type"] == "thinking":
        need(block, "thinking", str, path)
    return block


_OF_ASSISTANT = {"thinking": _thinking, "redacted_thinking": _thinking, "tool_use": decode_call}
_BLOCKS = {"system": _system, "user": _user, "assistant": _assistant}


def text_place(message: Any) -> TextPlace | None:
    """`ClientCodec.text_place`: the place of what would be the text of the last user message that `decode_messages`
    makes of `message`; None if that is none of the user's, such as one of tool results."""
    if not isinstance(message, dict) or message.get("role") != "user":
        return None
    blocks = message.get("content")
    if isinstance(blocks, str):
        return TextPlace(message, "content")
    if isinstance(blocks, list) and ((run := _last_run(blocks)) or not blocks):
        places = map(_place_in, run)
        return next((place for place in places if place.holder is not None), TextPlace(None, "text"))
    return None


def _last_run(blocks: list[Any]) -> list[Any]:
    """The last blocks in a row that are no tool results: these become one message."""
    end = len(blocks)
    while end and _is_result(blocks[end - 1]):
        end -= 1
    start = end
    while start and not _is_result(blocks[start - 1]):
        start -= 1
    return blocks[start:end]


def _is_result(block: Any) -> bool:
    return isinstance(block, dict) and block.get("type") == "tool_result"


def _place_in(block: Any) -> TextPlace:
    kind = block.get("type") if isinstance(block, dict) else None
    holder, key = (block, "text") if kind == "text" else (block.get("source") if kind == "document" else None, "data")
    is_text = isinstance(holder, dict) and isinstance(holder.get(key), str) and holder.get("type") == "text"
    return TextPlace(holder if is_text else None, key)


# -- and back ----------------------------------------------------------------------------------------------------------


def encode_messages(messages: list[Json]) -> Json:
    """The fields `messages` and `system`; the latter from leading system messages without the extension `role`."""
    system: list[str | list[Json]] = []
    result: list[Json] = []
    for message in messages:
        if is_kept(message):
            result.append(without(message, EXTENSIONS))
            continue
        remaining = anthropic_extensions(message)
        if message["role"] == "system" and not result and "role" not in remaining:
            content = _content(message)
            system.append(
                restore_billing_header(content, remaining.get("content")) if isinstance(content, str) else content
            )
        else:
            _append(result, message, remaining)
    if not system:
        return {"messages": result}
    joined = [block for content in system for block in _as_blocks(content)]
    return {"system": system[0] if len(system) == 1 else joined, "messages": result}


def _append(result: list[Json], message: Json, remaining: Json) -> None:
    role, original = message["role"], remaining.pop("content", None)
    continues = "role" in remaining and remaining.pop("role") is None
    content: str | list[Json]
    if role == "tool":
        role, content = "user", [_tool_result(message, original or {})]
    elif role == "assistant":
        content = _assistant_content(message, original or [])
    else:
        content = _content(message)
    if continues and result and result[-1]["role"] == role:
        result[-1]["content"] = [*_as_blocks(result[-1]["content"]), *_as_blocks(content)]
    else:
        result.append({**remaining, "role": role, "content": content})


def _content(message: Json) -> str | list[Json]:
    content = message.get("content")
    if isinstance(content, list):
        return [encode_part(part) for part in content]
    return str(content or "")


def _as_blocks(content: str | list[Json]) -> list[Json]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return content


def _tool_result(message: Json, remaining: Json) -> Json:
    content = _content(message)
    result = {"type": "tool_result", "tool_use_id": message["tool_call_id"]} | ({"content": content} if content else {})
    return {**remaining, **result}


def _assistant_content(message: Json, order: list[Json | str]) -> str | list[Json]:
    content = _content(message)
    reasoning = message.get("reasoning_content") or ""
    calls = message.get("tool_calls") or []
    if isinstance(content, str) and not (order or reasoning or calls):
        return content
    thoughts = (entry["thinking"] for entry in order if isinstance(entry, dict) and entry["type"] == "thinking")
    if reasoning != "".join(thoughts):
        order = _with_reasoning(order, reasoning)
    parts, uses = iter(_as_blocks(content)), (encode_call(call) for call in calls)
    blocks: list[Json] = []
    for entry in order:
        blocks.extend([entry] if isinstance(entry, dict) else islice(parts if entry == _PART else uses, 1))
    return [*blocks, *parts, *uses]


def _with_reasoning(order: list[Json | str], reasoning: str) -> list[Json | str]:
    """`order` with `reasoning` in place of the first thinking block, and without the others."""
    result: list[Json | str] = []
    for entry in order:
        if not isinstance(entry, dict) or entry["type"] != "thinking":
            result.append(entry)
        elif reasoning:
            result.append({**entry, "thinking": reasoning})
            reasoning = ""
    return [{"type": "thinking", "thinking": reasoning, "signature": ""}, *result] if reasoning else result
