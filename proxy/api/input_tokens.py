"""Counts the tokens of a request to the Responses API."""

from __future__ import annotations

from llama_smart_proxy.backends.base import Feature, Model
from llama_smart_proxy.proxy.chat import Json, without_extensions
from llama_smart_proxy.proxy.dialects.anthropic.tokens import estimate
from llama_smart_proxy.proxy.dialects.responses import CODEC
from llama_smart_proxy.proxy.errors import UpstreamRefused
from llama_smart_proxy.proxy.stream.upstream import post_json

PATH = "/v1/chat/completions/input_tokens"
"""llama-server's count of the tokens of a chat. Source: llama.cpp tools/server, b11434."""


async def count_input_tokens(model: Model, body: Json) -> Json:
    """The answer to `POST /v1/responses/input_tokens`: counted by llama-server, or estimated for any other
    server. Raises: BadRequest, and as `post_json`."""
    chat = CODEC.decode(body).body | {"model": model.name}
    counted = await _counted(model, chat) if Feature.TOKENS in model.features else None
    return {"object": "response.input_tokens", "input_tokens": estimate(chat) if counted is None else counted}


async def _counted(model: Model, chat: Json) -> int | None:
    try:
        counted = (await post_json(model, PATH, without_extensions(chat))).get("input_tokens")
    except UpstreamRefused as exc:
        if exc.status not in (404, 405, 501):
            raise
        return None
    return counted if isinstance(counted, int) else None
