"""Anthropic's Messages API: `POST /v1/messages` and `/v1/messages/count_tokens`."""

from __future__ import annotations

from typing import Any

from llama_smart_proxy.proxy.chat import ChatRequest, Json, Timing, first_problem
from llama_smart_proxy.proxy.dialects.anthropic.blocks import normalize_billing_header
from llama_smart_proxy.proxy.dialects.anthropic.dialect import ANTHROPIC
from llama_smart_proxy.proxy.dialects.anthropic.messages import text_place
from llama_smart_proxy.proxy.dialects.anthropic.reader import MessageReader
from llama_smart_proxy.proxy.dialects.anthropic.request import decode, encode
from llama_smart_proxy.proxy.dialects.anthropic.stream import MessageWriter
from llama_smart_proxy.proxy.dialects.anthropic.tokens import estimate
from llama_smart_proxy.proxy.dialects.base import ClientCodec, Reader, TextPlace, UpstreamCodec
from llama_smart_proxy.proxy.dialects.framing import EventSplitter


def reader(request: ChatRequest | None = None) -> Reader:
    """A reader for one streamed Message."""
    return MessageReader()


def count_tokens(body: Json) -> int:
    """The `input_tokens` of a body of `POST /v1/messages/count_tokens`, by `estimate`'s rule. Raises: BadRequest."""
    return estimate(MESSAGES.decode({**body, "max_tokens": 1}).body)


def _upstream(request: ChatRequest) -> tuple[str, Json]:
    return "/v1/messages", encode(request) | {"stream": True}


WIRE = UpstreamCodec(ANTHROPIC, EventSplitter, _upstream, reader)
"""A server of this API."""


class MessagesCodec(ClientCodec):
    """`POST /v1/messages`."""

    dialect = ANTHROPIC
    same_api = WIRE

    def decode(self, body: Json) -> ChatRequest:
        request = decode(body)
        if (problem := first_problem(request.body)) is not None:
            raise problem
        return request

    def decode_same_api(self, body: Json) -> ChatRequest:
        return decode(body)

    def encode(self, request: ChatRequest) -> Json:
        return encode(request)

    def writer(self, request: ChatRequest, timing: Timing) -> MessageWriter:
        return MessageWriter(request, timing)

    def text_place(self, message: Any) -> TextPlace | None:
        return text_place(message)

    def beginning(self, body: Json) -> list[tuple[Any, str]]:
        return [(role, normalize_billing_header(text)) for role, text in super().beginning(body)]


MESSAGES = MessagesCodec()
