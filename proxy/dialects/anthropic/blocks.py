"""One content block of an Anthropic request as a part of a message or as a tool call, and back.

What a block has beyond that is kept in the part or the call, under its own name; an image's `source` keeps what is left
of it, a document keeps its `type`.
Source: the Anthropic API reference; `server_chat_convert_anthropic_to_oai` in llama.cpp tools/server, b11434.
"""

from __future__ import annotations

import re
from typing import Any

import orjson

from llama_smart_proxy.proxy.chat import Json, keep
from llama_smart_proxy.proxy.dialects.anthropic.shape import NAME, aside, need, set_aside, type_of, without
from llama_smart_proxy.proxy.errors import BadRequest

_DATA_URI = re.compile(r"data:([^;,]+);base64,")
_MEDIA_TYPE = re.compile(r"[^;,]+")
_STAMP = re.compile(r"(x-anthropic-billing-header:.*?cch=)\w{5}(?=;)", re.DOTALL)


def decode_part(block: Any, path: str) -> Json:
    """The part that a block of text, image or plain-text document becomes. Raises: BadRequest."""
    match type_of(block, path):
        case "text":
            return decode_text(block, path)
        case "image":
            url, left = _decode_image(need(block, "source", dict, path), f"{path}.source")
            part = {"type": "image_url", "image_url": {"url": url}}
            return keep(part, NAME, without(block, "type", "source") | ({"source": left} if left else {}))
        case "document":
            text, left = _decode_document(need(block, "source", dict, path), f"{path}.source")
            return keep({"type": "text", "text": text}, NAME, {**block, "source": left})
        case kind:
            raise BadRequest(f"{path}: content blocks of type {kind!r} are not supported here")


def decode_text(block: Any, path: str) -> Json:
    """The part that a block becomes where only text may stand. Raises: BadRequest."""
    if (kind := type_of(block, path)) != "text":
        raise BadRequest(f"{path}: Input tag {kind!r} does not match any of the expected tags: 'text'")
    return keep({"type": "text", "text": need(block, "text", str, path)}, NAME, without(block, "type", "text"))


def encode_part(part: Json) -> Json:
    """The block that a part was, or would have been. Raises: BadRequest for sound and the like."""
    left = aside(part)
    kind = part.get("type")
    if kind == "image_url":
        source = left.pop("source", {})
        return {**left, "type": "image", "source": {**source, **_encode_image(part["image_url"]["url"], source)}}
    if kind != "text":
        raise BadRequest(f"a message part of type {kind!r} has no place in an Anthropic request")
    if left.get("type") == "document":
        return {**left, "source": {**left["source"], "data": part["text"]}}
    return {**left, "type": "text", "text": unsteady(part["text"], left.get("text"))}


def _decode_image(source: Json, path: str) -> tuple[str, Json]:
    """The URL, and what is left to keep."""
    match type_of(source, path):
        case "base64":
            media_type = need(source, "media_type", str, path)
            if not _MEDIA_TYPE.fullmatch(media_type):
                raise BadRequest(f"{path}.media_type: Input should be the media type of an image")
            url = f"data:{media_type};base64,{need(source, 'data', str, path)}"
            return url, without(source, "type", "media_type", "data")
        case "url":
            url = need(source, "url", str, path)
            return url, without(source, "url", *([] if url.startswith("data:") else ["type"]))
        case kind:
            raise BadRequest(f"{path}: images with a source of type {kind!r} are not supported here")


def _encode_image(url: str, left: Json) -> Json:
    found = None if "type" in left else _DATA_URI.match(url)
    if found is None:
        return {"type": "url", "url": url}
    return {"type": "base64", "media_type": found[1], "data": url[found.end() :]}


def _decode_document(source: Json, path: str) -> tuple[str, Json]:
    if (kind := type_of(source, path)) != "text":
        raise BadRequest(f"{path}: documents with a source of type {kind!r} are not supported here, only plain text")
    return need(source, "data", str, path), without(source, "data")


def decode_call(block: Json, path: str) -> Json:
    """The tool call that a tool_use block becomes. Raises: BadRequest."""
    try:
        arguments = orjson.dumps(need(block, "input", dict, path)).decode()
    except TypeError as exc:  # orjson.JSONEncodeError
        raise BadRequest(f"{path}.input: {exc}") from None
    function = {"name": need(block, "name", str, path), "arguments": arguments}
    call = {"id": need(block, "id", str, path), "type": "function", "function": function}
    return keep(call, NAME, without(block, "type", "id", "name", "input"))


def encode_call(call: Json) -> Json:
    """The tool_use block of a tool call."""
    function = call["function"]
    made = {"type": "tool_use", "id": call["id"], "name": function["name"], "input": input_of(function)}
    return {**aside(call), **made}


def input_of(function: Json) -> Json:
    """The arguments of a tool call as an object; an empty one if a model wrote something else, as llama-server does."""
    try:
        value = orjson.loads(function.get("arguments") or "{}")
    except orjson.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def steady(text: str) -> str:
    """A system prompt without the mark that Claude Code puts in front of it, different in every request: no server
    could reuse what it has computed. llama-server writes `fffff` over it, too. Source: llama.cpp pull request 21793."""
    return _STAMP.sub(r"\1fffff", text, count=1) if text.startswith("x-anthropic-billing-header:") else text


def steady_part(part: Json) -> Json:
    """A text part of the system prompt, its text made steady; it keeps the text that it had."""
    original = part["text"]
    part["text"] = steady(original)
    return part if part["text"] == original else set_aside(part, {"text": original})


def unsteady(text: str, original: str | None) -> str:
    """The original of a steady text, unless the text has been changed since."""
    return original if original is not None and text == steady(original) else text
