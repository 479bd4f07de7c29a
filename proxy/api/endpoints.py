"""The reading spine: what happens to a request, top to bottom."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from aiohttp import web

from llama_smart_proxy.backends.base import Model, UpstreamRequest
from llama_smart_proxy.backends.http.exchange import UpstreamResponse
from llama_smart_proxy.proxy.api import embeddings
from llama_smart_proxy.proxy.api.ollama import LISTING_S
from llama_smart_proxy.proxy.api.ollama_chat import answer_load, check_capabilities, set_keep_alive, with_context
from llama_smart_proxy.proxy.api.state import MODEL, PROXY, Proxy
from llama_smart_proxy.proxy.chat import Json, Timing
from llama_smart_proxy.proxy.dialects import (
    ANTHROPIC,
    NATIVE,
    OLLAMA,
    OPENAI,
    RESPONSES,
    Dialect,
    anthropic,
    ollama,
    openai,
)
from llama_smart_proxy.proxy.dialects.base import Face
from llama_smart_proxy.proxy.errors import BadRequest, UpstreamRefused
from llama_smart_proxy.proxy.http.body import aside, read_json, to_bytes
from llama_smart_proxy.proxy.http.headers import upstream_headers
from llama_smart_proxy.proxy.middleware.agent_chat import AgentChat
from llama_smart_proxy.proxy.models.router import Route
from llama_smart_proxy.proxy.stream.relay import ask, relay
from llama_smart_proxy.proxy.stream.translate import Epilogue, Exchange, refusal
from llama_smart_proxy.proxy.stream.wires import wire_of, without_thoughts

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Api:
    """What the proxy knows of an endpoint: its dialect, its methods, and whether a call occupies a slot.

    A server whose backend speaks `family` gets the request as it is. For any other it is translated: with `face` if the
    endpoint generates, else by `convert`, which makes the answer's JSON; without either it cannot be had there.
    """

    dialect: Dialect = OPENAI
    methods: frozenset[str] = frozenset({"POST"})
    slot: bool = True
    family: str = "openai"
    face: Face | None = None
    convert: embeddings.Convert | None = None
    generates: bool = False
    """Whether it does without a face: agents do not run there."""


async def _count_tokens(backend: Model, model: str, body: Json) -> Json:
    """`POST /v1/messages/count_tokens` where the server has no tokenizer to ask: an estimate."""
    return {"input_tokens": anthropic.count_tokens(body)}


QUESTION = Api(slot=False, family="native")
NATIVE_JSON = Api(family="native")
NATIVE_ANSWER = Api(NATIVE, family="native", generates=True)

APIS: dict[str, Api] = {
    "/v1/chat/completions": Api(face=openai.CHAT),
    "/v1/completions": Api(face=openai.TEXT),
    "/v1/embeddings": Api(convert=embeddings.openai_from_ollama),
    "/v1/rerank": NATIVE_JSON,
    "/v1/reranking": NATIVE_JSON,
    "/v1/responses": Api(RESPONSES, family="responses", generates=True),
    "/v1/messages": Api(ANTHROPIC, family="anthropic", face=anthropic.MESSAGES),
    "/v1/messages/count_tokens": Api(ANTHROPIC, slot=False, family="anthropic", convert=_count_tokens),
    "/v1/chat/completions/input_tokens": QUESTION,
    "/v1/chat/completions/control": QUESTION,
    "/chat/completions": Api(face=openai.CHAT),
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
    "/props": Api(methods=frozenset({"GET", "HEAD", "POST"}), slot=False, family="native"),
    "/slots": Api(methods=frozenset({"GET", "HEAD"}), slot=False, family="native"),
    "/lora-adapters": Api(methods=frozenset({"GET", "HEAD", "POST"}), slot=False, family="native"),
    "/api/chat": Api(OLLAMA, family="ollama", face=ollama.CHAT),
    "/api/generate": Api(OLLAMA, family="ollama", face=ollama.GENERATE),
    "/api/embed": Api(OLLAMA, family="ollama", convert=embeddings.ollama_from_openai),
    "/api/embeddings": Api(OLLAMA, family="ollama", convert=embeddings.legacy_from_openai),
}
"""Every endpoint that asks a model's server. Source: llama.cpp tools/server, b11434; Ollama's server/routes.go; the
OpenAI and Anthropic API references."""

SLOT_ACTION = QUESTION
"""`POST /slots/{id}?action=save|restore|erase`, the one relayed endpoint whose path varies."""


class RelayHandler:
    """Serves one endpoint of `APIS`."""

    def __init__(self, api: Api, proxy: Proxy) -> None:
        self.api = api
        self._proxy = proxy
        self._max_bytes = proxy.max_body_bytes
        self._stall_s = proxy.config.server.send_stall_s

    async def handle(self, http: web.Request) -> web.StreamResponse:
        """Answer `http`; its parsed body is let go before a relayed answer begins."""
        chain, api = self._proxy.chain, self.api
        target, body = await self._understand(http)
        try:
            if api.face is None:
                if api.generates:
                    chain.check_unneeded(http.headers, target.name)
            elif chain.concerns(http.headers, body, target.name) and not self._only_loads(body):
                agents = AgentChat(http, self._proxy, api.face, api.family, partial(self._plain, http))
                return await agents.answer(target, body)
            answering = self._plain(http, target, body)
            del body  # only `_plain` has it now, and lets it go when it was sent
            return await answering
        except RecursionError:
            raise BadRequest("the request body is nested too deeply", code="invalid_json") from None

    def _only_loads(self, body: Json) -> bool:
        return self.api.family == "ollama" and ollama.is_load(body, chat=self.api.face is ollama.CHAT)

    async def _understand(self, http: web.Request) -> tuple[Route, Json]:
        """Where the request goes, and its body."""
        api = self.api
        body = await read_json(http, self._max_bytes) if http.method == "POST" else {}
        if api.family == "ollama":
            body = ollama.folded(body)
        named = body.get("model")
        target = await self._proxy.router.resolve(
            http.query.get("model") if named in (None, "") else named,
            pull=api.slot and not (api.family == "ollama" and ollama.is_unload(body, chat=api.face is ollama.CHAT)),
        )
        http[MODEL] = target.model.name
        return target, body

    async def _plain(self, http: web.Request, target: Route, body: Json) -> web.StreamResponse:
        """Answer without agents: byte for byte if the model's server speaks the client's API, else translated."""
        if self.api.family not in target.model.speaks:
            return await self._translate(http, target, body)
        call = await self._call(http, target, body)
        del body  # the answer may last for minutes
        answer = partial(relay, http, dialect=self.api.dialect, stall_s=self._stall_s)
        if self.api.family == "ollama":
            answer = partial(_relay_json, answer)
        return await ask(http, target.model, call, answer)

    async def _call(self, http: web.Request, target: Route, body: Json) -> UpstreamRequest:
        has_body, prepared = http.method == "POST", None
        if has_body:
            body["model"] = target.model.name
            prepared = target.model.prepare(body)
        return UpstreamRequest(
            method=http.method,
            path=_upstream_path(http, target.model.name),
            body=await to_bytes(http, body) if has_body else b"",
            headers=upstream_headers(http.headers, has_body=has_body),
            slot=self.api.slot,
            prepared=prepared,
        )

    async def _translate(self, http: web.Request, target: Route, body: Json) -> web.StreamResponse:
        api, backend = self.api, target.model
        body["model"] = target.model.name
        if api.convert is not None:
            return await embeddings.as_response(await api.convert(backend, target.model.name, body))
        if api.face is None:
            words = f"model {target.model.name[:100]!r} is on a server that does not have this endpoint"
            raise BadRequest(words, status=501, code="not_supported")
        if api.family == "ollama":
            loaded = await answer_load(backend, target.model.name, body, chat=api.face is ollama.CHAT)
            if loaded is not None:
                return loaded
            await check_capabilities(backend, body)
        timing = Timing(time.monotonic())
        request = await aside(http, api.face.decode, body)
        epilogue: Epilogue | None = None
        if api.face is ollama.GENERATE:
            request, epilogue = await with_context(backend, request)
        if api.family == "ollama":
            set_keep_alive(backend, body)  # not before the request is known to be good, and its questions are answered
        exchange = Exchange(http, api.face, wire_of(backend), request, timing, self._stall_s, epilogue)
        return await self._exchange(exchange, backend, upstream_headers(http.headers, has_body=True))

    async def _exchange(self, exchange: Exchange, backend: Model, headers: list[tuple[str, str]]) -> web.StreamResponse:
        try:
            return await exchange.run(backend, headers)
        except UpstreamRefused as exc:
            # On /api that is the answer; the other APIs ask for thoughts as a wish, and clients do so of every model.
            if self.api.family == "ollama" or not without_thoughts(exchange.request, exc):
                raise
        return await exchange.run(backend, headers)


async def _relay_json(
    passing: Callable[[UpstreamResponse], Awaitable[web.StreamResponse]], upstream: UpstreamResponse
) -> web.StreamResponse:
    """Pass on what an Ollama says; but an error page of what stands in front of it as an error its clients can read."""
    if upstream.status >= 400 and not upstream.header("content-type").startswith("application/json"):
        raise await refusal(upstream)
    return await passing(upstream)


def _upstream_path(http: web.Request, model: str) -> str:
    """The matched path, without the trailing slash some clients add, and the query as it came; but a model named there
    by the name the server knows."""
    path, mark, query = http.raw_path.partition("?")
    if mark and http.query.get("model", model) != model:
        query = http.rel_url.update_query(model=model).raw_query_string
    return (http.path.rstrip("/") if path[-1] == "/" or "%" in path else path) + mark + query


async def list_models(http: web.Request) -> web.Response:
    """`GET /v1/models`, and `GET /models` of llama-server's router mode: from memory, at once."""
    router = http.app[PROXY].router
    await router.listed(LISTING_S)
    data = [entry.as_openai(router.created) for entry in router.catalogue()]
    return web.json_response({"object": "list", "data": data})


async def show_model(http: web.Request) -> web.Response:
    """`GET /v1/models/{id}`; ids may hold slashes."""
    router = http.app[PROXY].router
    wanted = http.match_info["id"].rstrip("/")
    entry = router.entry(await router.resolve(wanted, pull=False))
    return web.json_response(entry.as_openai(router.created))
