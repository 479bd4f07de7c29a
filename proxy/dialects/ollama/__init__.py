"""The Ollama API, for its clients and for its servers. Pure functions, no I/O.

`fields` (the fields of a request, and the client's spelling of them), `options`, `messages` and `request` convert
requests; `reading` and `writing` convert answers.
"""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from llama_smart_proxy.proxy.chat import ChatRequest, Json, Timing
from llama_smart_proxy.proxy.dialects.base import ClientCodec, Loading, UpstreamCodec, limited
from llama_smart_proxy.proxy.dialects.framing import LineSplitter
from llama_smart_proxy.proxy.dialects.ollama.dialect import OLLAMA
from llama_smart_proxy.proxy.dialects.ollama.fields import folded, keep_alive_s
from llama_smart_proxy.proxy.dialects.ollama.models import full_name
from llama_smart_proxy.proxy.dialects.ollama.options import unconstrained
from llama_smart_proxy.proxy.dialects.ollama.reading import OllamaReader
from llama_smart_proxy.proxy.dialects.ollama.request import (
    GENERATE_PATH,
    as_text,
    decode_chat,
    decode_generate,
    encode,
)
from llama_smart_proxy.proxy.dialects.ollama.writing import OllamaWriter, Timestamps

__all__ = [
    "CHAT",
    "GENERATE",
    "WIRE",
    "OllamaReader",
    "OllamaWriter",
    "as_text",
    "folded",
    "keep_alive_s",
    "lacks",
    "unconstrained",
]


def _upstream(request: ChatRequest) -> tuple[str, Json]:
    path, body = encode(request)
    return path, body | {"stream": True}


WIRE = UpstreamCodec(OLLAMA, LineSplitter, _upstream, OllamaReader)
"""An Ollama server; requests are always for a stream."""


def lacks(model: str, capability: str) -> str:
    """Ollama's error message for a model without a capability."""
    return f"{full_name(model)} does not support {capability}"


class OllamaChatCodec(ClientCodec):
    """`POST /api/chat`."""

    dialect = OLLAMA
    same_api = WIRE
    thinking_is_optional = False
    limit_fields = ("num_predict",)
    _content = frozenset({"messages"})
    """A body with none of these fields only loads the model."""
    _uses = ("completion", "tools", "thinking")
    """The capabilities that a body may require."""
    _verb = "chat"

    def streams(self, body: Json) -> bool:
        return body.get("stream") is not False and self.loading(body) is None

    def limit_tokens(self, body: Json, most: int, *, always: bool) -> None:
        options = body.get("options") or {}
        if isinstance(options, dict) and (changed := limited(options, self.limit_fields, most, always=always)):
            body["options"] = options | changed

    def decode(self, body: Json) -> ChatRequest:
        return decode_chat(body)

    def encode(self, request: ChatRequest) -> Json:
        return encode(request)[1]

    def writer(self, request: ChatRequest, timing: Timing) -> OllamaWriter:
        return OllamaWriter(request, timing, chat=True)

    def sign_of_life(self, model: str) -> bytes:
        """A line without text: clients reject blank ones."""
        return self._line(model, {})

    def thought(self, model: str, text: str) -> bytes:
        return self._line(model, {"thinking": text})

    def _line(self, model: str, fields: Json) -> bytes:
        return orjson.dumps(self._object(model, fields) | {"done": False}, option=orjson.OPT_APPEND_NEWLINE)

    def loading(self, body: Json) -> Loading | None:
        """A body without content loads the model, or unloads it with a `keep_alive` of 0."""
        if any(body.get(name) for name in self._content):
            return None
        return Loading.UNLOAD if keep_alive_s(body.get("keep_alive")) == 0 else Loading.LOAD

    def load_reply(self, model: str, loading: Loading) -> Json:
        return self._object(model, {}) | {"done": True, "done_reason": loading}

    def keep_alive_s(self, body: Json) -> float | None:
        return keep_alive_s(body.get("keep_alive"))

    def needs(self, body: Json) -> Sequence[str]:
        used = {"completion": True, "tools": body.get("tools"), "thinking": body.get("think")}
        used["insert"] = body.get("suffix") and not body.get("raw")
        return [capability for capability in self._uses if used[capability]]

    def lacks(self, model: str, capability: str) -> str:
        if capability in ("completion", "thinking"):
            return super().lacks(model, self._verb if capability == "completion" else capability)
        return lacks(model, capability)

    def _object(self, model: str, fields: Json) -> Json:
        message = {"role": "assistant", "content": "", **fields}
        return {"model": model, "created_at": Timestamps().now(), "message": message}


class OllamaGenerateCodec(OllamaChatCodec):
    """`POST /api/generate`. If an agent has turned the request into a longer chat, `encode` returns a body for
    `/api/chat`, and `fits` is false."""

    resends_chat = False
    _content = frozenset({"prompt", "suffix", "images"})
    _uses = ("completion", "insert", "thinking")
    _verb = "generate"

    def decode(self, body: Json) -> ChatRequest:
        return decode_generate(body)

    def writer(self, request: ChatRequest, timing: Timing) -> OllamaWriter:
        return OllamaWriter(request, timing, chat=False)

    def fits(self, request: ChatRequest) -> bool:
        return encode(request)[0] == GENERATE_PATH and super().fits(request)

    def _object(self, model: str, fields: Json) -> Json:
        return {"model": model, "created_at": Timestamps().now(), "response": "", **fields}


CHAT = OllamaChatCodec()
GENERATE = OllamaGenerateCodec()
