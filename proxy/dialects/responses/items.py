"""Converts the `input` of a Responses request to OpenAI messages.

| Responses | OpenAI chat |
|---|---|
| a string | a message of role `user` |
| message item, with or without `type` | a message; role `developer` becomes `system` |
| `reasoning` | `reasoning_content` of the assistant's next message |
| `function_call`, `custom_tool_call` | an entry of `tool_calls` |
| their `_output` | a message of role `tool` |

Adjacent items of the assistant are one message, as the model wrote them in one turn. Leading instructions are one
message, as many chat templates accept no more. Items of other types are set aside; references to stored items are
refused. Source: the OpenAI API reference, and openai-python 3.57.
"""

from __future__ import annotations

from typing import Any

import orjson

from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.dialects.responses.parts import decode_content, decode_result, decode_texts
from llama_smart_proxy.proxy.dialects.responses.shape import check, invalid, need, unstored
from llama_smart_proxy.proxy.dialects.responses.tools import custom_arguments, function_name
from llama_smart_proxy.proxy.errors import BadRequest

_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}


def decode_input(given: Any, instructions: str | None, aside: list[Json]) -> list[Json]:
    """The messages of `input`, after `instructions`; items and parts of unknown types are appended to `aside`.

    Raises: BadRequest.
    """
    messages: list[Json] = [{"role": "system", "content": instructions}] if instructions else []
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    for at, item in enumerate(check(given, list, "input")):
        path = f"input[{at}]"
        _add(messages, check(item, dict, path), path, aside)
    if not messages:
        raise BadRequest("'input' must contain at least one message.", param="input")
    for message in messages:
        if "reasoning_content" in message:
            message["reasoning_content"] = "".join(message["reasoning_content"])
    return _with_one_beginning(messages)


def _add(messages: list[Json], item: Json, path: str, aside: list[Json]) -> None:
    kind = item.get("type")
    if kind is None and "role" in item:
        kind = "message"
    match kind if kind is not None else need(item, "type", str, path):
        case "message":
            _add_message(messages, item, path, aside)
        case "reasoning":
            thoughts = decode_texts(item.get("content"), f"{path}.content")
            thoughts = thoughts or decode_texts(item.get("summary"), f"{path}.summary")
            if thoughts:
                turn = _turn(messages, ends_at=("content", "tool_calls"))
                turn.setdefault("reasoning_content", []).append(thoughts)  # joined at the end, in linear time
        case "function_call":
            _add_call(messages, item, path, _as_text(item.get("arguments")))
        case "custom_tool_call":
            _add_call(messages, item, path, custom_arguments(_as_text(item.get("input"))))
        case "function_call_output" | "custom_tool_call_output":
            content = decode_result(item.get("output"), f"{path}.output", aside)
            messages.append({"role": "tool", "tool_call_id": need(item, "call_id", str, path), "content": content})
        case "item_reference":
            advice = "no items are stored here; send the items themselves, as clients do with 'store': false"
            raise unstored("item_reference", advice, path=path)
        case _:
            aside.append(item)


def _add_message(messages: list[Json], item: Json, path: str, aside: list[Json]) -> None:
    given = need(item, "role", str, path)
    if given not in _ROLES:
        raise invalid(given, f"{path}.role", *_ROLES)
    role, content = _ROLES[given], decode_content(item.get("content"), f"{path}.content", aside)
    if role != "assistant":
        messages.append({"role": role, "content": content})
        return
    # a text after calls precedes their results, and these must follow the message with the calls
    turn = _turn(messages, ends_at=() if messages and messages[-1].get("tool_calls") else ("content",))
    if not turn.get("content"):
        turn["content"] = content
        return
    if isinstance(turn["content"], str):
        turn["content"] = _as_parts(turn["content"])
    turn["content"] += _as_parts(content)  # in place: there may be many


def _add_call(messages: list[Json], item: Json, path: str, arguments: str) -> None:
    name = function_name(need(item, "name", str, path), item.get("namespace"))
    call_id = need(item, "call_id", str, path)
    call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
    _turn(messages).setdefault("tool_calls", []).append(call)


def _turn(messages: list[Json], ends_at: tuple[str, ...] = ()) -> Json:
    """The assistant's message that the next item belongs to: the last one, unless it has a field of `ends_at`."""
    last = messages[-1] if messages else {}
    if last.get("role") != "assistant" or any(last.get(field) for field in ends_at):
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _as_text(value: Any) -> str:
    """A text; the JSON of anything else, as some clients send arguments as an object.
    Raises: BadRequest."""
    if isinstance(value, str):
        return value
    try:
        return "" if value is None else orjson.dumps(value).decode()
    except TypeError as exc:  # orjson.JSONEncodeError
        raise BadRequest(f"The arguments of a call cannot be passed on: {exc}", param="input") from None


def _as_parts(content: str | list[Json]) -> list[Json]:
    return [{"type": "text", "text": content}] if isinstance(content, str) and content else list(content or ())


def _with_one_beginning(messages: list[Json]) -> list[Json]:
    """`messages` with the leading ones of role `system` joined."""
    count = next((at for at, message in enumerate(messages) if message["role"] != "system"), len(messages))
    if count < 2:
        return messages
    parts = [part for message in messages[:count] for part in _as_parts(message["content"])]
    plain = all(part["type"] == "text" for part in parts)
    content = "\n\n".join(part["text"] for part in parts) if plain else parts
    return [{"role": "system", "content": content}, *messages[count:]]
