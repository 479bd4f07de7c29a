"""Side calls: requests to models that agents make on behalf of a client's request.

Each is read to its end in a task of its own, so that a slot is never held longer because an agent reads slowly. None
waits for a slot while the request's own answer holds one. So no request can deadlock with itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial

from llama_smart_proxy.backends.base import Model, Priority, UpstreamRequest
from llama_smart_proxy.backends.http.turns import breathe
from llama_smart_proxy.proxy.chat import ChatRequest, Chunk, Json
from llama_smart_proxy.proxy.config import LimitsConfig
from llama_smart_proxy.proxy.dialects import UPSTREAM_CODECS
from llama_smart_proxy.proxy.dialects.embeddings import EmbeddingRequest
from llama_smart_proxy.proxy.errors import AgentError, BadRequest, Overloaded, ProxyError, UpstreamFailed
from llama_smart_proxy.proxy.http.body import serialise
from llama_smart_proxy.proxy.middleware.scope import Scope
from llama_smart_proxy.proxy.models.router import Router
from llama_smart_proxy.proxy.stream.answer import ModelAnswer
from llama_smart_proxy.proxy.stream.embeddings import PostJson, embed
from llama_smart_proxy.proxy.stream.rerank import rerank
from llama_smart_proxy.proxy.stream.upstream import ANSWER_LIMIT, JSON_HEADERS, fetch_json

logger = logging.getLogger(__name__)

DEPTH_HEADER = "X-Agents-Depth"
"""Header: the number of agents that the request has passed through, each calling a proxy."""
MAX_DEPTH = 3
"""At this depth a request runs no more agents."""


class SideCalls:
    """All side calls of one request, and its budget.

    `depth` is the client's `X-Agents-Depth`. `priority` is that of the request: who waits for that waits for its
    side calls. `client` is the name of its key. `replying` is set while the request's own answer holds a slot;
    `waiting` are the calls waiting for one; `semaphore` limits the concurrent calls.
    """

    def __init__(
        self, scope: Scope, router: Router, limits: LimitsConfig, depth: int, priority: Priority, client: str = ""
    ) -> None:
        self.client = client
        self.router = router
        self.limits = limits
        self.depth = depth
        self.priority = priority
        self.tokens = 0
        self._scope = scope
        self._calls = 0
        self.semaphore = asyncio.Semaphore(limits.side_calls_at_once)
        self.waiting: set[SideCall | _BoundedWait] = set()
        self.replying = False

    @property
    def headers(self) -> list[tuple[str, str]]:
        return [(DEPTH_HEADER, str(self.depth + 1))]

    def reply_began(self) -> None:
        """The request's own answer holds a slot now. Fails the waiting calls: they might wait for that very slot."""
        self.replying = True
        for call in list(self.waiting):
            call.fail(Overloaded("A side call found no free slot before the answer itself began.", code="no_slot_now"))

    def reply_ended(self) -> None:
        self.replying = False

    def start(self, agent: str, request: ChatRequest) -> SideCall:
        """Start a side call. Raises: AgentError when the budget is used up."""
        self._count_call(agent)
        call = SideCall(self, agent, request.copy())
        call.start(self._scope)
        return call

    async def embed(self, agent: str, texts: Sequence[str], model: str) -> list[list[float]]:
        """One vector per text. Raises: as a side call."""
        async with self._posting(agent, model) as (found, post):
            return (await embed(found, EmbeddingRequest(list(texts)), post)).vectors

    async def rerank(self, agent: str, query: str, texts: Sequence[str], model: str) -> list[float]:
        """One score per text. Raises: as a side call."""
        async with self._posting(agent, model) as (found, post):
            return await rerank(found.name, query, texts, post)

    @asynccontextmanager
    async def _posting(self, agent: str, name: str) -> AsyncIterator[tuple[Model, PostJson]]:
        """The model of that name, and a function that posts a JSON body to a path of its server, as a side call."""
        self._count_call(agent)
        bounded: _BoundedWait | None = None
        try:
            async with self.semaphore, asyncio.timeout(self.limits.side_call_s) as limit:
                model = (await self.router.resolve(name)).model
                bounded = _BoundedWait(limit)

                async def post(path: str, body: Json) -> Json:
                    assert bounded is not None
                    prepared = model.prepare(body)
                    request = self._request(path, body, prepared)
                    self.waiting.add(bounded)
                    try:
                        return await fetch_json(model, request, partial(self.waiting.discard, bounded))
                    finally:
                        self.waiting.discard(bounded)

                yield model, post
        except TimeoutError:
            if bounded is not None and bounded.failure is not None:
                raise bounded.failure from None
            raise self.timed_out() from None

    def _request(self, path: str, body: Json, prepared: object) -> UpstreamRequest:
        headers = [*JSON_HEADERS, *self.headers]
        return UpstreamRequest(
            "POST", path, serialise(body), headers,
            wait=not self.replying, priority=self.priority, client=self.client, prepared=prepared,
        )  # fmt: skip

    def timed_out(self) -> UpstreamFailed:
        message = f"a side call took over {self.limits.side_call_s:g} s"
        return UpstreamFailed(message, status=504, code="side_call_timeout")

    def _count_call(self, agent: str) -> None:
        if self._calls >= self.limits.side_calls:
            raise _used_up(agent, f"{self.limits.side_calls} side calls")
        self._calls += 1

    async def answer(self, request: ChatRequest, call: SideCall) -> ModelAnswer:
        """The model's answer; the request is sent when it is read."""
        route = await self.router.resolve(request.model)
        request.model = route.model.name
        codec = UPSTREAM_CODECS[route.model.codec]
        path, body = codec.encode(request)
        prepared = route.model.prepare(body)
        upstream = self._request(path, body, prepared)
        return ModelAnswer(route.model, upstream, codec, request, opened=call.opened, limit=ANSWER_LIMIT)


class SideCall:
    """The answer to one side call, as an async iterator of chunks."""

    def __init__(self, calls: SideCalls, agent: str, request: ChatRequest) -> None:
        self._calls = calls
        self._agent = agent
        self._request = request
        self._chunks: deque[Chunk] = deque()
        self._done = False
        self._failure: ProxyError | None = None
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self, scope: Scope) -> None:
        self._task = scope.spawn(self._read())

    def opened(self) -> None:
        """The call holds a slot now."""
        self._calls.waiting.discard(self)

    def fail(self, failure: ProxyError) -> None:
        """Cancel the call; its reader gets `failure`."""
        if not self._done:
            self._done, self._failure = True, failure
            self._changed.set()
        if self._task is not None:
            self._task.cancel()

    def __aiter__(self) -> SideCall:
        return self

    async def __anext__(self) -> Chunk:
        while not self._chunks:
            if self._failure is not None:
                raise self._failure
            if self._done:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        if len(self._chunks) > 1:  # it was not waited for
            await breathe()
        return self._chunks.popleft()

    async def aclose(self) -> None:
        """Cancel the call; its reader gets no more chunks."""
        self._chunks.clear()
        self._done = True  # a task cancelled before its first step does not set it
        self._changed.set()
        if self._task is not None:
            self._task.cancel()

    async def _read(self) -> None:
        try:
            async with self._calls.semaphore, asyncio.timeout(self._calls.limits.side_call_s):
                await self._read_chunks()
        except ProxyError as exc:
            self._failure = exc.with_traceback(None)  # which would refer to this call
        except TimeoutError:
            self._failure = self._calls.timed_out()
        except Exception as exc:
            logger.error("agent %s: a side call failed", self._agent, exc_info=exc)
            self._failure = AgentError(self._agent, f"made a side call that cannot be sent: {type(exc).__name__}")
        finally:
            self._calls.waiting.discard(self)
            self._done = True
            self._changed.set()

    async def _read_chunks(self) -> None:
        self._calls.waiting.add(self)
        answer = await self._calls.answer(self._request, self)
        async with aclosing(answer.chunks()) as stream:
            async for chunk in stream:
                self._calls.tokens += bool(chunk.text or chunk.reasoning or chunk.tool_calls)
                if self._calls.tokens > self._calls.limits.side_tokens:
                    raise _used_up(self._agent, f"{self._calls.limits.side_tokens} tokens in side calls")
                self._chunks.append(chunk)
                self._changed.set()


class _BoundedWait:
    """A request that waits for a slot, within the timeout `limit`, until `fail` is called."""

    def __init__(self, limit: asyncio.Timeout) -> None:
        self.failure: ProxyError | None = None
        self._limit = limit

    def fail(self, failure: ProxyError) -> None:
        """End the wait with `failure`."""
        self.failure = failure
        self._limit.reschedule(asyncio.get_running_loop().time())


def check_depth(headers: Mapping[str, str]) -> int:
    """The request's `X-Agents-Depth`. Raises: BadRequest 508 from `MAX_DEPTH` on."""
    given = headers.get(DEPTH_HEADER, "")
    depth = min(int(given[:4]), MAX_DEPTH) if given.isascii() and given.isdigit() else 0
    if depth >= MAX_DEPTH:
        message = f"agents are calling agents: this request has passed through {MAX_DEPTH} of them already"
        raise BadRequest(message, status=508, code="agent_depth")
    return depth


def _used_up(agent: str, what: str) -> AgentError:
    return AgentError(agent, f"has used up what a request may take: {what}", code="agent_budget")
