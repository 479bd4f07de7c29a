"""The arguments of tool calls in the history of a chat."""

from __future__ import annotations

import re
from typing import Any

import orjson

from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.errors import BadRequest

_ESCAPE = re.compile(
    r"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|u([dD][89a-fA-F][0-9a-fA-F]{2})|.)", re.DOTALL
)
"""An escape in JSON; that of a lone surrogate has a group."""


def has_calls(body: Json) -> bool:
    """Whether `messages` may contain tool calls, the arguments of which take time to look through."""
    messages = body.get("messages")
    if not isinstance(messages, list):
        return False
    return any("tool_calls" in message for message in messages if isinstance(message, dict))


def mend_arguments(body: Json) -> Json:
    """Make the arguments of all tool calls in `messages` the text of a JSON object. Returns `body`, whose `messages`
    are then another list.

    Models sometimes write something else, and clients send it back with every later turn. OpenAI's API accepts any
    text there; llama-server and vLLM parse it, and would refuse the chat from then on.
    """
    if has_calls(body):
        messages = body["messages"]
        mended = [_mended(message) for message in messages]
        if any(new is not old for new, old in zip(mended, messages, strict=True)):
            body["messages"] = mended
    return body


def arguments_text(value: Any) -> str:
    """`value`, the arguments of a call, as the text of a JSON object: an empty one for none, and one that contains
    what is not an object as `arguments`. Escapes of lone surrogates, as of half an emoji, become U+FFFD.

    Raises: BadRequest for what JSON cannot represent.
    """
    if value in (None, ""):
        return "{}"
    if isinstance(value, str):
        if _is_object(value):
            return value
        whole = _ESCAPE.sub(lambda found: r"\ufffd" if found[1] else found[0], value)
        if whole != value and _is_object(whole):
            return whole
    try:
        return orjson.dumps(value if isinstance(value, dict) else {"arguments": value}).decode()
    except TypeError as exc:  # orjson.JSONEncodeError: nested too deeply
        raise BadRequest(f"the arguments of a tool call cannot be passed on: {exc}", param="messages") from None


def _is_object(text: str) -> bool:
    try:
        return isinstance(orjson.loads(text), dict)
    except orjson.JSONDecodeError:
        return False


def _mended(message: Any) -> Any:
    """`message`, or a copy with other arguments."""
    calls = message.get("tool_calls") if isinstance(message, dict) else None
    if not isinstance(calls, list):
        return message
    mended = [_mended_call(call) for call in calls]
    changed = any(new is not old for new, old in zip(mended, calls, strict=True))
    return {**message, "tool_calls": mended} if changed else message


def _mended_call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return call
    given = function.get("arguments")
    text = arguments_text(given)
    return call if text is given or text == given else {**call, "function": {**function, "arguments": text}}
