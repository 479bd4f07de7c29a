"""Questions that agents ask models on behalf of a request.

Each is read to its end in a task of its own, so a slot that one holds never depends on the pace of whoever asked; and
none waits for a slot while the request's own answer holds one. So no request can wait for itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from functools import partial

from llama_smart_proxy.backends.base import Priority, UpstreamRequest
from llama_smart_proxy.proxy.chat import ChatRequest, Chunk, Json
from llama_smart_proxy.proxy.config import LimitsConfig
from llama_smart_proxy.proxy.dialects import UPSTREAM_CODECS
from llama_smart_proxy.proxy.dialects.embeddings import EmbeddingRequest
from llama_smart_proxy.proxy.errors import AgentError, BadRequest, Overloaded, ProxyError, UpstreamFailed
from llama_smart_proxy.proxy.http.body import serialise
from llama_smart_proxy.proxy.middleware.scope import Scope
from llama_smart_proxy.proxy.models.router import Router
from llama_smart_proxy.proxy.stream.answer import ModelAnswer
from llama_smart_proxy.proxy.stream.embeddings import embed
from llama_smart_proxy.proxy.stream.upstream import ANSWER_LIMIT, JSON_HEADERS, answer_to

logger = logging.getLogger(__name__)

DEPTH = "X-Agents-Depth"
"""How many agents, each asking the next proxy, a request has come through."""
DEEPEST = 3
"""A request that has come through so many runs none any more."""


class SideCalls:
    """All side calls of one request, and what is left of its budget.

    `depth` is what the client's `X-Agents-Depth` says. `replying` is set while the request's own answer holds a slot;
    `waiting` are the calls that wait for one, and `room` is left by each call when it is over.
    """

    def __init__(self, scope: Scope, router: Router, limits: LimitsConfig, depth: int) -> None:
        self.router = router
        self.limits = limits
        self.depth = depth
        self.tokens = 0
        self._scope = scope
        self._calls = 0
        self.room = asyncio.Semaphore(limits.side_calls_at_once)
        self.waiting: set[SideCall | _Hasty] = set()
        self.replying = False

    @property
    def headers(self) -> list[tuple[str, str]]:
        return [(DEPTH, str(self.depth + 1))]

    def reply_began(self) -> None:
        """The request's own answer holds a slot from now on: what still waits for one might wait for that."""
        self.replying = True
        for call in list(self.waiting):
            call.fail(Overloaded("A side call found no free slot before the answer itself began.", code="no_slot_now"))

    def reply_ended(self) -> None:
        self.replying = False

    def ask(self, agent: str, request: ChatRequest) -> SideCall:
        """Start one. Raises: AgentError when the budget is used up."""
        self._take(agent)
        call = SideCall(self, agent, request.copy())
        call.start(self._scope)
        return call

    async def embed(self, agent: str, texts: Sequence[str], model: str) -> list[list[float]]:
        """A vector for each of `texts`. Raises: as a side call does."""
        self._take(agent)
        hasty: _Hasty | None = None
        try:
            async with self.room, asyncio.timeout(self.limits.side_call_s) as limit:
                route = await self.router.resolve(model)
                hasty = _Hasty(limit)

                async def ask(path: str, body: Json) -> Json:
                    assert hasty is not None
                    prepared = route.model.prepare(body)
                    request = self._request(path, body, prepared)
                    self.waiting.add(hasty)
                    try:
                        return await answer_to(route.model, request, partial(self.waiting.discard, hasty))
                    finally:
                        self.waiting.discard(hasty)

                return (await embed(route.model, EmbeddingRequest(list(texts)), ask)).vectors
        except TimeoutError:
            if hasty is not None and hasty.failure is not None:
                raise hasty.failure from None
            raise self.too_long() from None

    def _request(self, path: str, body: Json, prepared: object) -> UpstreamRequest:
        headers = [*JSON_HEADERS, *self.headers]
        return UpstreamRequest(
            "POST", path, serialise(body), headers,
            wait=not self.replying, priority=Priority.HELPER, prepared=prepared,
        )  # fmt: skip

    def too_long(self) -> UpstreamFailed:
        words = f"a side call took over {self.limits.side_call_s:g} s"
        return UpstreamFailed(words, status=504, code="side_call_timeout")

    def _take(self, agent: str) -> None:
        if self._calls >= self.limits.side_calls:
            raise _used_up(agent, f"{self.limits.side_calls} side calls")
        self._calls += 1

    async def answer(self, request: ChatRequest, call: SideCall) -> ModelAnswer:
        """The model's answer, not requested yet."""
        route = await self.router.resolve(request.model)
        request.model = route.model.name
        codec = UPSTREAM_CODECS[route.model.codec]
        path, body = codec.encode(request)
        prepared = route.model.prepare(body)
        sent = self._request(path, body, prepared)
        return ModelAnswer(route.model, sent, codec, request, opened=call.opened, limit=ANSWER_LIMIT)


class SideCall:
    """One answer on its way, as an async iterator of chunks."""

    def __init__(self, calls: SideCalls, agent: str, request: ChatRequest) -> None:
        self._calls = calls
        self._agent = agent
        self._request = request
        self._chunks: deque[Chunk] = deque()
        self._done = False
        self._failure: ProxyError | None = None
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self, scope: Scope) -> None:
        self._task = scope.spawn(self._read())

    def opened(self) -> None:
        """A slot is held."""
        self._calls.waiting.discard(self)

    def fail(self, failure: ProxyError) -> None:
        """Break it off."""
        if not self._done:
            self._done, self._failure = True, failure
            self._news.set()
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
            self._news.clear()
            await self._news.wait()
        return self._chunks.popleft()

    async def aclose(self) -> None:
        """Nobody wants it any more."""
        self._chunks.clear()
        self._done = True  # the task will not tell if it has not begun
        self._news.set()
        if self._task is not None:
            self._task.cancel()

    async def _read(self) -> None:
        try:
            async with self._calls.room, asyncio.timeout(self._calls.limits.side_call_s):
                await self._take_all()
        except ProxyError as exc:
            self._failure = exc
        except TimeoutError:
            self._failure = self._calls.too_long()
        except Exception as exc:
            logger.error("agent %s: a side call failed", self._agent, exc_info=exc)
            self._failure = AgentError(self._agent, f"asked what cannot be asked: {type(exc).__name__}")
        finally:
            self._calls.waiting.discard(self)
            self._done = True
            self._news.set()

    async def _take_all(self) -> None:
        self._calls.waiting.add(self)
        answer = await self._calls.answer(self._request, self)
        async with aclosing(answer.chunks()) as stream:
            async for chunk in stream:
                self._calls.tokens += bool(chunk.text or chunk.reasoning or chunk.tool_calls)
                if self._calls.tokens > self._calls.limits.side_tokens:
                    raise _used_up(self._agent, f"{self._calls.limits.side_tokens} tokens in side calls")
                self._chunks.append(chunk)
                self._news.set()


class _Hasty:
    """A request that waits for a slot only as long as it may, and within `limit`."""

    def __init__(self, limit: asyncio.Timeout) -> None:
        self.failure: ProxyError | None = None
        self._limit = limit

    def fail(self, failure: ProxyError) -> None:
        """Wait no more."""
        self.failure = failure
        self._limit.reschedule(asyncio.get_running_loop().time())


def check_depth(headers: Mapping[str, str]) -> int:
    """How many agents, each asking the next proxy, the request has come through. Raises: BadRequest 508."""
    given = headers.get(DEPTH, "")
    depth = min(int(given[:4]), DEEPEST) if given.isascii() and given.isdigit() else 0
    if depth >= DEEPEST:
        message = f"agents are calling agents: this request has come through {DEEPEST} of them already"
        raise BadRequest(message, status=508, code="agent_depth")
    return depth


def _used_up(agent: str, what: str) -> AgentError:
    return AgentError(agent, f"has used up what a request may take: {what}", code="agent_budget")
