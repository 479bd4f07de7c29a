"""Converts a content block of an Anthropic request to a part of an OpenAI message or to a tool call, and back.

Further fields of a block are extensions of the part or the call, under their own names; so are the further fields of an
image's `source` and the `type` of a document. A block that no part can express is kept in its own form.
Source: the Anthropic API reference; `server_chat_convert_anthropic_to_oai` in llama.cpp tools/server, b11434.
"""

from __future__ import annotations

import re
from typing import Any

import orjson

from llama_smart_proxy.proxy.chat import EXTENSIONS, Json, attach, is_kept
from llama_smart_proxy.proxy.dialects.anthropic.shape import (
    NAME,
    add_extensions,
    anthropic_extensions,
    keeping,
    need,
    type_of,
    without,
)
from llama_smart_proxy.proxy.errors import BadRequest

_DATA_URI = re.compile(r"data:([^;,]+);base64,")
_MEDIA_TYPE = re.compile(r"[^;,]+")
_BILLING_HASH = re.compile(r"\A(x-anthropic-billing-header:.*?cch=)\w{5}(?=;)", re.DOTALL)


def decode_part(block: Any, path: str) -> Json:
    """Convert a block of text, image or plain-text document to a part; others are kept. Raises: BadRequest."""
    return keeping(_decode_part, block, path)


def _decode_part(block: Any, path: str) -> Json:
    match type_of(block, path):
        case "text":
            return decode_text(block, path)
        case "image":
            url, remaining = _decode_image(need(block, "source", dict, path), f"{path}.source")
            part = {"type": "image_url", "image_url": {"url": url}}
            return attach(part, NAME, without(block, "type", "source") | ({"source": remaining} if remaining else {}))
        case "document":
            text, remaining = _decode_document(need(block, "source", dict, path), f"{path}.source")
            return attach({"type": "text", "text": text}, NAME, {**block, "source": remaining})
        case kind:
            raise BadRequest(f"{path}: content blocks of type {kind!r} are not supported here")


def decode_text(block: Any, path: str) -> Json:
    """Convert a block where only text is allowed. Raises: BadRequest."""
    if (kind := type_of(block, path)) != "text":
        raise BadRequest(f"{path}: Input tag {kind!r} does not match any of the expected tags: 'text'")
    return attach({"type": "text", "text": need(block, "text", str, path)}, NAME, without(block, "type", "text"))


def encode_part(part: Json) -> Json:
    """The inverse of `decode_part`. Raises: BadRequest for parts of other types, such as audio."""
    if is_kept(part):
        return without(part, EXTENSIONS)
    remaining = anthropic_extensions(part)
    kind = part.get("type")
    if kind == "image_url":
        source = remaining.pop("source", {})
        return {**remaining, "type": "image", "source": {**source, **_encode_image(part["image_url"]["url"], source)}}
    if kind != "text":
        raise BadRequest(f"an Anthropic request cannot contain a message part of type {kind!r}")
    if remaining.get("type") == "document":
        return {**remaining, "source": {**remaining["source"], "data": part["text"]}}
    return {**remaining, "type": "text", "text": restore_billing_header(part["text"], remaining.get("text"))}


def _decode_image(source: Json, path: str) -> tuple[str, Json]:
    """The URL, and the remaining fields of `source`."""
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


def _encode_image(url: str, remaining: Json) -> Json:
    found = None if "type" in remaining else _DATA_URI.match(url)
    if found is None:
        return {"type": "url", "url": url}
    return {"type": "base64", "media_type": found[1], "data": url[found.end() :]}


def _decode_document(source: Json, path: str) -> tuple[str, Json]:
    if (kind := type_of(source, path)) != "text":
        raise BadRequest(f"{path}: documents with a source of type {kind!r} are not supported here, only plain text")
    return need(source, "data", str, path), without(source, "data")


def decode_call(block: Json, path: str) -> Json:
    """Convert a tool_use block to a tool call. Raises: BadRequest."""
    try:
        arguments = orjson.dumps(need(block, "input", dict, path)).decode()
    except TypeError as exc:  # orjson.JSONEncodeError
        raise BadRequest(f"{path}.input: {exc}") from None
    function = {"name": need(block, "name", str, path), "arguments": arguments}
    call = {"id": need(block, "id", str, path), "type": "function", "function": function}
    return attach(call, NAME, without(block, "type", "id", "name", "input"))


def encode_call(call: Json) -> Json:
    """The inverse of `decode_call`."""
    function = call["function"]
    result = {"type": "tool_use", "id": call["id"], "name": function["name"], "input": input_of(function)}
    return {**anthropic_extensions(call), **result}


def input_of(function: Json) -> Json:
    """The arguments of a tool call as an object; empty if the model wrote anything else, as in llama-server."""
    try:
        value = orjson.loads(function.get("arguments") or "{}")
    except orjson.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def normalize_billing_header(text: str) -> str:
    """Replace the hash that Claude Code puts before its system prompt: it differs in every request, so that no server
    could reuse its prompt cache. llama-server writes `fffff`, too. Source: llama.cpp pull request 21793."""
    return _BILLING_HASH.sub(r"\1fffff", text, count=1) if text.startswith("x-anthropic-billing-header:") else text


def normalize_part(part: Json) -> Json:
    """Normalize a text part of the system prompt; the original text becomes its extension."""
    original = part["text"]
    part["text"] = normalize_billing_header(original)
    return part if part["text"] == original else add_extensions(part, {"text": original})


def restore_billing_header(text: str, original: str | None) -> str:
    """The `original` of a normalized text, or the text itself if it was changed since."""
    return original if original is not None and text == normalize_billing_header(original) else text
