"""Converts the messages of a chat between Ollama's shape and OpenAI's.

In Ollama's, the content is one text with separate `images`, tool calls have objects as arguments and often no ids, and
a tool's result has the name of the tool. Source: Ollama's api/types.go and llm/llama_server.go.
"""

from __future__ import annotations

import binascii
import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import orjson

from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.dialects.arguments import arguments_text
from llama_smart_proxy.proxy.dialects.ollama.fields import (
    CALL_FIELDS,
    FUNCTION_FIELDS,
    MESSAGE_FIELDS,
    checked,
    mismatch,
    record_spelling,
    restore_spelling,
)
from llama_smart_proxy.proxy.errors import BadRequest

_IMAGES = {
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF8": "image/gif",
    b"BM": "image/bmp",
}
_DATA_URL = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)
_NOT_BASE64 = re.compile(r"[^A-Za-z0-9+/\r\n]")
_LINE_ENDS = str.maketrans("", "", "\r\n")


class _Waiting:
    """Calls without a result, in order. Each method takes constant time: a chat may have very many calls."""

    def __init__(self) -> None:
        self._names: OrderedDict[str, str] = OrderedDict()
        self._by_name: dict[str, OrderedDict[str, None]] = {}

    def add(self, known: str, name: str) -> None:
        self.remove(known)
        self._names[known] = name
        self._by_name.setdefault(name, OrderedDict())[known] = None

    def remove(self, known: str) -> None:
        if (name := self._names.pop(known, None)) is not None:
            del self._by_name[name][known]

    def first(self, name: str | None) -> str | None:
        """The id of the first one of that name, else of the first one."""
        return next(iter((self._by_name.get(name) if name else None) or self._names), None)


class _Calls:
    """The tool calls of a conversation so far: their ids, and which have no result yet."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._open = _Waiting()
        self._made = _Waiting()  # those among them that the client sent without an id
        self._number = 0  # all smaller ones are in use

    def add(self, given: str | None, name: str) -> str:
        """The id of the next call: `given`, or a new one that is the same whenever this conversation is sent."""
        self._number = max(self._number, len(self._names))
        while not given and made_id(self._number) in self._names:
            self._number += 1
        known = given or made_id(self._number)
        self._names[known] = name
        self._open.add(known, name)
        if not given:
            self._made.add(known, name)
        return known

    def match_result(self, given: str | None, name: str | None) -> tuple[str | None, str | None]:
        """Id and name of the call that the next result belongs to: of `given`, or of the first call without a result,
        one of that name if there is any. An id that no call has is that of a call which the client sent without."""
        if not given or given not in self._names:
            given = (self._made if given else self._open).first(name) or given
        if not given:
            return None, name
        self._open.remove(given)
        self._made.remove(given)
        return given, name or self._names.get(given)


def made_id(number: int) -> str:
    """An id of nine letters and digits: the chat templates of Mistral's models accept no other."""
    return f"call{number:05}"[-9:]


def checked_messages(sent: Sequence[object]) -> list[Json]:
    """`sent` with the names of all fields in lower case. Raises: BadRequest if one is not a message of Ollama's API."""
    return [_checked_message(item) for item in sent]


def decode_messages(sent: Sequence[Json]) -> list[Json]:
    """Convert checked messages to OpenAI's shape, without extensions; `record_message_spellings` attaches these."""
    calls = _Calls()
    return [_decode_message(item, calls) for item in sent]


def record_message_spellings(messages: Sequence[Json], sent: Sequence[Json], encoded: Sequence[Json]) -> None:
    """`record_spelling` for each of `messages` and its tool calls; `encoded` is their `encode_messages`."""
    for message, original, canonical in zip(messages, sent, encoded, strict=True):
        if message.get("tool_calls"):
            original, canonical = dict(original), dict(canonical)
            calls = zip(message["tool_calls"], original.pop("tool_calls"), canonical.pop("tool_calls"), strict=True)
            for call, original_call, canonical_call in calls:
                record_spelling(call["function"], original_call["function"], canonical_call.pop("function"))
                fields = {key: value for key, value in original_call.items() if key != "function"}
                record_spelling(call, fields, canonical_call)
        record_spelling(message, original, canonical)


def encode_messages(messages: Sequence[Any]) -> list[Json]:
    """Convert messages to Ollama's shape. Text parts are joined; tool results without a name get that of their call.

    Raises: BadRequest for what Ollama's API cannot express, such as an image that is not in the request itself.
    """
    names: dict[str, str] = {}
    return [_encode_message(message, names) for message in messages]


def content_of(text: str | None, images: Sequence[object] | None, path: str) -> str | list[Json]:
    """OpenAI's content for a text and Ollama's `images`, which are base64 and may contain audio. `path`: of `images`,
    for error messages."""
    if not images:
        return text or ""
    return ([{"type": "text", "text": text}] if text else []) + [_media_part(image, path) for image in images]


def text_and_media(content: Any) -> tuple[str, list[str]]:
    """The text and the base64 `images` of OpenAI's content, which is a string, None or a list of parts.

    Thoughts among the parts are left out, as chat templates leave out those of earlier turns.

    Raises: BadRequest for other parts than text, images and audio.
    """
    if content is None or isinstance(content, str):
        return content or "", []
    if not isinstance(content, list):
        raise BadRequest("a message's content must be a text or a list of parts", param="messages")
    texts, images = [], []
    for part in content:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        kind = part.get("type", "text") if isinstance(part, dict) else None
        if kind in ("text", "refusal") and isinstance(part.get(kind, 0), str | None):
            texts += [part[kind]] if part[kind] else []
        elif kind in ("thinking", "reasoning"):
            continue
        elif kind == "image_url":
            images.append(_image_data(part.get("image_url")))
        elif kind == "input_audio" and isinstance(part.get("input_audio"), dict):
            images.append(str(part["input_audio"].get("data", "")))
        else:
            raise BadRequest(f"Ollama has no content part of type {str(kind)!r}", param="messages")
    return "\n".join(texts), images


def _checked_message(sent: object) -> Json:
    where = "ChatRequest.messages"
    message = checked(sent, MESSAGE_FIELDS, where, "api.Message")
    if not message.get("tool_calls"):
        return message
    calls = [checked(call, CALL_FIELDS, f"{where}.tool_calls", "api.ToolCall") for call in message["tool_calls"]]
    where, go_type = f"{where}.tool_calls.function", "api.ToolCallFunction"
    functions = [checked(call.get("function"), FUNCTION_FIELDS, where, go_type) for call in calls]
    pairs = zip(calls, functions, strict=True)
    return message | {"tool_calls": [call | {"function": function} for call, function in pairs]}


def _decode_message(sent: Json, calls: _Calls) -> Json:
    message: Json = {"role": (sent.get("role") or "user").lower()}
    message["content"] = content_of(sent.get("content"), sent.get("images"), "ChatRequest.messages.images")
    if sent.get("thinking"):
        message["reasoning_content"] = sent["thinking"]
    if sent.get("tool_calls"):
        message["tool_calls"] = [_decode_call(call, calls) for call in sent["tool_calls"]]
    call_id, name = sent.get("tool_call_id"), sent.get("tool_name")
    if message.get("role") == "tool":
        call_id, name = calls.match_result(call_id, name)
    message |= {key: value for key, value in (("tool_call_id", call_id), ("name", name)) if value}
    return message


def _decode_call(call: Json, calls: _Calls) -> Json:
    function = call["function"]
    name = function.get("name") or ""
    try:
        arguments = orjson.dumps(function.get("arguments") or {}).decode()
    except TypeError as exc:  # orjson.JSONEncodeError
        raise BadRequest(f"the arguments of a tool call cannot be passed on: {exc}", param="messages") from None
    call_id = calls.add(call.get("id"), name)
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _encode_message(message: Any, names: dict[str, str]) -> Json:
    if not isinstance(message, dict):
        raise BadRequest("a message must be an object", param="messages")
    role = message.get("role")
    role = {"developer": "system", "function": "tool"}.get(role, role) if isinstance(role, str) else None
    text, images = text_and_media(message.get("content"))
    encoded: Json = {"content": text} if role is None else {"role": role, "content": text}
    if images:
        encoded["images"] = images
    if message.get("reasoning_content"):
        encoded["thinking"] = message["reasoning_content"]
    if message.get("tool_calls"):
        if not isinstance(message["tool_calls"], list):
            raise BadRequest("tool_calls must be a list", param="messages")
        encoded["tool_calls"] = [_encode_call(call, names) for call in message["tool_calls"]]
    call_id = str(message.get("tool_call_id") or "")
    name = message.get("name") or names.get(call_id)
    if call_id:
        encoded["tool_call_id"] = call_id
    if role == "tool" and name:
        encoded["tool_name"] = name
    return restore_spelling(encoded, message)


def _encode_call(call: Any, names: dict[str, str]) -> Json:
    function = call.get("function") if isinstance(call, dict) else None
    if function is None and isinstance(call, dict) and isinstance(custom := call.get("custom"), dict):
        function = {"name": custom.get("name"), "arguments": {"input": custom.get("input")}}  # of a tool without schema
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRequest("a tool call must name a function", param="messages")
    encoded: Json = {}
    if call.get("id"):
        encoded["id"] = call["id"]
        names[str(call["id"])] = function["name"]
    arguments = orjson.loads(arguments_text(function.get("arguments")))
    encoded["function"] = restore_spelling({"name": function["name"], "arguments": arguments}, function)
    return restore_spelling(encoded, call)


def arguments_object(text: Any) -> Json | None:
    """The arguments of a tool call as an object, parsed if they are a string; None if they are no JSON object."""
    if isinstance(text, str):
        try:
            text = orjson.loads(text.strip() or "{}")
            text = orjson.loads(text) if isinstance(text, str) else text  # some servers encode them twice
        except orjson.JSONDecodeError:
            return None
    return text if isinstance(text, dict) else None


def _image_data(image: Any) -> str:
    url = image.get("url") if isinstance(image, dict) else image
    found = _DATA_URL.match(url) if isinstance(url, str) else None
    if found is None:
        raise BadRequest(
            "an image for an Ollama model must be in the request itself, as a data: URL with base64", param="messages"
        )
    return str(url)[found.end() :]


def _media_part(image: Any, path: str) -> Json:
    data = _checked_base64(image, path)
    start = binascii.a2b_base64(data[:32])
    riff = start[8:12] if start.startswith(b"RIFF") else b""
    if riff == b"WAVE" or start.startswith(b"ID3") or (start[:1] == b"\xff" and start[1:2] >= b"\xe0"):
        audio = "wav" if riff == b"WAVE" else "mp3"
        return {"type": "input_audio", "input_audio": {"data": data, "format": audio}}
    found = (mime for mark, mime in _IMAGES.items() if start.startswith(mark))
    mime = "image/webp" if riff == b"WEBP" else next(found, "image/jpeg")
    return {"type": "image_url", "image_url": {"url": f"data:{mime};base64,{data}"}}


def _checked_base64(image: Any, path: str) -> str:
    """The base64 text without line ends, which Go ignores.

    Raises: BadRequest with the position of the first invalid character, as Go counts it.
    """
    if not isinstance(image, str):
        raise mismatch(image, path, "api.ImageData")
    data = image.translate(_LINE_ENDS) if "\n" in image or "\r" in image else image
    try:
        binascii.a2b_base64(data, strict_mode=True)
    except ValueError:
        wrong = _NOT_BASE64.search(image)
        place = wrong.start() if wrong else len(image)
        raise BadRequest(f"illegal base64 data at input byte {place}", param="images") from None
    return data
