"""How a backend's server is asked, in the API that it speaks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from llama_smart_proxy.backends.base import Backend
from llama_smart_proxy.backends.llamacpp.spawned import SpawnedModel
from llama_smart_proxy.backends.ollama.hosts import OllamaModel
from llama_smart_proxy.proxy.chat import ChatRequest, Json
from llama_smart_proxy.proxy.dialects import anthropic, ollama, openai
from llama_smart_proxy.proxy.dialects.base import Wire
from llama_smart_proxy.proxy.errors import BadRequest, UpstreamRefused

MAX_NUM_CTX = 2**31 - 1
"""Largest context size that any server can be asked for: they count in 32 bits."""


def wire_of(backend: Backend) -> Wire:
    """How to ask for a streamed answer there, whatever API the request came in."""
    if isinstance(backend, OllamaModel):
        return replace(ollama.WIRE, encode=partial(_encode_for, backend))
    return openai.LLAMA_CPP if isinstance(backend, SpawnedModel) else openai.WIRE


def native_wire(family: str, backend: Backend) -> Wire | None:
    """How to ask for one in the API of that family, so that the answer is what a client of it gets without agents; None
    if the server does not speak it."""
    if family not in backend.speaks:
        return None
    if family == "anthropic":
        return anthropic.WIRE
    return openai.OWN_WIRE if family == "openai" else wire_of(backend)


def server_of(backend: Backend) -> str:
    """Who runs the model: `llama.cpp`, `ollama` or `remote`."""
    if isinstance(backend, SpawnedModel):
        return "llama.cpp"
    return "ollama" if isinstance(backend, OllamaModel) else "remote"


def hold_context(backend: Backend, body: Json) -> None:
    """Have `num_ctx` follow the one policy of an Ollama's model, or clients that differ would reload it in turns.

    `options` is Ollama's; clients of other APIs may send it, too.
    """
    options: Mapping[str, Any] | None = body.get("options")
    if not isinstance(backend, OllamaModel):
        return
    if options is not None and not isinstance(options, dict):
        raise BadRequest("options must be an object", param="options")
    asked = options.get("num_ctx") if options else None
    if isinstance(asked, int) and asked > MAX_NUM_CTX:
        raise BadRequest(f"num_ctx must not be over {MAX_NUM_CTX}", param="num_ctx")
    num_ctx = backend.num_ctx(asked if isinstance(asked, int) and not isinstance(asked, bool) else None)
    if num_ctx is not None and num_ctx != asked:
        body["options"] = {**(options or {}), "num_ctx": num_ctx}


def without_thoughts(request: ChatRequest, refused: UpstreamRefused) -> bool:
    """Take back the wish that the model think, if that is what the server refused; whether it was."""
    if "does not support thinking" not in refused.message:
        return False
    wishes = ("chat_template_kwargs", "reasoning_effort", "think", "thinking_budget_tokens")
    return any([request.body.pop(wish, None) is not None for wish in wishes])


def _encode_for(backend: OllamaModel, request: ChatRequest) -> tuple[str, Json]:
    path, body = ollama.WIRE.encode(request)
    hold_context(backend, body)
    return path, body
