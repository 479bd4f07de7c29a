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
from llama_smart_proxy.proxy.stream.answer import Epilogue
from llama_smart_proxy.proxy.stream.upstream import JSON_HEADERS, parsed_answer, question

logger = logging.getLogger(__name__)

QUESTION_S = 10.0
"""Seconds that a question to a server may take which is asked while an answer waits."""


async def with_context(model: Model, request: ChatRequest) -> tuple[ChatRequest, Epilogue | None]:
    """The request with the conversation so far in front of it, and what finds the tokens of the new conversation in
    the end.

    Raises: BadRequest for a context that is invalid, or whose model's server has no tokenizer to ask.
    """
    context: Any = extensions_of(request.body, "ollama").get("context")
    if Feature.TOKENS not in model.features:
        if context:
            raise BadRequest("the server of this model takes no context")
        return request, None
    if request.is_text:
        return request, None  # raw, or fill-in-the-middle: Ollama returns no context then either
    if not context:
        return request, _context_of(request)
    try:
        past = (await question(model, "/detokenize", {"tokens": context})).get("content", "")
    except UpstreamRefused as exc:
        raise BadRequest(f"invalid context: {exc.message}") from exc
    prompt = f"{past}{(await question(model, '/apply-template', _template_body(request))).get('prompt', '')}"
    return ollama.as_text(request, prompt), _context_after(prompt)


def _context_of(request: ChatRequest) -> Epilogue:
    async def ask(said: str, server: ConnectionPool) -> Json:
        answer = await _ask(server, "/apply-template", _template_body(request))
        return await _tokens(server, f"{answer.get('prompt', '')}{said}")

    return _leniently(ask)


def _context_after(prompt: str) -> Epilogue:
    async def ask(said: str, server: ConnectionPool) -> Json:
        return await _tokens(server, f"{prompt}{said}")

    return _leniently(ask)


def _leniently(ask: Epilogue) -> Epilogue:
    """Without its context an answer is still an answer."""

    async def lenient(said: str, server: ConnectionPool) -> Json:
        try:
            return await ask(said, server)
        except ProxyError as exc:
            logger.info("no context can be returned: %s", exc.message)
            return {}

    return lenient


async def _tokens(server: ConnectionPool, text: str) -> Json:
    answer = await _ask(server, "/tokenize", {"content": text, "parse_special": True})
    return {"context": answer.get("tokens", [])}


async def _ask(server: ConnectionPool, path: str, body: Json) -> Json:
    request = UpstreamRequest("POST", path, serialise(body), JSON_HEADERS)
    return parsed_answer((await server.fetch(request, timeout_s=QUESTION_S))[1])


def _template_body(request: ChatRequest) -> Json:
    body = without_extensions(request.body)
    return {key: body[key] for key in ("messages", "chat_template_kwargs") if key in body}
