"""The Ollama API, as its clients ask us and as we ask its servers. Pure functions, no I/O.

The parts: `ollama_fields` (what may stand in a request, and how the client's spelling survives), `ollama_options`,
`ollama_messages`, `ollama_request`; `ollama_reading` and `ollama_writing` for answers.
"""

from __future__ import annotations

from llama_smart_proxy.proxy.chat import ChatRequest, Json, Timing
from llama_smart_proxy.proxy.dialects import OLLAMA
from llama_smart_proxy.proxy.dialects.base import Face, Wire
from llama_smart_proxy.proxy.dialects.framing import LineSplitter
from llama_smart_proxy.proxy.dialects.ollama.fields import folded, keep_alive_s
from llama_smart_proxy.proxy.dialects.ollama.reading import OllamaReader
from llama_smart_proxy.proxy.dialects.ollama.request import as_text, decode_chat, decode_generate, encode
from llama_smart_proxy.proxy.dialects.ollama.writing import OllamaWriter, Stamp

__all__ = [
    "CHAT",
    "GENERATE",
    "WIRE",
    "OllamaReader",
    "OllamaWriter",
    "as_text",
    "folded",
    "is_load",
    "is_unload",
    "keep_alive_s",
    "load_reply",
]


def _body(request: ChatRequest) -> Json:
    return encode(request)[1]


def _upstream(request: ChatRequest) -> tuple[str, Json]:
    path, body = encode(request)
    return path, body | {"stream": True}


def _chat_writer(request: ChatRequest, timing: Timing) -> OllamaWriter:
    return OllamaWriter(request, timing, chat=True)


def _generate_writer(request: ChatRequest, timing: Timing) -> OllamaWriter:
    return OllamaWriter(request, timing, chat=False)


CHAT = Face(OLLAMA, decode_chat, _body, _chat_writer)
"""`POST /api/chat`."""

GENERATE = Face(OLLAMA, decode_generate, _body, _generate_writer)
"""`POST /api/generate`. Should somebody have made more of the request than one question, `encode` gives a body for
`/api/chat`; `WIRE.encode` tells the path, too."""

WIRE = Wire(OLLAMA, LineSplitter, _upstream, OllamaReader)
"""An Ollama server, asked for a stream always."""


def is_load(body: Json, *, chat: bool) -> bool:
    """Whether a body asks for nothing but to load the model (or, with a `keep_alive` of exactly 0, to unload it)."""
    if chat:
        return not body.get("messages")
    return not any(body.get(name) for name in ("prompt", "suffix", "images", "context"))


def is_unload(body: Json, *, chat: bool) -> bool:
    """Whether a body asks for nothing but to unload the model. Raises: BadRequest for a bad `keep_alive`."""
    return is_load(body, chat=chat) and keep_alive_s(body.get("keep_alive")) == 0


def load_reply(model: str, *, chat: bool, reason: str) -> Json:
    """The one object that answers such a request; `reason` is "load" or "unload"."""
    said: Json = {"message": {"role": "assistant", "content": ""}} if chat else {"response": ""}
    return {"model": model, "created_at": Stamp().now()} | said | {"done": True, "done_reason": reason}
