"""`/api/chat` and `/api/generate` over models that Ollama does not run: what goes beyond a translation.

Loading and unloading, `keep_alive`, and `/api/generate`'s `context`, which is a conversation as tokens.
Source: Ollama's server/routes.go; llama.cpp tools/server for `/apply-template`, `/tokenize` and `/detokenize`.
"""

from __future__ import annotations

import logging
from typing import Any

import orjson
from aiohttp import web

from llama_smart_proxy.backends.base import Feature, Model, UpstreamRequest
from llama_smart_proxy.backends.http.connection import ConnectionPool
from llama_smart_proxy.proxy.chat import ChatRequest, Json, bare, kept
from llama_smart_proxy.proxy.dialects import ollama
from llama_smart_proxy.proxy.errors import BadRequest, ProxyError, UpstreamRefused
from llama_smart_proxy.proxy.http.body import serialise
from llama_smart_proxy.proxy.stream.translate import JSON_HEADERS, Epilogue, question, understood

logger = logging.getLogger(__name__)

QUESTION_S = 10.0
"""Seconds that a question to a server may take which is asked while an answer waits."""


async def answer_load(backend: Model, model: str, body: Json, *, chat: bool) -> web.Response | None:
    """The answer to a request that only loads the model, or with `keep_alive` 0 unloads it; None for any other one."""
    if not ollama.is_load(body, chat=chat):
        return None
    unload = ollama.keep_alive_s(body.get("keep_alive")) == 0
    if unload:
        await backend.unload()
    else:
        set_keep_alive(backend, body)
        await backend.load()
    reply = ollama.load_reply(model, chat=chat, reason="unload" if unload else "load")
    return web.Response(body=orjson.dumps(reply), content_type="application/json")


def set_keep_alive(backend: Model, body: Json) -> None:
    """What the request says of how long the model stays; the last request's word counts."""
    seconds = ollama.keep_alive_s(body.get("keep_alive"))
    if seconds is not None:
        backend.keep_loaded(seconds)


async def check_capabilities(backend: Model, body: Json) -> None:
    """Refuse `think` where the model is known not to, as Ollama does. Raises: BadRequest."""
    if not body.get("think"):
        return
    able = (await backend.info()).capabilities
    if able and "thinking" not in able:
        raise BadRequest(f'"{backend.name}" does not support thinking')


async def with_context(backend: Model, request: ChatRequest) -> tuple[ChatRequest, Epilogue | None]:
    """The request with the conversation so far in front of it, and what tells the new conversation's tokens at the end.

    Only llama-server can do that; of other servers a `context` is refused, and none is told.
    """
    context: Any = kept(request.body, "ollama").get("context")
    if Feature.TOKENS not in backend.features:
        if context:
            raise BadRequest("the server of this model takes no context")
        return request, None
    if request.is_text:
        return request, None  # raw, or fill-in-the-middle: Ollama tells no context then either
    if not context:
        return request, _context_of(request)
    try:
        past = (await question(backend, "/detokenize", {"tokens": context})).get("content", "")
    except UpstreamRefused as exc:
        raise BadRequest(f"invalid context: {exc.message}") from exc
    prompt = f"{past}{(await question(backend, '/apply-template', _template_body(request))).get('prompt', '')}"
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
            logger.info("no context can be told: %s", exc.message)
            return {}

    return lenient


async def _tokens(server: ConnectionPool, text: str) -> Json:
    answer = await _ask(server, "/tokenize", {"content": text, "parse_special": True})
    return {"context": answer.get("tokens", [])}


async def _ask(server: ConnectionPool, path: str, body: Json) -> Json:
    call = UpstreamRequest("POST", path, serialise(body), JSON_HEADERS)
    return understood((await server.fetch(call, timeout_s=QUESTION_S))[1])


def _template_body(request: ChatRequest) -> Json:
    body = bare(request.body)
    return {key: body[key] for key in ("messages", "chat_template_kwargs") if key in body}
