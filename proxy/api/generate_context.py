"""`context` of `/api/generate`: a conversation as tokens, for models on llama-server.

Source: Ollama's server/routes.go; llama.cpp tools/server for `/apply-template`, `/tokenize` and `/detokenize`.
"""

from __future__ import annotations

import logging
from typing import Any

from llama_smart_proxy.backends.base import Feature, Model, UpstreamRequest
from llama_smart_proxy.backends.http.connection import ConnectionPool
from llama_smart_proxy.proxy.chat import ChatRequest, Json, extensions_of, without_extensions
from llama_smart_proxy.proxy.dialects import ollama
from llama_smart_proxy.proxy.errors import BadRequest, ProxyError, UpstreamRefused
from llama_smart_proxy.proxy.http.body import serialise
from llama_smart_proxy.proxy.stream.answer import Finalizer
from llama_smart_proxy.proxy.stream.upstream import JSON_HEADERS, parsed_answer, post_json

logger = logging.getLogger(__name__)

LOOKUP_S = 10.0
"""Time limit in seconds for a request to the server that delays the end of an answer."""


async def with_context(model: Model, request: ChatRequest) -> tuple[ChatRequest, Finalizer | None]:
    """The request with the previous conversation prepended, and a finalizer for the new conversation's tokens.

    Raises: BadRequest for an invalid context, and for any context if the model's server has no tokenizer endpoint.
    """
    context: Any = extensions_of(request.body, "ollama").get("context")
    if Feature.TOKENS not in model.features:
        if context:
            raise BadRequest("the server of this model accepts no context")
        return request, None
    if request.is_text:
        return request, None  # raw, or fill-in-the-middle: Ollama returns no context then either
    if not context:
        return request, _context_of(request)
    try:
        past = (await post_json(model, "/detokenize", {"tokens": context})).get("content", "")
    except UpstreamRefused as exc:
        raise BadRequest(f"invalid context: {exc.message}") from exc
    prompt = f"{past}{(await post_json(model, '/apply-template', _template_body(request))).get('prompt', '')}"
    return ollama.as_text(request, prompt), _context_after(prompt)


def _context_of(request: ChatRequest) -> Finalizer:
    async def finalize(answer: str, server: ConnectionPool) -> Json:
        rendered = await _post(server, "/apply-template", _template_body(request))
        return await _tokens(server, f"{rendered.get('prompt', '')}{answer}")

    return _optional(finalize)


def _context_after(prompt: str) -> Finalizer:
    async def finalize(answer: str, server: ConnectionPool) -> Json:
        return await _tokens(server, f"{prompt}{answer}")

    return _optional(finalize)


def _optional(finalizer: Finalizer) -> Finalizer:
    """A failure to compute the context must not fail the answer: it is logged, and the context is omitted."""

    async def guarded(answer: str, server: ConnectionPool) -> Json:
        try:
            return await finalizer(answer, server)
        except ProxyError as exc:
            logger.info("no context can be returned: %s", exc)
            return {}

    return guarded


async def _tokens(server: ConnectionPool, text: str) -> Json:
    answer = await _post(server, "/tokenize", {"content": text, "parse_special": True})
    return {"context": answer.get("tokens", [])}


async def _post(server: ConnectionPool, path: str, body: Json) -> Json:
    request = UpstreamRequest("POST", path, serialise(body), JSON_HEADERS)
    return parsed_answer((await server.fetch(request, timeout_s=LOOKUP_S))[1])


def _template_body(request: ChatRequest) -> Json:
    body = without_extensions(request.body)
    return {key: body[key] for key in ("messages", "chat_template_kwargs") if key in body}
