"""Handles a request for a generated answer, from the client's body to the client's bytes.

There are three paths. If the model's server supports the client's API and no agent reads the answer, the server's
bytes are relayed. Otherwise its chunks are translated and passed through the agents that read them. If an agent answers
the request, no model is involved.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import orjson
from aiohttp import web

from llama_smart_proxy.backends.base import Feature, Model, Priority, UpstreamRequest
from llama_smart_proxy.backends.journal import StepKind
from llama_smart_proxy.backends.tasks import Task
from llama_smart_proxy.proxy.api.background import mark, priority_of, task_of
from llama_smart_proxy.proxy.api.state import Proxy
from llama_smart_proxy.proxy.api.usage import usage_of
from llama_smart_proxy.proxy.chat import ChatRequest, Chunk, Json, first_problem, say
from llama_smart_proxy.proxy.dialects import UPSTREAM_CODECS
from llama_smart_proxy.proxy.dialects.base import ClientCodec, Loading, UpstreamCodec
from llama_smart_proxy.proxy.errors import AgentError, BadRequest, ProxyError, UpstreamRefused
from llama_smart_proxy.proxy.http.body import Reusable, offload, to_bytes
from llama_smart_proxy.proxy.http.headers import CONVERSATION, RECORD, upstream_headers, upstream_query
from llama_smart_proxy.proxy.middleware.afterwards import Heard
from llama_smart_proxy.proxy.middleware.chain import Selection
from llama_smart_proxy.proxy.middleware.context import AgentContext, RequestFacts
from llama_smart_proxy.proxy.middleware.hooks import run_request_hooks
from llama_smart_proxy.proxy.middleware.layers import choices_of, reply_layer, response_layer
from llama_smart_proxy.proxy.middleware.scope import Scope
from llama_smart_proxy.proxy.middleware.side_calls import SideCalls, check_depth
from llama_smart_proxy.proxy.models.router import Route
from llama_smart_proxy.proxy.stream.answer import Finalizer, ModelAnswer, respond, respond_unstreamed
from llama_smart_proxy.proxy.stream.decoder import Progressed
from llama_smart_proxy.proxy.stream.relay import relay
from llama_smart_proxy.proxy.stream.sinks import UNENCODABLE
from llama_smart_proxy.proxy.stream.upstream import ANSWER_LIMIT
from llama_smart_proxy.proxy.stream.waiting import Wait

if TYPE_CHECKING:
    from llama_smart_proxy.proxy.api.endpoints import Endpoint

Preparation = Callable[[Model, ChatRequest], Awaitable[tuple[ChatRequest, Finalizer | None]]]
"""Completes a decoded request for a server that does not support the client's API."""
Amending = Callable[[Model, ChatRequest, UpstreamRefused], Awaitable[ChatRequest | None]]
"""Returns such a request as the server may accept it after its refusal; None if there is none."""
_OF_ANSWER = ("model", "n", "stream_options")
"""Fields of a request that its answer depends on."""
_NOT_JSON = re.compile("not JSON serializable|Dict key must")
"""orjson's messages about values that JSON cannot represent."""
_THINKING = ("chat_template_kwargs", "reasoning_effort", "think", "thinking_budget_tokens")
"""Fields that enable or configure thinking."""


@dataclass(slots=True)
class Chat:
    """One request to a generating endpoint, in the API of `codec`; `wait` is its client's."""

    wait: Wait
    proxy: Proxy
    endpoint: Endpoint
    codec: ClientCodec
    keep_alive: object = None
    agents: Sequence[str] = ()
    renamed: bool = False
    task: Task | None = None
    progressed: Progressed | None = None

    @property
    def http(self) -> web.BaseRequest:
        return self.wait.response.http

    async def answer(self, route: Route, body: Json, reusable: Reusable | None) -> web.StreamResponse:
        """Answer the request, with the agents that apply to it. `reusable` are the bytes that `body` came as."""
        self.keep_alive, self.renamed = body.get("keep_alive"), route.renamed
        self.task = task_of(self.codec, body, route.model, self.proxy.config.server_pool)
        loading = self.codec.loading(body)
        chain = self.proxy.chain
        if loading is None and chain.may_apply(self.http.headers, body, route.name, self.codec):
            await chain.plugins.refresh()
            background = self.task is not None
            selection = chain.select(self.http.headers, body, route.name, self.codec, background=background)
            if selection.chain or selection.reply is not None:
                del reusable
                return await self._with_agents(route, body, selection)
        if self._is_native(route.model):
            relaying = relay_request(self.wait, self.proxy, self.endpoint, route, body, reusable, self.task)
            del body, reusable
            return await relaying
        if loading is not None:
            return await self._load(route, loading)
        await self._check_capabilities(route.model, body)
        body["model"] = route.model.name
        return await self._stream(route, await self._decoded(route, body))

    # -- without agents in the answer --------------------------------------------------------------------------------

    def _is_native(self, model: Model) -> bool:
        return self.endpoint.api in model.speaks and not self.renamed

    async def _decoded(self, route: Route, body: Json) -> ChatRequest:
        decode = self.codec.decode_same_api if self._is_native(route.model) else self.codec.decode
        chat = await offload(self.http, decode, body)
        chat.asked = route.asked
        return chat

    async def _load(self, route: Route, loading: Loading) -> web.Response:
        model = route.model
        if loading is Loading.UNLOAD:
            await model.unload()
        else:
            self._keep_loaded(model)
            await model.load()
        return web.Response(
            body=orjson.dumps(self.codec.load_reply(route.shown, loading)), content_type="application/json"
        )

    def _keep_loaded(self, model: Model) -> None:
        """Apply the request's `keep_alive`; each request overrides the previous one."""
        seconds = self.codec.keep_alive_s({"keep_alive": self.keep_alive})
        if seconds is not None:
            model.keep_loaded(seconds)

    async def _check_capabilities(self, model: Model, body: Json) -> None:
        """Raises: BadRequest if the body requires a capability that the model is known not to have."""
        needed = self.codec.needs(body)
        if not needed or self._is_native(model):
            return
        capabilities = await self.proxy.router.capabilities(model)
        for capability in needed:
            if capabilities and capability not in capabilities:
                raise BadRequest(self.codec.lacks(str(body.get("model") or model.name), capability))

    async def _send(self, route: Route, chat: ChatRequest) -> web.StreamResponse:
        """Answer a decoded request whose answer no agent reads."""
        if self._is_native(route.model) and self.codec.fits(chat):
            encoded = await self._encoded(chat)
            return await relay_request(self.wait, self.proxy, self.endpoint, route, encoded, None, self.task)
        return await self._stream(route, chat)

    async def _stream(self, route: Route, chat: ChatRequest) -> web.StreamResponse:
        answer = await self._model_answer(route.model, chat)
        return await respond(self.wait.response, self.codec, answer.chat, answer, None)

    async def _model_answer(self, model: Model, chat: ChatRequest, *, same_api: bool = False) -> ModelAnswer:
        """The model's answer in chunks; the request is sent when it is read. With `same_api`, the server is called
        in the client's API if it supports that."""
        finalizer: Finalizer | None = None
        if not self._is_native(model):
            if (problem := first_problem(chat.body)) is not None:  # an agent has chosen a model on another server
                raise problem
            if self.endpoint.preparation is not None:
                chat, finalizer = await self.endpoint.preparation(model, chat)
            self._keep_loaded(model)  # only once the request is known to be valid
        same_api = same_api and (Feature.ECHO not in model.features or chat.asked in ("", model.name))
        own = self.codec.same_api if same_api and self._is_native(model) and self.codec.fits(chat) else None
        codec = own or UPSTREAM_CODECS[model.codec]
        request = await self._written(codec, model, chat)

        async def amend(refused: UpstreamRefused) -> UpstreamRequest | None:
            nonlocal chat  # a server may refuse the amended request for another reason
            if self.codec.thinking_is_optional and _remove_thinking(chat, refused):
                return await self._written(codec, model, chat)
            amending = self.endpoint.amending if not self._is_native(model) else None
            amended = await amending(model, chat, refused) if amending is not None else None
            if amended is None:
                return None
            chat = amended
            return await self._written(codec, model, chat)

        return ModelAnswer(
            model, request, codec, chat, self.http[RECORD],
            verbatim=own is not None and chat.stream and _same_form(request.path, self.http.path),
            finalizer=finalizer, progressed=self.progressed, amend=amend, limit=None if chat.stream else ANSWER_LIMIT,
        )  # fmt: skip

    async def _encoded(self, chat: ChatRequest) -> Json:
        try:
            return await offload(self.http, self.codec.encode, chat)
        except UNENCODABLE as exc:
            raise self._unencodable() or exc from exc

    async def _written(self, codec: UpstreamCodec, model: Model, chat: ChatRequest) -> UpstreamRequest:
        """The request to the model's server. Raises: AgentError if agents made it impossible to encode."""
        try:
            path, body = await offload(self.http, codec.encode, chat)
            self.progressed = self.wait.asks_for_reports(model, body)
            prepared = model.prepare(body)
            data = await to_bytes(self.http, body)
        except UNENCODABLE as exc:
            raise self._unencodable() or exc from exc
        headers = upstream_headers(self.http.headers, has_body=True, forwards=model.forwards)
        request = UpstreamRequest("POST", path, data, headers, prepared=prepared, progress=self.wait.asks())
        request.journal, request.client = self.http[RECORD], self.proxy.grant.client
        return mark(request, self.task)

    def _unencodable(self) -> AgentError | None:
        names = " or ".join(self.agents)
        return AgentError(names, "turned the request into something that cannot be sent") if names else None

    # -- with agents -------------------------------------------------------------------------------------------------

    async def _with_agents(self, route: Route, body: Json, selection: Selection) -> web.StreamResponse:
        await self._check_capabilities(route.model, body)
        chat = await self._decoded(route, body)
        if selection.reply is not None:
            return await self._respond(chat, None, say(selection.reply))
        selection.take_commands(chat)
        asked_model, chat.model = chat.model or route.name, route.model.name
        depth = check_depth(self.http.headers)
        self.agents = self.http[RECORD].agents = [active.plugin.name for active in selection.chain]
        scope = Scope()
        for active in selection.chain:
            active.loaded.users += 1
        try:
            return await scope.run(self._chained(scope, selection, route, chat, asked_model, depth))
        finally:
            for active in selection.chain:
                await active.loaded.release(active.plugin.name)

    async def _chained(
        self, scope: Scope, selection: Selection, route: Route, chat: ChatRequest, asked_model: str, depth: int
    ) -> web.StreamResponse:
        calls = self._side_calls(scope, depth, priority_of(self.task), route.model)
        facts = RequestFacts(
            self.http.headers, self.http.path.rstrip("/"), self.http[RECORD].request_id, route.model.kind, selection,
            chat, asked_model=asked_model, store=self.proxy.store, wait=self.wait, library=self.proxy.library,
            pages=self.proxy.pages,
        )  # fmt: skip
        contexts = [AgentContext(active, facts, scope, calls) for active in selection.chain]
        try:
            async with AsyncExitStack() as open_streams:
                return await self._through(open_streams, contexts, route, chat, calls)
        except BadRequest as exc:
            if _NOT_JSON.search(exc.message):  # cannot come from the client, whose body was parsed from JSON
                raise self._unencodable() or exc from exc
            raise
        finally:
            self.http[RECORD].side_tokens = calls.tokens
            for ctx in contexts:
                spent_s, now = ctx.timer.spent_s, time.monotonic()
                ctx.active.plugin.counts.spent_s += spent_s
                noted: Json = {"notes": ctx.notes} if ctx.notes else {}
                self.http[RECORD].note(StepKind.AGENT, now - spent_s, now, agent=ctx.active.plugin.name, **noted)

    def _side_calls(self, scope: Scope, depth: int, priority: Priority, model: Model) -> SideCalls:
        router = self.proxy.router.including(model)
        return SideCalls(scope, router, self.proxy.config.agent_limits, depth, priority, self.proxy.grant.client)

    async def _through(
        self,
        open_streams: AsyncExitStack,
        contexts: list[AgentContext],
        route: Route,
        chat: ChatRequest,
        calls: SideCalls,
    ) -> web.StreamResponse:
        """Run the agents' request hooks, then the model, and answer through the agents' layers. `open_streams` closes
        what is opened here."""
        source: ModelAnswer | None = None
        streams = chat.stream
        entered, answering, stream = await run_request_hooks(contexts, chat)
        chat.stream = streams  # the client decides: it may have the headers of a stream
        rewriting = [ctx for ctx in entered if ctx.active.loaded.rewrites]
        listening = [ctx for ctx in (*entered, answering) if ctx is not None and ctx.active.loaded.listens]
        if answering is not None and stream is not None:
            stream = reply_layer(answering, stream)
        else:
            route = await self._rerouted(route, chat)
            if not rewriting and not listening:
                return await self._send(route, chat)
            source = await self._model_answer(route.model, chat, same_api=True)
            source.opened, source.closed = calls.reply_began, calls.reply_ended
            stream = source.chunks()
        await open_streams.enter_async_context(aclosing(stream))
        choices = choices_of(chat)
        for ctx in reversed(rewriting):
            stream = await open_streams.enter_async_context(aclosing(response_layer(ctx, stream, choices)))
        if not listening:
            return await self._respond(source.chat if source is not None else chat, source, stream)
        heard = Heard()
        stream = await open_streams.enter_async_context(aclosing(heard.passing(stream)))
        try:
            return await self._respond(source.chat if source is not None else chat, source, stream)
        finally:
            if heard.chunks:
                side_calls = partial(self._side_calls, depth=calls.depth, priority=Priority.HELPER, model=route.model)
                self.proxy.afterwards.start(listening, heard, partial(usage_of, source), side_calls)

    async def _rerouted(self, route: Route, chat: ChatRequest) -> Route:
        """The route of the request after the agents, which may have changed its model."""
        if chat.model != route.model.name:
            route = await self.proxy.router.resolve(chat.model)
            chat.model, chat.asked, self.renamed = route.model.name, "", False
            self.http[RECORD].routed(route.model.name, route.model.kind)
        return route

    async def _respond(
        self, chat: ChatRequest, source: ModelAnswer | None, stream: AsyncIterator[Chunk]
    ) -> web.StreamResponse:
        usage = partial(usage_of, source)
        try:
            return await respond(self.wait.response, self.codec, chat, source, stream, usage)
        except UNENCODABLE as exc:
            message = "an agent turned the answer into something that cannot be sent"
            raise ProxyError(message, code="agent_failed") from exc


async def relay_request(
    wait: Wait,
    proxy: Proxy,
    endpoint: Endpoint,
    route: Route,
    body: Json,
    reusable: Reusable | None = None,
    task: Task | None = None,
) -> web.StreamResponse:
    """Answer the request of `wait` with the bytes of the model's server, which supports the API of `endpoint`. Modifies
    `body`; `reusable` are the bytes that it came as, which are sent if nothing in it has to be."""
    response, http = wait.response, wait.response.http
    model, has_body = route.model, http.method == "POST"
    prepared, progressed, data = None, None, b""
    if has_body:
        body["model"] = route.sent
        progressed = wait.asks_for_reports(model, body)
        prepared = model.prepare(body)
        data = (reusable.bytes_of(body) if reusable is not None else None) or await to_bytes(http, body)
    headers = upstream_headers(http.headers, has_body=has_body, forwards=model.forwards)
    chat_id = http.headers.get(CONVERSATION) if endpoint.slot and Feature.RESUMABLE in model.features else None
    if chat_id:
        headers.append((CONVERSATION, chat_id := proxy.own_chat(chat_id)))
    path = upstream_path(http, model.name)
    unstreamed = None
    streams = endpoint.codec is not None and endpoint.codec.streams(body)
    if endpoint.codec is not None and endpoint.codec.same_api is not None:
        chat = ChatRequest({**{name: body[name] for name in _OF_ANSWER if name in body}, "messages": []}, streams)
        unstreamed = partial(respond_unstreamed, response, endpoint.codec, chat)
    if endpoint.path:
        path = "".join((endpoint.path, *path.partition("?")[1:]))
    request = UpstreamRequest(http.method, path, data, headers, endpoint.slot, prepared=prepared, progress=wait.asks())
    request.journal, request.client = http[RECORD], proxy.grant.client
    mark(request, task, whole=not streams)
    del body, reusable  # the answer may last for minutes
    pool = proxy.config.server_pool
    if chat_id and model.state.value != "loaded" and pool.autoload:
        await proxy.conversations.load(chat_id, model, request, limit=pool.queue_limit)
    return await relay(
        response, model, request, endpoint.dialect,
        generates=endpoint.codec is not None, streams=streams, unstreamed=unstreamed, progressed=progressed,
    )  # fmt: skip


def upstream_path(http: web.BaseRequest, model: str) -> str:
    """The matched path, without the trailing slash that some clients add, and the query, without credentials. A model
    named there gets the server's name for it."""
    path, mark, query = http.raw_path.partition("?")
    if mark and any(name != model for name in http.query.getall("model", ())):
        query = http.rel_url.update_query(model=model).raw_query_string
    if mark:
        query = upstream_query(query)
        mark = "?" if query else ""
    return (http.path.rstrip("/") if path[-1] == "/" or "%" in path else path) + mark + query


def _same_form(path: str, requested: str) -> bool:
    """Whether an answer from the server's `path` has the format that the client of the path `requested` expects."""
    return path.removeprefix("/v1") == requested.rstrip("/").removeprefix("/v1")


def _remove_thinking(chat: ChatRequest, refused: UpstreamRefused) -> bool:
    """If the server refused thinking, remove the fields that enable it. Returns whether any was removed."""
    if "does not support thinking" not in refused.message:
        return False
    return any([chat.body.pop(name, None) is not None for name in _THINKING])
