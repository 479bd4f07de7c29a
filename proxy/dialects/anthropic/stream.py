"""Encodes answers for Anthropic clients: the events of a Message, or a whole Message.

Source: the Anthropic API reference, Messages streaming; `to_json_anthropic*` in llama.cpp tools/server, b11434.
"""

from __future__ import annotations

import secrets
from typing import Any

import orjson

from llama_smart_proxy.proxy.chat import EXTENSIONS, ChatRequest, Json, Timing, extensions_of, own_fields
from llama_smart_proxy.proxy.dialects.anthropic.blocks import input_of
from llama_smart_proxy.proxy.dialects.anthropic.dialect import ANTHROPIC
from llama_smart_proxy.proxy.dialects.anthropic.shape import NAME
from llama_smart_proxy.proxy.dialects.anthropic.tokens import estimate
from llama_smart_proxy.proxy.errors import ProxyError

STOP_REASONS = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "function_call": "tool_use",
    "content_filter": "refusal",
}
"""By OpenAI's finish reason."""


class MessageWriter:
    """Encodes the events of one Message, or a whole Message.

    Content blocks do not overlap: a text after a tool call begins a new block. If a server continues an earlier tool
    call after that, its delta has the index of the earlier block, which client libraries handle.
    """

    content_type = "text/event-stream"

    def __init__(self, request: ChatRequest, timing: Timing) -> None:
        self._model = request.asked or request.model
        self._usage: Json = {"prompt_tokens": estimate(request.body), "completion_tokens": 0}
        self._begun = False
        self._open = ""  # type of the current block
        self._index = -1  # its index
        self._head = b""  # its next delta event, up to the text
        self._calls: dict[int, int] = {}  # tool call index -> block index
        self._finish = "stop"
        self._extensions: Json = {}
        self._besides: Json = {}

    def chunk(self, chunk: Json) -> bytes:
        if usage := chunk.get("usage"):
            self._usage = usage
        written = b"" if self._begun else self._begin(chunk)
        if EXTENSIONS in chunk:
            self._extensions |= extensions_of(chunk, NAME)
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
            if text := delta.get("reasoning_content"):
                written += self._text("thinking", text)
            if text := delta.get("content"):
                written += self._text("text", text)
            for call in delta.get("tool_calls") or ():
                written += self._call(call)
            if finish := choice.get("finish_reason"):
                self._finish = finish
                self._besides |= own_fields(chunk)
        return written

    def adopt(self, chunk: Json) -> None:
        """Does nothing: frames are stateful, so `chunk` is called even for chunks whose frames are sent unchanged."""

    def end(self) -> bytes:
        written = (b"" if self._begun else self._begin({})) + self._close()
        delta = _stop(self._finish, bool(self._calls), self._extensions)
        last = {"type": "message_delta", "delta": delta, "usage": _usage(self._usage)}
        written += _event(last | self._besides)
        return written + _event({"type": "message_stop"})

    def error(self, exc: ProxyError) -> bytes:
        return ANTHROPIC.error_event(exc)

    def reply(self, completion: Json) -> bytes:
        choice = completion["choices"][0]
        content = _content(choice["message"], extensions_of(completion, NAME))
        ended = _stop(
            choice.get("finish_reason"), bool(choice["message"].get("tool_calls")), extensions_of(completion, NAME)
        )
        message = self._message(completion, content, completion.get("usage") or self._usage)
        return orjson.dumps(message | ended | own_fields(completion))

    def _message(self, source: Json, content: list[Json], usage: Json) -> Json:
        return {
            "id": _message_id(source.get("id")),
            "type": "message",
            "role": "assistant",
            "content": content,
            "model": self._model,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(usage),
        }

    def _begin(self, chunk: Json) -> bytes:
        self._begun = True
        return _event({"type": "message_start", "message": self._message(chunk, [], self._usage)})

    def _text(self, kind: str, text: str) -> bytes:
        """A delta for a block whose type is also the name of its field. Runs for each token, so the constant part of
        the event is cached."""
        if self._open == kind:
            return self._head + orjson.dumps(text) + b"}}\n\n"
        begun = self._new({"type": kind, kind: ""} | ({"signature": ""} if kind == "thinking" else {}))
        self._head = (
            b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,'
            b'"delta":{"type":"%b_delta","%b":' % (self._index, kind.encode(), kind.encode())
        )
        return begun + self._head + orjson.dumps(text) + b"}}\n\n"

    def _call(self, call: Json) -> bytes:
        number, function = call.get("index", len(self._calls)), call.get("function") or {}
        written = b""
        if number not in self._calls:
            identity = call.get("id") or f"toolu_{secrets.token_hex(12)}"
            written = self._new({"type": "tool_use", "id": identity, "name": function.get("name") or "", "input": {}})
            self._calls[number] = self._index
        if arguments := function.get("arguments"):
            written += _delta(self._calls[number], {"type": "input_json_delta", "partial_json": arguments})
        return written

    def _new(self, block: Json) -> bytes:
        written = self._close()
        self._open = block["type"]
        self._index += 1
        return written + _event({"type": "content_block_start", "index": self._index, "content_block": block})

    def _close(self) -> bytes:
        """End the current block, if any. Clients expect a signature after thinking; it is empty if the server has
        sent none."""
        written = b""
        if self._open == "thinking":
            signature = self._extensions.pop("signature", "")
            written = _delta(self._index, {"type": "signature_delta", "signature": signature})
        if self._open:
            written += _event({"type": "content_block_stop", "index": self._index})
        self._open = ""
        return written


def _event(value: Json) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (value["type"].encode(), orjson.dumps(value))


def _delta(index: int, delta: Json) -> bytes:
    return _event({"type": "content_block_delta", "index": index, "delta": delta})


def _message_id(given: Any) -> str:
    return f"msg_{str(given).removeprefix('chatcmpl-').removeprefix('msg_') if given else secrets.token_hex(12)}"


def _stop(finish: str | None, called: bool, extensions: Any) -> Json:
    """The fields `stop_reason` and `stop_sequence`. Some servers end a tool call with `stop` instead of `tool_calls`;
    llama-server sends the matched stop sequence with `end_turn`."""
    sequence = extensions.get("stop_sequence")
    reason = extensions.get("stop_reason") or STOP_REASONS.get(finish or "stop", "end_turn")
    if reason == "end_turn" and (called or sequence is not None):
        reason = "tool_use" if called else "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": sequence}


def _usage(usage: Json) -> Json:
    """Anthropic's `usage`, in which `input_tokens` excludes cached tokens."""
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    counts = {"input_tokens": usage.get("prompt_tokens", 0) - (cached or 0)}
    counts |= {} if cached is None else {"cache_read_input_tokens": cached}
    return counts | {"output_tokens": usage.get("completion_tokens", 0)}


def _content(message: Json, extensions: Any) -> list[Json]:
    blocks = []
    if reasoning := message.get("reasoning_content"):
        blocks.append({"type": "thinking", "thinking": reasoning, "signature": extensions.get("signature", "")})
    if text := message.get("content"):
        blocks.append({"type": "text", "text": text})
    for call in message.get("tool_calls") or ():
        identity, function = call.get("id") or f"toolu_{secrets.token_hex(12)}", call["function"]
        blocks.append({"type": "tool_use", "id": identity, "name": function["name"], "input": input_of(function)})
    return blocks
