"""A chat with agents around it: from the client's request to the client's answer, top to bottom."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from functools import partial

from aiohttp import web

from llama_smart_proxy.backends.base import Model, UpstreamRequest
from llama_smart_proxy.backends.http.exchange import UpstreamResponse
from llama_smart_proxy.proxy.api.ollama_chat import check_capabilities, set_keep_alive, with_context
from llama_smart_proxy.proxy.api.state import MODEL, Proxy
from llama_smart_proxy.proxy.chat import ChatRequest, Chunk, Json, Timing, bare, fold, say
from llama_smart_proxy.proxy.dialects import ollama
from llama_smart_proxy.proxy.dialects.base import Face, Wire, Writer
from llama_smart_proxy.proxy.errors import AgentError, BadRequest, ProxyError, UpstreamFailed, UpstreamRefused
from llama_smart_proxy.proxy.http.body import aside, serialise, to_bytes
from llama_smart_proxy.proxy.http.headers import REQUEST_ID, upstream_headers
from llama_smart_proxy.proxy.middleware.chain import FIELD, Picked
from llama_smart_proxy.proxy.middleware.context import AgentContext, RequestFacts
from llama_smart_proxy.proxy.middleware.hooks import answered, enter, layer
from llama_smart_proxy.proxy.middleware.scope import Scope
from llama_smart_proxy.proxy.middleware.side_calls import DEEPEST, DEPTH, SideCalls
from llama_smart_proxy.proxy.models.router import Route
from llama_smart_proxy.proxy.stream.outlet import Outlet
from llama_smart_proxy.proxy.stream.relay import Sink, Stream, begin_stream, finish
from llama_smart_proxy.proxy.stream.source import Source
from llama_smart_proxy.proxy.stream.translate import ANSWER_LIMIT, Epilogue
from llama_smart_proxy.proxy.stream.wires import native_wire, wire_of, without_thoughts

logger = logging.getLogger(__name__)

_COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens")
_NOT_JSON = re.compile("not JSON serializable|Dict key must")
"""orjson's words for what is no JSON value."""
_GARBLED = (AttributeError, KeyError, TypeError, ValueError)
"""What is raised where a request or an answer is written that agents have made something else of."""
Plain = Callable[[Route, Json], Awaitable[web.StreamResponse]]
"""Answers a request, given as the body of the endpoint that was asked, without agents."""


@dataclass(slots=True)
class AgentChat:
    """One request to an endpoint that generates, in the API of `face` (family `family`)."""

    http: web.Request
    proxy: Proxy
    face: Face
    family: str
    plain: Plain
    keep_alive: object = None

    async def answer(self, target: Route, body: Json) -> web.StreamResponse:
        """Answer it, with the agents that it calls for; without any, as `plain` does."""
        timing = Timing(time.monotonic())
        await self.proxy.chain.plugins.refresh()
        self.keep_alive = body.get("keep_alive")
        if self.family == "ollama":
            await check_capabilities(target.model, body)
        named = body.pop(FIELD, None)
        request = await aside(self.http, self.face.decode, body)
        chats = not request.is_text and self.face is not ollama.GENERATE
        picked = self.proxy.chain.pick(self.http.headers, named, request, target.name, chats=chats)
        if picked.words is not None:
            return await self._respond(request, timing, say(picked.words), None)
        if not picked.chain:
            return await self.plain(target, self.face.encode(request))
        if _depth(self.http.headers) >= DEEPEST:
            words = f"agents are calling agents: this request has come through {DEEPEST} of them already"
            raise BadRequest(words, status=508, code="agent_depth")
        request.model = target.model.name
        scope = Scope()
        for active in picked.chain:
            active.made.users += 1
        try:
            return await scope.run(self._chat(scope, picked, target, request, timing))
        finally:
            for active in picked.chain:
                await self.proxy.chain.plugins.release(active.plugin.name, active.made)

    async def _chat(
        self, scope: Scope, picked: Picked, target: Route, request: ChatRequest, timing: Timing
    ) -> web.StreamResponse:
        calls = SideCalls(scope, self.proxy.router, self.proxy.config.agent_limits, _depth(self.http.headers))
        facts = RequestFacts(
            self.http.headers, self.http.path.rstrip("/"), self.http[REQUEST_ID], target.model.kind, picked
        )
        contexts = [AgentContext(active, facts, scope, calls) for active in picked.chain]
        try:
            async with AsyncExitStack() as open_streams:
                return await self._layered(open_streams, contexts, target, request, timing, calls)
        except BadRequest as exc:
            if _NOT_JSON.search(exc.message):  # nothing that was parsed from JSON can be that
                raise _unspeakable(contexts) from exc
            raise
        finally:
            for ctx in contexts:
                ctx.active.plugin.spent_s += ctx.turn.spent_s

    async def _layered(
        self,
        open_streams: AsyncExitStack,
        contexts: list[AgentContext],
        target: Route,
        request: ChatRequest,
        timing: Timing,
        calls: SideCalls,
    ) -> web.StreamResponse:
        """Ask the agents, then the model, and answer through the agents; what is opened is left to `open_streams`."""
        source: Source | None = None
        entered, answering, answer = await enter(contexts, request)
        if answering is not None and answer is not None:
            answer = answered(answering, answer)
        else:
            target = await self._retarget(target, request)
            if not any(ctx.active.made.rewrites for ctx in entered) and self._is_plain(request):
                return await self.plain(target, self._encoded(contexts, request))
            source = await self._source(contexts, target, request, timing, calls)
            answer = source.chunks()
        await open_streams.enter_async_context(aclosing(answer))
        for ctx in reversed(entered):
            if ctx.active.made.rewrites:
                answer = await open_streams.enter_async_context(aclosing(layer(ctx, answer)))
        return await self._respond(request, timing, answer, source)

    # -- asking ----------------------------------------------------------------------------------------------------

    async def _retarget(self, target: Route, request: ChatRequest) -> Route:
        """Where the request goes now: an agent may have chosen another model."""
        if request.model != target.model.name:
            target = await self.proxy.router.resolve(request.model)
            request.model = target.model.name
            self.http[MODEL] = target.model.name
        return target

    def _is_plain(self, request: ChatRequest) -> bool:
        """Whether what the agents made of the request still fits the endpoint that the client asked: one question to
        `/api/generate` may have become a chat."""
        if self.face is ollama.GENERATE and ollama.WIRE.encode(request)[0] != self.http.path.rstrip("/"):
            return False
        return self._has_words_for(request)

    def _has_words_for(self, request: ChatRequest) -> bool:
        """Whether the client's API has a place for every field: agents may have set what only the server knows, such as
        `id_slot`. What is to be said does not matter for that, and may be large."""
        if self.family == "openai":
            return True
        said: Json = {"prompt": "x"} if request.is_text else {"messages": [{"role": "user", "content": "x"}]}
        probe = ChatRequest({**request.body, **said}, request.stream).copy()
        try:
            return set(bare(probe.body)) <= set(self.face.decode(self.face.encode(probe)).body)
        except (*_GARBLED, BadRequest):
            return True  # it cannot be said at all, as will turn out

    def _encoded(self, contexts: list[AgentContext], request: ChatRequest) -> Json:
        try:
            return self.face.encode(request)
        except _GARBLED as exc:
            raise _unspeakable(contexts) from exc

    async def _source(
        self, contexts: list[AgentContext], target: Route, request: ChatRequest, timing: Timing, calls: SideCalls
    ) -> Source:
        """The model's answer, not asked for yet."""
        backend, closing = target.model, None
        if self.family == "ollama" and "ollama" not in backend.speaks:
            if self.face is ollama.GENERATE:
                request, epilogue = await with_context(backend, request)
                closing = partial(_tell_context, epilogue, timing) if epilogue is not None else None
            set_keep_alive(backend, {"keep_alive": self.keep_alive})
        wire = native_wire(self.family, backend) if self._has_words_for(request) else None
        verbatim = wire is not None and request.stream
        wire = wire or wire_of(backend)
        path, data, prepared = await self._written(contexts, wire, backend, request)
        headers = upstream_headers(self.http.headers, has_body=True)

        def opened(upstream: UpstreamResponse) -> None:
            timing.sent_s = upstream.sent_s
            calls.reply_began()

        def amend(refused: UpstreamRefused) -> UpstreamRequest | None:
            if self.family == "ollama" or not without_thoughts(request, refused):
                return None
            path, body = wire.encode(request)
            prepared = backend.prepare(body)
            return UpstreamRequest("POST", path, serialise(body), headers, prepared=prepared)

        return Source(
            backend, UpstreamRequest("POST", path, data, headers, prepared=prepared), wire, request,
            verbatim=verbatim and _same_form(path, self.http.path),
            opened=opened, closing=closing, closed=calls.reply_ended, amend=amend,
        )  # fmt: skip

    async def _written(
        self, contexts: list[AgentContext], wire: Wire, backend: Model, request: ChatRequest
    ) -> tuple[str, bytes, object]:
        """Path and body of the request in the server's API, and what the model prepared for it. Raises: AgentError if
        agents made it unspeakable."""
        try:
            path, body = wire.encode(request)
            prepared = backend.prepare(body)
            return path, await to_bytes(self.http, body), prepared
        except _GARBLED as exc:
            raise _unspeakable(contexts) from exc

    # -- answering -------------------------------------------------------------------------------------------------

    async def _respond(
        self, request: ChatRequest, timing: Timing, stream: AsyncIterator[Chunk], source: Source | None
    ) -> web.StreamResponse:
        writer = self.face.writer(request, timing)
        if source is None and (self.family == "openai" or not request.stream):
            stream = _accounted(stream)
        try:
            if not request.stream:
                reply = await fold(_bounded(stream))
                return web.Response(body=writer.reply(reply.data), content_type="application/json")
            several = request.body.get("n") not in (None, 1)
            return await self._stream(Outlet(writer, self.face.dialect, several=several), writer, stream, source)
        except _GARBLED as exc:
            raise ProxyError(
                "an agent turned the answer into something that cannot be sent", code="agent_failed"
            ) from exc

    async def _stream(
        self, outlet: Outlet, writer: Writer, stream: AsyncIterator[Chunk], source: Source | None
    ) -> web.StreamResponse:
        """Write chunk by chunk. Headers leave with the first: until then a failure is a true status code."""
        answer = None
        try:
            async for chunk in stream:
                written = outlet.take(chunk)
                if answer is None:
                    answer, sink = await self._begin(writer)
                if written and not sink.feed(written):
                    await sink.drained()
            if answer is None:
                answer, sink = await self._begin(writer)
            last = outlet.end(source.tail, source.count) if source is not None else outlet.end(b"")
        except (ProxyError, *_GARBLED) as exc:
            if answer is None:
                raise
            failure = exc if isinstance(exc, ProxyError) else ProxyError("internal error", code="agent_failed")
            logger.warning("stream broken off: %s", failure, exc_info=None if isinstance(exc, ProxyError) else exc)
            answer.cut = self.face.dialect.cuts
            last = outlet.error(failure)
        if last:
            sink.feed(last)
        return await finish(self.http, answer, self._stall_s)

    async def _begin(self, writer: Writer) -> tuple[Stream, Sink]:
        head = [("content-type", writer.content_type), ("cache-control", "no-cache")]
        answer = await begin_stream(self.http, 200, head)
        return answer, Sink(self.http, self._stall_s, chunked=answer.chunked)

    @property
    def _stall_s(self) -> float:
        return self.proxy.config.server.send_stall_s


async def _bounded(stream: AsyncIterator[Chunk]) -> AsyncIterator[Chunk]:
    """An answer that is collected: no server may fill our memory with it."""
    size = 0
    async for chunk in stream:
        size += chunk.size
        if size > ANSWER_LIMIT:
            raise UpstreamFailed(f"the answer is over {ANSWER_LIMIT // 2**20} MiB", code="upstream_error")
        yield chunk


async def _accounted(stream: AsyncIterator[Chunk]) -> AsyncIterator[Chunk]:
    """An answer that was made here, with the usage that clients expect of every answer: no model was asked, if nobody
    tells of one."""
    told = False
    async for chunk in stream:
        told = told or chunk.usage is not None
        yield chunk
    if not told:
        yield Chunk({"choices": [], "usage": dict.fromkeys(_COUNTS, 0)})


async def _tell_context(epilogue: Epilogue, timing: Timing, said: str, upstream: UpstreamResponse) -> None:
    timing.extra = await epilogue(said, upstream.pool)


def _depth(headers: Mapping[str, str]) -> int:
    given = headers.get(DEPTH, "")
    return min(int(given[:4]), DEEPEST) if given.isascii() and given.isdigit() else 0


def _same_form(path: str, asked: str) -> bool:
    """Whether the server's answer has the form that the client of `asked` waits for."""
    return path.removeprefix("/v1") == asked.rstrip("/").removeprefix("/v1")


def _unspeakable(contexts: list[AgentContext]) -> AgentError:
    names = " or ".join(ctx.name for ctx in contexts)
    return AgentError(names, "turned the request into something that cannot be sent")
