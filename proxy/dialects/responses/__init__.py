"""OpenAI's Responses API: `POST /v1/responses` and `/v1/responses/input_tokens`.

`request`, `items`, `parts` and `tools` convert requests; `output` and `writer` convert answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llama_smart_proxy.proxy.chat import ChatRequest, Json, Timing
from llama_smart_proxy.proxy.dialects.base import ClientCodec, TextPlace
from llama_smart_proxy.proxy.dialects.responses.dialect import RESPONSES
from llama_smart_proxy.proxy.dialects.responses.parts import text_in, text_key
from llama_smart_proxy.proxy.dialects.responses.request import decode
from llama_smart_proxy.proxy.dialects.responses.writer import ResponseWriter

__all__ = ["CODEC", "ResponsesCodec"]


class ResponsesCodec(ClientCodec):
    """`POST /v1/responses`.

    There is no way back from OpenAI's chat shape: a request that an agent has read is translated for every server.
    """

    dialect = RESPONSES
    messages_field = "input"
    system_field = "instructions"
    limit_fields = ("max_output_tokens",)

    def decode(self, body: Json) -> ChatRequest:
        return decode(body)

    def fits(self, request: ChatRequest) -> bool:
        return False

    def writer(self, request: ChatRequest, timing: Timing) -> ResponseWriter:
        return ResponseWriter(request, timing)

    def user_text(self, body: Json) -> str:
        given = body.get("input")
        return given if isinstance(given, str) else super().user_text(body)

    def system_text(self, body: Json) -> str:
        return next((text for role, text in self.beginning(body)[:1] if role in ("system", "developer")), "")

    def text_place(self, message: Any) -> TextPlace | None:
        is_message = isinstance(message, dict) and message.get("type") in (None, "message")
        if not is_message or message.get("role") != "user":
            return None
        if not isinstance(content := message.get("content"), list):
            return TextPlace(message, "content")
        places = (TextPlace(part, key) for part in content if (key := text_key(part)) is not None)
        return next(places, TextPlace(None, "text"))

    def beginning(self, body: Json) -> list[tuple[Any, str]]:
        instructions = body.get("instructions")
        result: list[tuple[Any, str]] = [("system", instructions)] if isinstance(instructions, str) else []
        for role, texts in _messages(body):
            result.append((role, "\n".join(texts)))
            if role == "user":
                break
        return result


def _messages(body: Json) -> Iterator[tuple[Any, list[str]]]:
    """Role and texts of each message in an undecoded and unchecked body."""
    given = body.get("input")
    for item in given if isinstance(given, list) else [{"role": "user", "content": given}]:
        if isinstance(item, dict) and item.get("type") in (None, "message"):
            content = item.get("content")
            parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
            yield item.get("role"), [text for text in map(text_in, parts) if text is not None]


CODEC = ResponsesCodec()
