"""The reading spine: what happens to a request, top to bottom."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

from aiohttp import web

from backends import Backend, Call
from backends.spawned import SpawnedModel
from proxy.body import read_json, to_bytes
from proxy.config import Config
from proxy.dialects import ANTHROPIC, NATIVE, OPENAI, RESPONSES, Dialect
from proxy.errors import BadRequest, ModelNotFound, UpstreamFailed
from proxy.headers import shown_path, upstream_headers
from proxy.relay import relay
from proxy.router import Router

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Api:
    """What the proxy knows of an endpoint: its dialect, its methods, and whether a call occupies a slot."""

    dialect: Dialect = OPENAI
    methods: frozenset[str] = frozenset({"POST"})
    slot: bool = True


QUESTION = Api(slot=False)

APIS: dict[str, Api] = {
    "/v1/chat/completions": Api(),
    "/v1/completions": Api(),
    "/v1/embeddings": Api(),
    "/v1/rerank": Api(),
    "/v1/reranking": Api(),
    "/v1/responses": Api(RESPONSES),
    "/v1/messages": Api(ANTHROPIC),
    "/v1/messages/count_tokens": Api(ANTHROPIC, slot=False),
    "/v1/chat/completions/input_tokens": QUESTION,
    "/v1/chat/completions/control": QUESTION,
    "/chat/completions": Api(),
    "/completion": Api(NATIVE),
    "/completions": Api(NATIVE),
    "/infill": Api(NATIVE),
    "/embedding": Api(),
    "/embeddings": Api(),
    "/rerank": Api(),
    "/reranking": Api(),
    "/tokenize": QUESTION,
    "/detokenize": QUESTION,
    "/apply-template": QUESTION,
    "/props": Api(methods=frozenset({"GET", "HEAD", "POST"}), slot=False),
    "/slots": Api(methods=frozenset({"GET", "HEAD"}), slot=False),
    "/lora-adapters": Api(methods=frozenset({"GET", "HEAD", "POST"}), slot=False),
}
"""Every endpoint that is relayed. Source: llama.cpp tools/server, b11434; the OpenAI and Anthropic API references."""

SLOT_ACTION = QUESTION
"""`POST /slots/{id}?action=save|restore|erase`, the one relayed endpoint whose path varies."""


@dataclass(frozen=True, slots=True)
class Proxy:
    """What the handlers share. `draining` is set from the moment the proxy was asked to stop."""

    config: Config
    router: Router
    draining: asyncio.Event = field(default_factory=asyncio.Event)


PROXY = web.AppKey("proxy", Proxy)
MODEL = web.RequestKey("model", str)
"""The model that a request turned out to be for; the access line shows it."""


class RelayHandler:
    """Serves one endpoint of `APIS`."""

    def __init__(self, api: Api, proxy: Proxy) -> None:
        self.api = api
        self._proxy = proxy
        self._max_bytes = proxy.config.server.max_body_mib * 2**20

    async def handle(self, http: web.Request) -> web.StreamResponse:
        """Answer `http`; its parsed body is let go before the answer begins."""
        return await self._answer(http, *await self._understand(http))

    async def _understand(self, http: web.Request) -> tuple[Backend, Call]:
        has_body = http.method == "POST"
        body = await read_json(http, self._max_bytes) if has_body else {}
        named = body.get("model")
        target = await self._proxy.router.resolve(http.query.get("model") if named in (None, "") else named)
        http[MODEL] = target.model
        if has_body:
            body["model"] = target.model
        call = Call(
            method=http.method,
            path=_upstream_path(http, target.model),
            body=await to_bytes(http, body) if has_body else b"",
            headers=upstream_headers(http.headers, has_body=has_body),
            slot=self.api.slot,
        )
        return target.backend, call

    async def _answer(self, http: web.Request, backend: Backend, call: Call) -> web.StreamResponse:
        """Relay the call. While the client has no byte yet, a server that broke off gets one more chance: by then its
        instance is gone, and the second try meets a fresh one."""
        stall_s = self._proxy.config.server.send_stall_s
        try:
            async with backend.open(call) as upstream:
                return await relay(http, upstream, self.api.dialect, stall_s=stall_s)
        except UpstreamFailed as exc:
            if exc.status != 502:
                raise
            logger.warning("%s before the first byte: %s; trying once more", shown_path(http), exc)
        async with backend.open(call) as upstream:
            return await relay(http, upstream, self.api.dialect, stall_s=stall_s)


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
    data = [entry.as_openai(router.created) for entry in router.catalogue()]
    return web.json_response({"object": "list", "data": data})


async def show_model(http: web.Request) -> web.Response:
    """`GET /v1/models/{id}`; ids may hold slashes."""
    router = http.app[PROXY].router
    wanted = http.match_info["id"].rstrip("/")
    entry = router.entry(await router.resolve(wanted))
    return web.json_response(entry.as_openai(router.created))


async def load_model(http: web.Request) -> web.Response:
    """`POST /models/load` of llama-server's router mode: answers at once, the load goes on."""
    spawned = await _named_local(http)
    spawned.pool.begin_load(spawned.name, spawned.model)
    return web.json_response({"success": True})


async def unload_model(http: web.Request) -> web.Response:
    """`POST /models/unload`: answers once the process has ended; one that is answering ends after its answers."""
    spawned = await _named_local(http)
    await spawned.pool.unload(spawned.name)
    return web.json_response({"success": True})


async def _named_local(http: web.Request) -> SpawnedModel:
    proxy = http.app[PROXY]
    body = await read_json(http, proxy.config.server.max_body_mib * 2**20)
    name = body.get("model")
    if not isinstance(name, str) or not name:
        raise BadRequest("model is required", param="model")
    spawned = proxy.router.local(name)
    if spawned is None:
        raise ModelNotFound(f"model {name[:100]!r} is not one this proxy runs itself", param="model")
    return spawned
