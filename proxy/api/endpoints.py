"""The endpoints that use a model: their properties, and the handler of their requests.

`EndpointHandler.handle` is the entry point: it resolves the model, and passes requests for a generated answer to
`proxy.api.chat`; all others are answered here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import orjson
from aiohttp import web

from llama_smart_proxy.backends.base import Model
from llama_smart_proxy.proxy.api.chat import Amending, Chat, Preparation, relay_request
from llama_smart_proxy.proxy.api.dispatcher import reported
from llama_smart_proxy.proxy.api.generate_context import with_context
from llama_smart_proxy.proxy.api.input_tokens import count_input_tokens
from llama_smart_proxy.proxy.api.llama_server import apply_autoload
from llama_smart_proxy.proxy.api.refusals import amended
from llama_smart_proxy.proxy.api.state import PROXY
from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.dialects import (
    ANTHROPIC,
    NATIVE,
    OLLAMA,
    OPENAI,
    RESPONSES,
    Dialect,
    anthropic,
    openai,
    responses,
)
from llama_smart_proxy.proxy.dialects import ollama as ollama_dialect
from llama_smart_proxy.proxy.dialects.base import ClientCodec, Loading
from llama_smart_proxy.proxy.dialects.embeddings import (
    OLLAMA_EMBED,
    OLLAMA_EMBEDDINGS,
    OPENAI_EMBEDDINGS,
    EmbeddingClient,
)
from llama_smart_proxy.proxy.errors import AccessDenied, BadRequest, Cancelled, ModelNotFound, let_go
from llama_smart_proxy.proxy.http.body import Body, Reusable, offload, read_body
from llama_smart_proxy.proxy.http.headers import PARAMS, RECORD
from llama_smart_proxy.proxy.http.response import WholeResponse
from llama_smart_proxy.proxy.http.scopes import Scope
from llama_smart_proxy.proxy.log import access
from llama_smart_proxy.proxy.log.content import Exchange
from llama_smart_proxy.proxy.models.router import Route
from llama_smart_proxy.proxy.stream.embeddings import embed
from llama_smart_proxy.proxy.stream.waiting import Wait

logger = logging.getLogger(__name__)

OFF_LOOP_VECTORS = 64
"""Answers with more vectors are serialised in a thread, so that other requests are not delayed."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One endpoint that uses a model. A server that supports `api` gets the request unchanged. For any other server it
    is translated by `codec` (chat and text) or `embeddings`, or answered by `count`; without any, it is refused.

    `slot`: a call occupies one of the server's slots. `preparation` completes a decoded request, with requests to the
    model's server, and `amending` one that it has refused. `generates`: the endpoint generates text but has no codec,
    so agents do not run there. `path` is the server's own one, if that differs from the client's. Clients require
    `scope`.
    """

    dialect: Dialect = OPENAI
    api: str = "openai"
    methods: frozenset[str] = frozenset({"POST"})
    slot: bool = True
    codec: ClientCodec | None = None
    preparation: Preparation | None = None
    embeddings: EmbeddingClient | None = None
    amending: Amending | None = None
    count: Callable[[Model, Json], Awaitable[Json]] | None = None
    generates: bool = False
    path: str = ""
    scope: Scope = Scope.INFERENCE


async def _estimated_tokens(model: Model, body: Json) -> Json:
    """`POST /v1/messages/count_tokens` for servers without a tokenizer endpoint."""
    return {"input_tokens": anthropic.count_tokens(body)}


NATIVE_UTILITY = Endpoint(api="native", slot=False)
NATIVE_JSON = Endpoint(api="native")
NATIVE_ANSWER = Endpoint(NATIVE, api="native", generates=True)
_READABLE = frozenset({"GET", "HEAD"})

ENDPOINTS: dict[str, Endpoint] = {
    "/v1/chat/completions": Endpoint(codec=openai.CHAT),
    "/v1/completions": Endpoint(codec=openai.TEXT),
    "/v1/embeddings": Endpoint(embeddings=OPENAI_EMBEDDINGS),
    "/v1/rerank": NATIVE_JSON,
    "/v1/reranking": NATIVE_JSON,
    "/v1/responses": Endpoint(RESPONSES, api="responses", codec=responses.CODEC),
    "/v1/responses/input_tokens": Endpoint(RESPONSES, api="responses", slot=False, count=count_input_tokens),
    "/v1/messages": Endpoint(ANTHROPIC, api="anthropic", codec=anthropic.MESSAGES),
    "/v1/messages/count_tokens": Endpoint(ANTHROPIC, api="anthropic", slot=False, count=_estimated_tokens),
    "/v1/chat/completions/input_tokens": NATIVE_UTILITY,
    "/v1/chat/completions/control": NATIVE_UTILITY,
    "/v1/systemone": NATIVE_JSON,
    "/chat/completions/input_tokens": NATIVE_UTILITY,
    "/chat/completions": Endpoint(codec=openai.CHAT),
    "/completion": NATIVE_ANSWER,
    "/completions": NATIVE_ANSWER,
    "/infill": NATIVE_ANSWER,
    "/embedding": NATIVE_JSON,
    "/embeddings": NATIVE_JSON,
    "/rerank": NATIVE_JSON,
    "/reranking": NATIVE_JSON,
    "/tokenize": NATIVE_UTILITY,
    "/detokenize": NATIVE_UTILITY,
    "/apply-template": NATIVE_UTILITY,
    # GET, and the methods of other paths that are not here: `proxy.api.llama_server`
    "/props": Endpoint(api="native", slot=False, scope=Scope.ADMIN),
    "/slots": Endpoint(api="native", slot=False, methods=_READABLE),
    "/slots/{id:[0-9]{1,9}}": Endpoint(api="native", slot=False, scope=Scope.ADMIN),
    "/lora-adapters": Endpoint(api="native", slot=False, methods=_READABLE),
    "/api/chat": Endpoint(OLLAMA, api="ollama", codec=ollama_dialect.CHAT, amending=amended),
    "/api/generate": Endpoint(
        OLLAMA, api="ollama", codec=ollama_dialect.GENERATE, preparation=with_context, amending=amended
    ),
    "/api/embed": Endpoint(OLLAMA, api="ollama", embeddings=OLLAMA_EMBED),
    "/api/embeddings": Endpoint(OLLAMA, api="ollama", embeddings=OLLAMA_EMBEDDINGS),
}
"""By path; a part in braces matches one segment. Source: llama.cpp tools/server, b11434; Ollama's
server/routes.go; the OpenAI and Anthropic API references."""
for _path in ("/v1/messages", "/v1/messages/count_tokens", "/v1/responses", "/v1/responses/input_tokens"):
    ENDPOINTS[_path.removeprefix("/v1")] = replace(ENDPOINTS[_path], path=_path)


class EndpointHandler:
    """Serves one endpoint, with the proxy as each request's client sees it."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    async def handle(self, http: web.BaseRequest) -> web.StreamResponse:
        """Answer `http`. No reference to its parsed body is kept while an answer is relayed, which may take minutes."""
        proxy = http[PROXY]
        wait = Wait(proxy.waits, http, self._endpoint.dialect, self._endpoint.codec, proxy.router.shows)
        try:
            response = await self._handle(http, wait)
            if (exchange := http[RECORD].exchange) is not None and isinstance(response, WholeResponse | web.Response):
                exchange.add(response.body if isinstance(response.body, bytes) else None)
            return response
        except Exception as exc:
            if isinstance(exc, ConnectionError) or not wait.response.opened:
                raise
            if wait.response.begun and not isinstance(exc, Cancelled):
                raise
            error = reported(http, exc)
            logger.warning("stream aborted: %s", error)
            let_go(exc)
            return await wait.fail(error)
        except asyncio.CancelledError as exc:
            cancelled = http[RECORD].cancellation(exc)
            if not wait.response.opened:
                raise cancelled from None
            return await wait.fail(cancelled)
        finally:
            wait.end()
            if (exchange := http[RECORD].exchange) is not None:
                exchange.log(http[RECORD].request_id)
                http[RECORD].exchange = None

    async def _handle(self, http: web.BaseRequest, wait: Wait) -> web.StreamResponse:
        endpoint, proxy = self._endpoint, http[PROXY]
        parsed = await read_body(http, proxy.max_body_bytes) if http.method == "POST" else Body({}, None)
        reusable = parsed.reusable()
        body = parsed.value
        del parsed
        try:
            bind = partial(_bound, endpoint.dialect, http.get(PARAMS) or {})
            body = await offload(http, bind, body) if endpoint.dialect.binds_slowly(body) else bind(body)
            if access.with_content and endpoint.slot:
                http[RECORD].exchange = Exchange(body)
            unloads = self._unloads(body)
            if not proxy.grant.keep_alive:
                _leave_out_keep_alive(body, unloads=unloads)
            if self._streams(body):
                wait.start(body.get("model"))
            route = await self._route(http, body, pull=endpoint.slot and not unloads)
            if endpoint.codec is not None:
                answering = Chat(wait, proxy, endpoint, endpoint.codec).answer(route, body, reusable)
            else:
                answering = self._answer(wait, route, body, reusable)
            del body, reusable
            return await answering
        except RecursionError:
            raise BadRequest("the request body is nested too deeply", code="invalid_json") from None

    def _streams(self, body: Json) -> bool:
        endpoint = self._endpoint
        if endpoint.codec is not None:
            return endpoint.codec.streams(body)
        return endpoint.generates and body.get("stream") is True

    def _unloads(self, body: Json) -> bool:
        codec = self._endpoint.codec
        return codec is not None and codec.loading(body) is Loading.UNLOAD

    async def _route(self, http: web.BaseRequest, body: Json, *, pull: bool) -> Route:
        endpoint = self._endpoint
        named = body.get("model")
        named = http.query.get("model") if named in (None, "") else named
        try:
            route = await http[PROXY].router.resolve(named, pull=pull)
        except ModelNotFound as exc:
            raise endpoint.dialect.not_found(named, exc) from None
        http[RECORD].routed(route.model.name, route.model.kind)
        http[RECORD].slot = endpoint.slot
        if "Traceparent" in http.headers:
            http[RECORD].traceparent = http.headers["Traceparent"]
        if "autoload=" in http.raw_path:
            await apply_autoload(http, route.model)
        return route

    async def _answer(self, wait: Wait, route: Route, body: Json, reusable: Reusable | None) -> web.StreamResponse:
        """Answer a request without a codec; it is relayed if the model's server supports the API."""
        endpoint, model, http = self._endpoint, route.model, wait.response.http
        if endpoint.generates:
            http[PROXY].chain.check_none_required(http.headers, route.name)
        if endpoint.api in model.speaks and not self._is_limited(route, body):
            relaying = relay_request(wait, http[PROXY], endpoint, route, body, reusable)
            del body, reusable
            return await relaying
        if endpoint.count is not None:
            return web.json_response(await endpoint.count(model, body))
        if endpoint.embeddings is None:
            message = f"model {model.name[:100]!r} is on a server that does not have this endpoint"
            raise BadRequest(message, status=501, code="not_supported")
        request = endpoint.embeddings.decode(body)
        if request.keep_alive_s is not None:
            model.keep_loaded(request.keep_alive_s)
        embedded = await embed(model, request, timing=http[RECORD])
        return await _as_response(endpoint.embeddings.encode(route.shown, request, embedded), len(embedded.vectors))

    def _is_limited(self, route: Route, body: Json) -> bool:
        """Whether a server of this API would give embeddings that are not the client's: under another name, or of
        longer texts, because the model is loaded with a larger context size than the client's."""
        client = self._endpoint.embeddings
        if client is None or route.renamed:
            return client is not None
        asked = client.num_ctx(body)
        return asked is not None and route.model.prepare(dict(body)) not in (None, asked)


def _leave_out_keep_alive(body: Json, *, unloads: bool) -> None:
    """For a client that does not decide how long a model stays loaded. Raises: AccessDenied 403 if it asks to unload
    it; clients such as Open WebUI send a `keep_alive` with every request, which is no reason to refuse them."""
    if unloads:
        message = "unloading a model requires the scope admin, or server.inference_keys.may_keep_alive: true"
        raise AccessDenied(message, status=403)
    body.pop("keep_alive", None)


def _bound(dialect: Dialect, params: Mapping[str, str], body: Json) -> Json:
    return dialect.bind(body, params)


async def _as_response(answer: Any, vectors: int) -> web.Response:
    """The JSON response; with many vectors it is serialised in a thread."""
    if vectors > OFF_LOOP_VECTORS:
        data = await asyncio.get_running_loop().run_in_executor(None, orjson.dumps, answer)
    else:
        data = orjson.dumps(answer)
    return web.Response(body=data, content_type="application/json")
