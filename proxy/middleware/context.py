"""The implementation of `agents.base.Context`: what an agent can read and do in one request."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import aclosing
from functools import cached_property
from typing import Any, TypeVar, cast

from llama_smart_proxy.agents.base import About
from llama_smart_proxy.proxy.chat import ChatRequest, Chunk, ChunkStream, Json, Passage, Reply, fold
from llama_smart_proxy.proxy.errors import AgentError
from llama_smart_proxy.proxy.fetching import FetchError, Pages
from llama_smart_proxy.proxy.http.aside import Worker, in_thread
from llama_smart_proxy.proxy.http.headers import is_credential
from llama_smart_proxy.proxy.knowledge.library import Library
from llama_smart_proxy.proxy.middleware.chain import ActiveAgent, Selection
from llama_smart_proxy.proxy.middleware.knowledge import KnowledgeView
from llama_smart_proxy.proxy.middleware.scope import HookTimer, Scope
from llama_smart_proxy.proxy.middleware.side_calls import SideCalls
from llama_smart_proxy.proxy.store import KeyValues, Store
from llama_smart_proxy.proxy.stream.tokens import room_for
from llama_smart_proxy.proxy.stream.waiting import KINDS, Wait

T = TypeVar("T")

ASIDE_S = 0.004
"""Seconds of long work before a pause in which others go on."""
MAX_NOTES = 40
"""Most notes of an agent that are kept of one request."""


class RequestFacts:
    """The fields of `Context` that are the same for all agents of a request."""

    def __init__(
        self,
        headers: Mapping[str, str],
        api: str,
        request_id: str,
        server: str,
        selection: Selection,
        request: ChatRequest | None = None,
        *,
        asked_model: str = "",
        store: Store | None = None,
        wait: Wait | None = None,
        library: Library | None = None,
        pages: Pages | None = None,
    ) -> None:
        self._all_headers = headers
        self.request = request or ChatRequest({})
        self.asked_model = asked_model
        self.store = store or Store(None)
        self.wait = wait
        self.library = library
        self.pages = pages
        self._users = self.request.body.get("user"), self.request.body.get("metadata")
        self.api = api
        self.request_id = request_id
        self.server = server
        self.selection = selection

    @cached_property
    def headers(self) -> dict[str, str]:
        lowered = ((name.lower(), value) for name, value in self._all_headers.items())
        return {name: value for name, value in lowered if not is_credential(name)}

    @cached_property
    def user(self) -> str:
        key = self._all_headers.get("Authorization") or self._all_headers.get("X-Api-Key")
        if key:
            given_bytes = key.removeprefix("Bearer ").encode(errors="surrogatepass")  # a header may have any bytes
            return f"key-{hashlib.blake2b(given_bytes, digest_size=8).hexdigest()}"
        named, metadata = self._users
        given = named, metadata.get("user_id") if isinstance(metadata, dict) else None
        found = (*given, self._all_headers.get("X-OpenWebUI-User-Id"))
        return next((user for user in found if isinstance(user, str) and user), "")


class AgentContext:
    """The context of one agent in one request, with the timer of its hooks."""

    def __init__(self, active: ActiveAgent, facts: RequestFacts, scope: Scope, calls: SideCalls) -> None:
        limits = calls.limits
        self.active = active
        self.name = active.plugin.name
        self.config: Any = active.config
        self.state: dict[str, Any] = {}
        self.request_id, self.api, self.server = facts.request_id, facts.api, facts.server
        self.chat_id = facts.selection.chat_id
        own_s = active.settings.timeout_s
        self.timer = HookTimer(scope, self.name, limits.timeout_s if own_s is None else own_s)
        self.output_limit = limits.output_kib * 1024
        self._event_bytes = 0
        self.failed = False
        self.leaves_out: set[str] = set()
        self.notes: list[Json] = []
        self._facts = facts
        self._calls = calls

    def afterwards(self, scope: Scope, calls: SideCalls) -> AgentContext:
        """The same context for what comes after the request."""
        later = AgentContext(self.active, self._facts, scope, calls)
        later.state = self.state
        return later

    @property
    def request(self) -> ChatRequest:
        return self._facts.request

    @property
    def asked_model(self) -> str:
        return self._facts.asked_model

    @property
    def user(self) -> str:
        return self._facts.user

    @cached_property
    def store(self) -> KeyValues:
        return KeyValues(self._facts.store, self.name)

    @cached_property
    def knowledge(self) -> KnowledgeView:
        return KnowledgeView(self._facts.library, self.timer)

    @property
    def required(self) -> bool:
        return self.active.settings.required

    @property
    def headers(self) -> Mapping[str, str]:
        return self._facts.headers

    @property
    def forward_headers(self) -> Mapping[str, str]:
        return dict(self._calls.headers)

    @property
    def agents(self) -> Sequence[About]:
        return self._facts.selection.about()

    async def status(self, text: str) -> None:
        if self._facts.wait is not None:
            self._facts.wait.status(text)

    async def event(self, kind: str, data: Json) -> None:
        if kind not in KINDS:
            raise ValueError(f"an event is of the kind {', '.join(KINDS)}, and not {kind!r}")
        if self._facts.wait is not None:
            self._event_bytes += await self._facts.wait.event(kind, data)
        if self._event_bytes > self.output_limit:
            message = f"sent over {self.output_limit // 1024} KiB of events"
            raise AgentError(self.name, message, code="agent_output")

    def note(self, step: str, **details: Any) -> None:
        if len(self.notes) < MAX_NOTES:
            self.notes.append({"step": step, **details})

    def leave_out(self, *names: str) -> None:
        self.leaves_out.update(names)

    def chat(self, request: ChatRequest) -> ChunkStream:
        return _Timed(self._calls.start(self.name, request), self.timer)

    async def complete(self, request: ChatRequest) -> Reply:
        stream = _Timed(self._calls.start(self.name, request), self.timer)
        async with aclosing(stream):
            return await fold(stream)

    async def embed(self, texts: Sequence[str], model: str) -> list[list[float]]:
        with self.timer.awaiting_model():
            return await self._calls.embed(self.name, texts, model)

    async def rerank(self, query: str, texts: Sequence[str], model: str) -> list[float]:
        with self.timer.awaiting_model():
            return await self._calls.rerank(self.name, query, texts, model)

    async def room(self, request: ChatRequest) -> int | None:
        with self.timer.awaiting_model():
            return await room_for((await self._calls.router.resolve(request.model)).model, request)

    async def page(self, url: str) -> list[Passage]:
        if self._facts.pages is None:
            raise FetchError("this proxy reads no pages", refused=True)
        with self.timer.awaiting_model():  # it ends, and it is not the agent's fault how long a server takes
            return await self._facts.pages.passages(url)

    async def aside(self, steps: Generator[Any, None, T]) -> T:
        with self.timer.awaiting_model():  # it ends: each step does, and it is not the agent's fault how long it waits
            while True:
                ended, result = await in_thread(_advance, steps, urgent=False, worker=agents_worker)
                if ended:
                    return cast(T, result)

    async def slots(self, model: str) -> int | None:
        with self.timer.awaiting_model():
            return await (await self._calls.router.resolve(model)).model.slots()

    async def fitting(self, models: Sequence[str]) -> list[list[str]]:
        with self.timer.awaiting_model():
            return await self._calls.router.fitting(models)


agents_worker = Worker()
"""Another one than for the bodies of requests, which are not to wait for what agents do."""


def _advance(steps: Generator[Any, None, T]) -> tuple[bool, T | None]:
    """Continue `steps` for a moment. Returns whether they have ended, and their result."""
    until = time.perf_counter() + ASIDE_S
    try:
        while time.perf_counter() < until:
            next(steps)
    except StopIteration as done:
        return True, done.value
    return False, None


class _Timed:
    """A side call's stream. Waiting for it does not count towards the agent's time limit."""

    def __init__(self, stream: Any, timer: HookTimer) -> None:
        self._stream = stream
        self._timer = timer

    def __aiter__(self) -> _Timed:
        return self

    async def __anext__(self) -> Chunk:
        with self._timer.awaiting_model():
            chunk: Chunk = await self._stream.__anext__()
            return chunk

    async def aclose(self) -> None:
        await self._stream.aclose()
