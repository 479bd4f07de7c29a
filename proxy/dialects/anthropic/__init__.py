"""Anthropic's Messages API: `POST /v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

from llama_smart_proxy.proxy.chat import ChatRequest, Json
from llama_smart_proxy.proxy.dialects import ANTHROPIC
from llama_smart_proxy.proxy.dialects.anthropic.reader import MessageReader
from llama_smart_proxy.proxy.dialects.anthropic.request import decode, encode
from llama_smart_proxy.proxy.dialects.anthropic.stream import MessageWriter
from llama_smart_proxy.proxy.dialects.anthropic.tokens import estimate
from llama_smart_proxy.proxy.dialects.base import Face, Reader, Wire
from llama_smart_proxy.proxy.dialects.framing import EventSplitter

MESSAGES = Face(ANTHROPIC, decode, encode, MessageWriter)
"""`POST /v1/messages`."""


def reader(request: ChatRequest | None = None) -> Reader:
    """A reader of one streamed Message."""
    return MessageReader()


def count_tokens(body: Json) -> int:
    """The `input_tokens` of a body of `POST /v1/messages/count_tokens`, by `estimate`'s rule. Raises: BadRequest."""
    return estimate(decode({**body, "max_tokens": 1}).body)


def _upstream(request: ChatRequest) -> tuple[str, Json]:
    return "/v1/messages", encode(request) | {"stream": True}


WIRE = Wire(ANTHROPIC, EventSplitter, _upstream, reader)
"""A server that speaks this API."""
