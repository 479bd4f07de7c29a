"""The endpoints that ask a model: what the proxy knows of each, and how a request to one is answered.

`EndpointHandler.handle` is where to begin reading: it finds the model, and hands a request for a generated answer to
`proxy.api.chat`; all others are answered here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson
from aiohttp import web

from llama_smart_proxy.proxy.api.chat import Chat, Prologue, relayed
from llama_smart_proxy.proxy.api.generate_context import with_context
from llama_smart_proxy.proxy.api.state import Proxy
from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.dialects import ANTHROPIC, NATIVE, OLLAMA, OPENAI, RESPONSES, Dialect, anthropic, openai
from llama_smart_proxy.proxy.dialects import ollama as ollama_dialect
from llama_smart_proxy.proxy.dialects.base import ClientCodec, Loading
from llama_smart_proxy.proxy.dialects.embeddings import (
    OLLAMA_EMBED,
    OLLAMA_EMBEDDINGS,
    OPENAI_EMBEDDINGS,
    EmbeddingClient,
)
from llama_smart_proxy.proxy.errors import BadRequest
from llama_smart_proxy.proxy.http.body import Body, Reusable, read_body
from llama_smart_proxy.proxy.http.headers import PARAMS, RECORD
from llama_smart_proxy.proxy.models.router import Route
from llama_smart_proxy.proxy.stream.embeddings import embed

MANY = 64
"""More vectors than are turned into text while others wait."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One endpoint that asks a model. A model whose server speaks `api` gets the request as it is; for any other one
    it is translated: by `codec` if the endpoint generates, by `embeddings`, or answered by `estimate`; without any of
    these it cannot be had there.

    `slot`: a call occupies one of the server's slots. `prologue` completes a decoded request, with questions to the
    model. `generates`: without a codec; agents do not run there.
    """

    dialect: Dialect = OPENAI
    api: str = "openai"
    methods: frozenset[str] = frozenset({"POST"})
    slot: bool = True
    codec: ClientCodec | None = None
    prologue: Prologue | None = None
    embeddings: EmbeddingClient | None = None
    estimate: Callable[[Json], Json] | None = None
    generates: bool = False


def _estimated_tokens(body: Json) -> Json:
    """`POST /v1/messages/count_tokens` where the server has no tokenizer to ask."""
    return {"input_tokens": anthropic.count_tokens(body)}


QUESTION = Endpoint(api="native", slot=False)
NATIVE_JSON = Endpoint(api="native")
NATIVE_ANSWER = Endpoint(NATIVE, api="native", generates=True)
_READABLE = frozenset({"GET", "HEAD"})

ENDPOINTS: dict[str, Endpoint] = {
    "/v1/chat/completions": Endpoint(codec=openai.CHAT),
    "/v1/completions": Endpoint(codec=openai.TEXT),
    "/v1/embeddings": Endpoint(embeddings=OPENAI_EMBEDDINGS),
    "/v1/rerank": NATIVE_JSON,
    "/v1/reranking": NATIVE_JSON,
    "/v1/responses": Endpoint(RESPONSES, api="responses", generates=True),
    "/v1/messages": Endpoint(ANTHROPIC, api="anthropic", codec=anthropic.MESSAGES),
    "/v1/messages/count_tokens": Endpoint(ANTHROPIC, api="anthropic", slot=False, estimate=_estimated_tokens),
    "/v1/chat/completions/input_tokens": QUESTION,
    "/v1/chat/completions/control": QUESTION,
    "/chat/completions": Endpoint(codec=openai.CHAT),
    "/completion": NATIVE_ANSWER,
    "/completions": NATIVE_ANSWER,
    "/infill": NATIVE_ANSWER,
    "/embedding": NATIVE_JSON,
    "/embeddings": NATIVE_JSON,
    "/rerank": NATIVE_JSON,
    "/reranking": NATIVE_JSON,
    "/tokenize": QUESTION,
    "/detokenize": QUESTION,
    "/apply-template": QUESTION,
    "/props": Endpoint(api="native", slot=False, methods=_READABLE | {"POST"}),
    "/slots": Endpoint(api="native", slot=False, methods=_READABLE),
    r"/slots/{id:\d+}": QUESTION,
    "/lora-adapters": Endpoint(api="native", slot=False, methods=_READABLE | {"POST"}),
    "/api/chat": Endpoint(OLLAMA, api="ollama", codec=ollama_dialect.CHAT),
    "/api/generate": Endpoint(OLLAMA, api="ollama", codec=ollama_dialect.GENERATE, prologue=with_context),
    "/api/embed": Endpoint(OLLAMA, api="ollama", embeddings=OLLAMA_EMBED),
    "/api/embeddings": Endpoint(OLLAMA, api="ollama", embeddings=OLLAMA_EMBEDDINGS),
}
"""By path; a part in braces matches one segment of it. Source: llama.cpp tools/server, b11434; Ollama's
server/routes.go; the OpenAI and Anthropic API references."""


class EndpointHandler:
    """Serves one endpoint."""

    def __init__(self, endpoint: Endpoint, proxy: Proxy) -> None:
        self._endpoint = endpoint
        self._proxy = proxy
        self._max_bytes = proxy.max_body_bytes

    async def handle(self, http: web.BaseRequest) -> web.StreamResponse:
        """Answer `http`. Its parsed body is let go before a relayed answer begins, which may last for minutes."""
        endpoint = self._endpoint
        parsed = await read_body(http, self._max_bytes) if http.method == "POST" else Body({}, None)
        reusable = parsed.reusable()
        body = parsed.value
        del parsed
        try:
            body = endpoint.dialect.bind(body, http.get(PARAMS) or {})
            route = await self._route(http, body)
            if endpoint.codec is not None:
                answering = Chat(http, self._proxy, endpoint, endpoint.codec).answer(route, body, reusable)
            else:
                answering = self._answer(http, route, body, reusable)
            del body, reusable
            return await answering
        except RecursionError:
            raise BadRequest("the request body is nested too deeply", code="invalid_json") from None

    async def _route(self, http: web.BaseRequest, body: Json) -> Route:
        endpoint = self._endpoint
        named = body.get("model")
        unloads = endpoint.codec is not None and endpoint.codec.loading(body) is Loading.UNLOAD
        route = await self._proxy.router.resolve(
            http.query.get("model") if named in (None, "") else named, pull=endpoint.slot and not unloads
        )
        http[RECORD].routed(route.model.name, route.model.kind)
        return route

    async def _answer(
        self, http: web.BaseRequest, route: Route, body: Json, reusable: Reusable | None
    ) -> web.StreamResponse:
        """Answer what generates no chat and no text: as it is if the model's server speaks the API."""
        endpoint, model = self._endpoint, route.model
        if endpoint.generates:
            self._proxy.chain.check_unneeded(http.headers, route.name)
        if endpoint.api in model.speaks:
            relaying = relayed(http, self._proxy, endpoint, route, body, reusable)
            del body, reusable
            return await relaying
        if endpoint.estimate is not None:
            return web.json_response(endpoint.estimate(body))
        if endpoint.embeddings is None:
            message = f"model {model.name[:100]!r} is on a server that does not have this endpoint"
            raise BadRequest(message, status=501, code="not_supported")
        request = endpoint.embeddings.decode(body)
        if request.keep_alive_s is not None:
            model.keep_loaded(request.keep_alive_s)
        embedded = await embed(model, request)
        return await _as_response(endpoint.embeddings.encode(model.name, request, embedded), len(embedded.vectors))


async def _as_response(answer: Any, vectors: int) -> web.Response:
    """Thousands of vectors are turned into text in a thread."""
    if vectors > MANY:
        data = await asyncio.get_running_loop().run_in_executor(None, orjson.dumps, answer)
    else:
        data = orjson.dumps(answer)
    return web.Response(body=data, content_type="application/json")
