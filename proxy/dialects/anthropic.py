"""Anthropic's Messages API: `POST /v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

from proxy.chat import ChatRequest, Json
from proxy.dialects import ANTHROPIC
from proxy.dialects.anthropic_reader import MessageReader
from proxy.dialects.anthropic_request import decode, encode
from proxy.dialects.anthropic_stream import MessageWriter
from proxy.dialects.anthropic_tokens import estimate
from proxy.dialects.codec import Face, Reader, Wire
from proxy.framing import EventSplitter

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
