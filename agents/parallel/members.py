"""Sends the requests of a round to its members, and yields their answers as they arrive."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from llama_smart_proxy import ChatRequest, Chunk, Context, Json, ProxyError, UpstreamFailed

NOT_FOR_MEMBERS = ("tools", "tool_choice", "parallel_tool_calls", "functions", "function_call", "stream_options", "n")
"""Fields removed from a member's request: its answer is a draft, without tool calls."""
N_UNSUPPORTED = (400, 422)
"""Statuses by which servers refuse `n`: Ollama does not support it."""
COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens")


@dataclass(eq=False, slots=True)
class Member:
    """One answer of a model, as far as `Round.events` has yielded it; `failure` is set if there is none.

    `sample` numbers the members of one model, from 0.
    """

    label: str
    model: str
    sample: int = 0
    pieces: list[str] = field(default_factory=list)
    done: bool = False
    failure: ProxyError | None = None
    finish: str = "stop"
    """The finish reason of its answer: `stop` or `length`."""
    begun: bool = False
    """Whether any of its answer has been received, yielded or not."""
    over: bool = False
    """Whether nothing more will be received."""

    @property
    def text(self) -> str:
        """The answer so far, without surrounding white space."""
        return "".join(self.pieces).strip()

    @property
    def answered(self) -> bool:
        return self.done and self.failure is None


def members_of(models: Sequence[str]) -> list[Member]:
    """One for each of `models`; those of one model are numbered."""
    members: list[Member] = []
    for position, model in enumerate(models):
        sample = models[:position].count(model)
        members.append(Member(f"{model} #{sample + 1}" if models.count(model) > 1 else model, model, sample))
    return members


class Usage:
    """The sum of the token counts of all side calls of one request."""

    def __init__(self) -> None:
        self._sum: dict[str, int] = {}

    def add(self, usage: Any) -> None:
        for name in COUNTS:
            if isinstance(usage, dict) and isinstance(usage.get(name), int):
                self._sum[name] = self._sum.get(name, 0) + usage[name]

    def add_shared(self, usages: Sequence[Any]) -> None:
        """Add several answers to one prompt: llama-server reports the prompt with each, but evaluates it once."""
        known = [usage for usage in usages if isinstance(usage, dict)]
        prompt, completion = ([n for usage in known if isinstance(n := usage.get(name), int)] for name in COUNTS[:2])
        if prompt or completion:
            counted = (max(prompt, default=0), sum(completion))
            self.add(dict(zip(COUNTS, (*counted, sum(counted)), strict=True)))

    def chunks(self) -> list[Chunk]:
        """A chunk with the sum; empty if no server has reported any."""
        return [Chunk({"choices": [], "usage": dict(self._sum)})] if self._sum else []


@dataclass(frozen=True, slots=True)
class Event:
    """`text` is the next piece of the answer of `member`. If it is empty, the member is done; `failure` is set if it
    failed."""

    member: Member
    text: str = ""
    failure: ProxyError | None = None

    def record(self) -> None:
        """Apply the event to its member."""
        if self.text:
            self.member.pieces.append(self.text)
        else:
            self.member.done, self.member.failure = True, self.failure


class Round:
    """Sends the request to all members, group by group: first to models that are loaded or fit beside the loaded ones.

    `plan` sets the order; `events` yields the answers until all members are done, which includes failed ones.
    """

    def __init__(self, ctx: Context, request: ChatRequest, members: Sequence[Member], usage: Usage):
        self.members = members
        self.groups: list[list[str]] = []
        """Models of one group are used concurrently, the groups one after the other."""
        self._ctx = ctx
        self._request = request
        self._usage = usage
        self._member_s: float = ctx.config.member_s
        self._temperature: float = ctx.config.temperature
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()

    async def plan(self, last: str | None = None) -> None:
        """Set the order. The group of the model `last`, which is needed after the round, comes last. Members whose
        model does not exist are marked as failed."""
        known: list[str] = []
        for model in dict.fromkeys(member.model for member in self.members):
            try:
                await self._ctx.fitting([model])
                known.append(model)
            except ProxyError as exc:
                for member in self._of(model):
                    member.over = member.done = True
                    member.failure = exc
        groups = await self._ctx.fitting(known) if known else []
        self.groups = sorted(groups, key=lambda group: last in group)

    async def events(self) -> AsyncGenerator[Event, None]:
        # The proxy cancels the task when the request ends; here it is cancelled as soon as the reader stops.
        task = asyncio.create_task(self._run())
        try:
            while (event := await self._events.get()) is not None:
                event.record()
                yield event
            await task
        finally:
            task.cancel()

    def _of(self, model: str) -> list[Member]:
        return [member for member in self.members if member.model == model]

    async def _run(self) -> None:
        try:
            for group in self.groups:
                await asyncio.gather(*(self._request_all(self._of(model)) for model in group))
        finally:
            self._events.put_nowait(None)

    async def _request_all(self, members: Sequence[Member]) -> None:
        """Get one model's answers for `members`, with as few requests as its server accepts: each evaluates the prompt
        once."""
        most = await self._slots(members)
        for start in range(0, len(members), most):
            await self._request_some([member for member in members[start : start + most] if not member.over])

    async def _slots(self, members: Sequence[Member]) -> int:
        if len(members) > 1:
            try:
                async with asyncio.timeout(self._member_s):
                    return await self._ctx.slots(members[0].model) or len(members)
            except TimeoutError:
                self._finish(members, self._timed_out())
            except ProxyError as exc:
                self._finish(members, exc)
        return len(members)

    async def _request_some(self, members: Sequence[Member]) -> None:
        if len(members) > 1:
            members = await self._request_together(members)
        if members:
            first, *others = members
            began = asyncio.Event()
            # The others start once the first answer has begun: then the prompt is in the server's cache.
            await asyncio.gather(self._request_one(first, began), *(self._after(began, other) for other in others))

    async def _after(self, began: asyncio.Event, member: Member) -> None:
        await began.wait()
        await self._request_one(member, asyncio.Event())

    async def _request_together(self, members: Sequence[Member]) -> Sequence[Member]:
        """Request all answers at once, with `n`. Returns the members without an answer, because the server refused or
        ignored `n`."""
        usages: list[Any] = []
        try:
            async with asyncio.timeout(self._member_s), aclosing(self._chat(members[0], n=len(members))) as answer:
                async for chunk in answer:
                    usages.append(chunk.usage)
                    if chunk.index < len(members):
                        self._take(members[chunk.index], chunk)
            self._finish(member for member in members if member.begun)
        except TimeoutError:
            self._finish(members, self._timed_out())
        except ProxyError as exc:
            if exc.status not in N_UNSUPPORTED or any(member.begun for member in members):
                self._finish(members, exc)
        finally:
            self._usage.add_shared(usages)
        return [member for member in members if not member.over]

    async def _request_one(self, member: Member, began: asyncio.Event) -> None:
        try:
            async with asyncio.timeout(self._member_s), aclosing(self._chat(member)) as answer:
                async for chunk in answer:
                    self._usage.add(chunk.usage)
                    self._take(member, chunk)
                    if chunk.text or chunk.reasoning:
                        began.set()
        except TimeoutError:
            self._finish([member], self._timed_out())
        except ProxyError as exc:
            self._finish([member], exc)
        finally:
            began.set()
        self._finish([member])

    def _chat(self, member: Member, **more: int) -> AsyncGenerator[Chunk, None]:
        return _closable(self._ctx.chat(self._for(member, more)))

    def _for(self, member: Member, more: Json) -> ChatRequest:
        """The request for `member`. Samples of one model get different seeds, so that they differ."""
        request = self._request.copy()
        body = {key: value for key, value in request.body.items() if key not in NOT_FOR_MEMBERS}
        if len(self._of(member.model)) > 1:
            body.setdefault("temperature", self._temperature)
            if isinstance(seed := body.get("seed"), int) and seed >= 0:  # a negative seed means a random one
                body["seed"] = seed + member.sample
        request.body = body | {"model": member.model, **more}
        return request

    def _take(self, member: Member, chunk: Chunk) -> None:
        if chunk.text and not member.over:
            member.begun = True
            self._events.put_nowait(Event(member, chunk.text))
        if chunk.finish_reason:
            member.finish = "length" if chunk.finish_reason == "length" else "stop"
            self._finish([member])

    def _timed_out(self) -> UpstreamFailed:
        return UpstreamFailed(f"no answer within {self._member_s:g} s", status=504, code="upstream_timeout")

    def _finish(self, members: Iterable[Member], failure: ProxyError | None = None) -> None:
        for member in members:
            if not member.over:
                member.over = True
                nothing = None if member.begun else UpstreamFailed("the answer is empty", code="upstream_error")
                self._events.put_nowait(Event(member, failure=failure or nothing))


async def _closable(stream: AsyncIterator[Chunk]) -> AsyncGenerator[Chunk, None]:
    """`stream` as a generator that closes it."""
    try:
        async for chunk in stream:
            yield chunk
    finally:
        await stream.aclose()  # type: ignore[attr-defined]
