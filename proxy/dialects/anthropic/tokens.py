"""Estimates the tokens of a request, for servers that cannot count them and for the start of a streamed answer."""

from __future__ import annotations

import json
from typing import Any

from llama_smart_proxy.proxy.chat import Json

BYTES_PER_TOKEN = 4
"""Bytes of UTF-8; typical of English text with the vocabularies of current models."""
IMAGE_TOKENS = 1600
"""For each image. Source: Anthropic's guide to vision, for the largest that is not scaled down."""


def estimate(body: Json) -> int:
    """The estimate for a request in OpenAI's shape: all texts, tool calls, tool results and tool schemas at
    `BYTES_PER_TOKEN`, rounded up, and `IMAGE_TOKENS` for each image; at least 1."""
    size = images = 0
    for message in body["messages"]:
        content = message.get("content") or ()
        parts = [{"text": content}] if isinstance(content, str) else content
        parts = [part for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
        images += sum(part.get("type") == "image_url" for part in parts)
        size += sum(_size(part.get("text")) for part in parts) + _size(message.get("reasoning_content"))
        for call in message.get("tool_calls") or ():
            size += _size(call["function"]["name"]) + _size(call["function"]["arguments"])
    for tool in body.get("tools") or ():
        size += _size(json.dumps(tool["function"], ensure_ascii=False, separators=(",", ":")))
    return max(1, -(-size // BYTES_PER_TOKEN) + images * IMAGE_TOKENS)


def _size(text: Any) -> int:
    return len(text.encode(errors="surrogatepass")) if isinstance(text, str) else 0
