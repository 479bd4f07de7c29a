"""Asks the members of a round, and passes on their answers as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from llama_smart_proxy import ChatRequest, Chunk, Context, Json, ProxyError, UpstreamFailed

NOT_FOR_MEMBERS = ("tools", "tool_choice", "parallel_tool_calls", "functions", "function_call", "stream_options", "n")
"""Fields of a request that a member does not get: its answer is a draft, and calls nothing."""
NO_SUCH_N = (400, 422)
"""How servers refuse a request for several answers: Ollama has none, and llama-server no more than it has slots."""
COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens")


@dataclass(eq=False, slots=True)
class Member:
    """One model that is asked, and its answer so far, as `Round.events` has yielded it; `failure` is why it has none.

    `sample` numbers those of one model, from 0.
    """

    label: str
    model: str
    sample: int = 0
    pieces: list[str] = field(default_factory=list)
    done: bool = False
    failure: ProxyError | None = None
    finish: str = "stop"
    """Why its answer ended: `stop` or `length`."""
    begun: bool = False
    """Whether anything of its answer has come, be it yielded or not yet."""
    over: bool = False
    """Whether nothing more will come."""

    @property
    def text(self) -> str:
        """The whole answer, without white space around it."""
        return "".join(self.pieces).strip()

    @property
    def answered(self) -> bool:
        return self.done and self.failure is None


def members_of(models: Sequence[str]) -> list[Member]:
    """One for each of `models`; those of one model are numbered."""
    made: list[Member] = []
    for at, model in enumerate(models):
        sample = models[:at].count(model)
        made.append(Member(f"{model} #{sample + 1}" if models.count(model) > 1 else model, model, sample))
    return made


class Usage:
    """The tokens of everything that was asked for one request."""

    def __init__(self) -> None:
        self._sum: dict[str, int] = {}

    def add(self, usage: Any) -> None:
        for name in COUNTS:
            if isinstance(usage, dict) and isinstance(usage.get(name), int):
                self._sum[name] = self._sum.get(name, 0) + usage[name]

    def add_shared(self, usages: Sequence[Any]) -> None:
        """Of several answers to one prompt, which llama-server reports with each of them, but reads once."""
        known = [usage for usage in usages if isinstance(usage, dict)]
        prompt, completion = ([n for usage in known if isinstance(n := usage.get(name), int)] for name in COUNTS[:2])
        if prompt or completion:
            counted = (max(prompt, default=0), sum(completion))
            self.add(dict(zip(COUNTS, (*counted, sum(counted)), strict=True)))

    def chunks(self) -> list[Chunk]:
        """The chunk with it, if any server has reported one."""
        return [Chunk({"choices": [], "usage": dict(self._sum)})] if self._sum else []


@dataclass(frozen=True, slots=True)
class Event:
    """`text` is the next piece of the answer of `member`; without one it is done, with a `failure` or without."""

    member: Member
    text: str = ""
    failure: ProxyError | None = None

    def record(self) -> None:
        """Put it on record."""
        if self.text:
            self.member.pieces.append(self.text)
        else:
            self.member.done, self.member.failure = True, self.failure


class Round:
    """Asks all members: first those whose models are loaded, or fit beside them; and each model in one go.

    `plan` finds the order, `events` yields their answers until all are done. A member that fails is done, too.
    """

    def __init__(self, ctx: Context, request: ChatRequest, members: Sequence[Member], usage: Usage):
        self.members = members
        self.groups: list[list[str]] = []
        """The models that are asked at the same time, one group after the other."""
        self._ctx = ctx
        self._request = request
        self._usage = usage
        self._member_s: float = ctx.config.member_s
        self._temperature: float = ctx.config.temperature
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()

    async def plan(self, last: str | None = None) -> None:
        """Find the order. The model `last` is asked in the last group, if not in the only one: it will be needed after
        that. Members whose model does not exist have failed then."""
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
        # The request ends what an agent starts, but an answer that is broken off need not wait for that.
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
                await asyncio.gather(*(self._ask(self._of(model)) for model in group))
        finally:
            self._events.put_nowait(None)

    async def _ask(self, members: Sequence[Member]) -> None:
        """Ask one model, once for each of `members`: at best by one request, which evaluates the prompt once."""
        if len(members) > 1:
            members = await self._ask_together(members)
        if members:
            first, *others = members
            began = asyncio.Event()
            # The others begin when the first has: by then the model's server has the prompt in its cache.
            await asyncio.gather(self._ask_one(first, began), *(self._after(began, other) for other in others))

    async def _after(self, began: asyncio.Event, member: Member) -> None:
        await began.wait()
        await self._ask_one(member, asyncio.Event())

    async def _ask_together(self, members: Sequence[Member]) -> Sequence[Member]:
        """Ask for all answers in one request. Those that are still to be asked, because the server does not do that, or
        does as if it had not been asked to."""
        usages: list[Any] = []
        try:
            async with asyncio.timeout(self._member_s), aclosing(self._chat(members[0], n=len(members))) as answer:
                async for chunk in answer:
                    usages.append(chunk.usage)
                    if chunk.index < len(members):
                        self._take(members[chunk.index], chunk)
            self._finish(member for member in members if member.begun)
        except TimeoutError:
            self._finish(members, self._late())
        except ProxyError as exc:
            if exc.status not in NO_SUCH_N or any(member.begun for member in members):
                self._finish(members, exc)
        finally:
            self._usage.add_shared(usages)
        return [member for member in members if not member.over]

    async def _ask_one(self, member: Member, began: asyncio.Event) -> None:
        try:
            async with asyncio.timeout(self._member_s), aclosing(self._chat(member)) as answer:
                async for chunk in answer:
                    self._usage.add(chunk.usage)
                    self._take(member, chunk)
                    if chunk.text or chunk.reasoning:
                        began.set()
        except TimeoutError:
            self._finish([member], self._late())
        except ProxyError as exc:
            self._finish([member], exc)
        finally:
            began.set()
        self._finish([member])

    def _chat(self, member: Member, **more: int) -> AsyncGenerator[Chunk, None]:
        return _closable(self._ctx.chat(self._for(member, more)))

    def _for(self, member: Member, more: Json) -> ChatRequest:
        """The request as `member` gets it. Samples of one model are to differ."""
        request = self._request.copy()
        body = {key: value for key, value in request.body.items() if key not in NOT_FOR_MEMBERS}
        if len(self._of(member.model)) > 1:
            body.setdefault("temperature", self._temperature)
            if isinstance(seed := body.get("seed"), int) and seed >= 0:  # below that it means any
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

    def _late(self) -> UpstreamFailed:
        return UpstreamFailed(f"no answer within {self._member_s:g} s", status=504, code="upstream_timeout")

    def _finish(self, members: Iterable[Member], failure: ProxyError | None = None) -> None:
        for member in members:
            if not member.over:
                member.over = True
                nothing = None if member.begun else UpstreamFailed("the answer is empty", code="upstream_error")
                self._events.put_nowait(Event(member, failure=failure or nothing))


async def _closable(stream: AsyncIterator[Chunk]) -> AsyncGenerator[Chunk, None]:
    """`stream`, which ends when this is closed."""
    try:
        async for chunk in stream:
            yield chunk
    finally:
        await stream.aclose()  # type: ignore[attr-defined]
