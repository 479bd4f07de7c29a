"""The tokens of a request, counted by its model's server where that can do so."""

from __future__ import annotations

from llama_smart_proxy.backends.base import Feature, Model
from llama_smart_proxy.proxy.chat import ChatRequest, Json, without_extensions
from llama_smart_proxy.proxy.dialects.anthropic.tokens import BYTES_PER_TOKEN, estimate
from llama_smart_proxy.proxy.errors import UpstreamRefused
from llama_smart_proxy.proxy.stream.upstream import post_json

PATH = "/v1/chat/completions/input_tokens"
"""llama-server's count of the tokens of a chat. Source: llama.cpp tools/server, b11434."""
MOST = BYTES_PER_TOKEN
"""So many times more tokens than estimated a text has at most: a token is at least a byte."""


async def count_tokens(model: Model, chat: Json) -> int:
    """The tokens of a chat in OpenAI's shape: counted by llama-server, or estimated for any other server. Raises: as
    `post_json`."""
    counted = await _counted(model, PATH, chat) if Feature.TOKENS in model.features else None
    return estimate(chat) if counted is None else counted


async def room_for(model: Model, request: ChatRequest) -> int | None:
    """How many tokens are left for the answer to `request` in the model's context; None if that is not known. Loads the
    model if it is a close thing. Raises: as `post_json`."""
    size = await _context_size(model)
    if not size:
        return None
    body = {**request.body, "model": model.name}
    prompt = request.last_user_text
    about = len(prompt.encode(errors="replace")) // BYTES_PER_TOKEN if request.is_text else estimate(body)
    if about * MOST < size // 2:
        return size - about * MOST
    if not request.is_text:
        return size - await count_tokens(model, body)
    counted = None
    if Feature.TOKENS in model.features:
        counted = await _counted(model, "/tokenize", {"content": prompt, "add_special": True}, "tokens")
    return size - (about if counted is None else counted)


async def _context_size(model: Model) -> int:
    """0 if it is not known."""
    residence = await model.residence()
    if residence is not None:
        return residence.context_length
    info = await model.info()
    trained = info.metadata.get(f"{info.metadata.get('general.architecture')}.context_length")
    return info.num_ctx or (trained if isinstance(trained, int) else 0)


async def _counted(model: Model, path: str, body: Json, field: str = "input_tokens") -> int | None:
    try:
        counted = (await post_json(model, path, without_extensions(body))).get(field)
    except UpstreamRefused as exc:
        if exc.status not in (404, 405, 501):
            raise
        return None
    counted = len(counted) if isinstance(counted, list) else counted
    return counted if isinstance(counted, int) else None
