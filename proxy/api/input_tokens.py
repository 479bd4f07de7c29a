"""Counts the tokens of a request to the Responses API."""

from __future__ import annotations

from llama_smart_proxy.backends.base import Model
from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.dialects.responses import CODEC
from llama_smart_proxy.proxy.stream.tokens import count_tokens


async def count_input_tokens(model: Model, body: Json) -> Json:
    """The answer to `POST /v1/responses/input_tokens`: counted by llama-server, or estimated for any other
    server. Raises: BadRequest, and as `post_json`."""
    chat = CODEC.decode(body).body | {"model": model.name}
    return {"object": "response.input_tokens", "input_tokens": await count_tokens(model, chat)}
