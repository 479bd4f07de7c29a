"""Anthropic's Messages API: `POST /v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

from proxy.chat import Json
from proxy.dialects import ANTHROPIC
from proxy.dialects.anthropic_reader import MessageReader
from proxy.dialects.anthropic_request import decode, encode
from proxy.dialects.anthropic_stream import MessageWriter
from proxy.dialects.anthropic_tokens import estimate
from proxy.dialects.codec import Face, Reader

MESSAGES = Face(ANTHROPIC, decode, encode, MessageWriter)
"""`POST /v1/messages`."""


def reader() -> Reader:
    """A reader of one streamed Message."""
    return MessageReader()


def count_tokens(body: Json) -> int:
    """The `input_tokens` of a body of `POST /v1/messages/count_tokens`, by `estimate`'s rule. Raises: BadRequest."""
    return estimate(decode({**body, "max_tokens": 1}).body)
