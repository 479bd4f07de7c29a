"""Embeddings of a model, for any API of its server."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from llama_smart_proxy.backends.base import Model
from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.dialects.embeddings import EMBEDDING_SERVERS, Embedded, EmbeddingRequest, cut
from llama_smart_proxy.proxy.errors import BadRequest, UpstreamFailed, UpstreamRefused
from llama_smart_proxy.proxy.stream.upstream import post_json

PostJson = Callable[[str, Json], Awaitable[Json]]
"""Sends a JSON body to a path of the model's server and returns its JSON answer."""


async def embed(model: Model, request: EmbeddingRequest, post: PostJson | None = None) -> Embedded:
    """One vector per input. With no input the model is only loaded, as Ollama does.

    Raises: BadRequest for an input that is too long if `request.truncate` is False; as `post_json`.
    """
    started_ns = time.monotonic_ns()
    if not request.inputs:
        await model.load()
        return Embedded([], spent_ns=time.monotonic_ns() - started_ns)
    server = EMBEDDING_SERVERS[model.codec]
    post = post or partial(post_json, model, slot=True)

    async def vectors_of(inputs: list[Any]) -> Embedded:
        return server.decode(await post(server.path, server.encode(model.name, inputs, request)))

    try:
        embedded = await vectors_of(request.inputs)
    except UpstreamRefused as exc:
        limit = server.limit(exc.message)
        if limit is None:
            raise
        if not request.truncate:
            raise BadRequest("the input length exceeds the context length") from None
        embedded = await vectors_of([await _shortened(model, text, limit) for text in request.inputs])
    if not server.complete:
        embedded.vectors = [cut(vector, request.dimensions) for vector in embedded.vectors]
    embedded.spent_ns = time.monotonic_ns() - started_ns
    return embedded


async def _shortened(model: Model, text: str, limit: int) -> list[int]:
    """The first tokens of `text`, fewer than `limit`."""
    tokens = (await post_json(model, "/tokenize", {"content": text, "add_special": True})).get("tokens")
    if not isinstance(tokens, list):
        raise UpstreamFailed("the model server's answer contains no tokens", code="upstream_error")
    return tokens[: limit - 1]  # servers differ in whether the limit itself is allowed
