"""Asks the members of a round, and tells what they say as they say it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from agents.base import Context
from proxy.chat import ChatRequest, Chunk, Json
from proxy.errors import ProxyError, UpstreamFailed, UpstreamRefused

NOT_FOR_MEMBERS = ("tools", "tool_choice", "parallel_tool_calls", "functions", "function_call", "stream_options", "n")
"""Fields of a request that a member does not get: its answer is a draft, and calls nothing."""


@dataclass(eq=False, slots=True)
class Member:
    """One who is asked, and what it has said, as far as `Round.events` has told; `failure` is why it has not."""

    label: str
    model: str
    pieces: list[str] = field(default_factory=list)
    done: bool = False
    failure: ProxyError | None = None
    begun: bool = False
    """Whether anything of its answer has come, told or not yet."""
    over: bool = False
    """Whether nothing more will come."""

    @property
    def text(self) -> str:
        """The whole answer; nobody needs the white space around it."""
        return "".join(self.pieces).strip()

    @property
    def answered(self) -> bool:
        return self.done and self.failure is None


class Usage:
    """The tokens of everything that was asked for one request."""

    def __init__(self) -> None:
        self._sum: dict[str, int] = {}

    def add(self, usage: Any) -> None:
        for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
            if isinstance(usage, dict) and isinstance(usage.get(name), int):
                self._sum[name] = self._sum.get(name, 0) + usage[name]

    def chunks(self) -> list[Chunk]:
        """The chunk that tells it, if anybody told us."""
        return [Chunk({"choices": [], "usage": dict(self._sum)})] if self._sum else []


@dataclass(frozen=True, slots=True)
class Event:
    """`member` has said `text` more; or, without one, it is done, with a `failure` or without."""

    member: Member
    text: str = ""
    failure: ProxyError | None = None

    def tell(self) -> None:
        """Put it on record."""
        if self.text:
            self.member.pieces.append(self.text)
        else:
            self.member.done, self.member.failure = True, self.failure


class Round:
    """Asks all members, those whose models are loaded or fit beside them first, and each model in one go.

    `events` tells what they say until all are done. A member that fails is done, too.
    """

    def __init__(self, ctx: Context, request: ChatRequest, members: Sequence[Member], usage: Usage, member_s: float):
        self._ctx = ctx
        self._request = request
        self._members = members
        self._usage = usage
        self._member_s = member_s
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()

    async def events(self) -> AsyncGenerator[Event, None]:
        # The request ends what an agent starts, but an answer that is broken off need not wait for that.
        task = asyncio.create_task(self._run())
        try:
            while (event := await self._events.get()) is not None:
                event.tell()
                yield event
            await task
        finally:
            task.cancel()

    async def _run(self) -> None:
        try:
            for group in await self._groups():
                asked = [[m for m in self._members if m.model == model] for model in dict.fromkeys(group)]
                await asyncio.gather(*map(self._ask, asked))
        finally:
            self._events.put_nowait(None)

    async def _groups(self) -> list[list[str]]:
        """The models in the order of asking. Those that there are not have failed already."""
        known: list[str] = []
        for model in dict.fromkeys(member.model for member in self._members):
            try:
                await self._ctx.fitting([model])
                known.append(model)
            except ProxyError as exc:
                self._finish([member for member in self._members if member.model == model], exc)
        return await self._ctx.fitting(known) if known else []

    async def _ask(self, members: Sequence[Member]) -> None:
        """Ask one model, once for each of `members`: at best by one request, which evaluates the prompt once."""
        if len(members) > 1 and self._ctx.server == "llama.cpp" and await self._ask_together(members):
            return
        first, *others = members
        began = asyncio.Event()
        # The others begin when the first has: by then the model's server has the prompt in its cache.
        await asyncio.gather(self._ask_one(first, began), *(self._after(began, other) for other in others))

    async def _after(self, began: asyncio.Event, member: Member) -> None:
        await began.wait()
        await self._ask_one(member, asyncio.Event())

    async def _ask_together(self, members: Sequence[Member]) -> bool:
        """Whether the server takes `n`: one that has too few slots refuses."""
        request = self._for(members[0], {"n": len(members)})
        try:
            async with asyncio.timeout(self._member_s):
                async for chunk in self._ctx.chat(request):
                    if chunk.index < len(members):
                        self._take(members[chunk.index], chunk)
        except UpstreamRefused as exc:
            if exc.status == 400 and not any(member.begun for member in members):
                return False
            self._finish(members, exc)
        except TimeoutError:
            self._finish(members, self._late())
        except ProxyError as exc:
            self._finish(members, exc)
        self._finish(members)
        return True

    async def _ask_one(self, member: Member, began: asyncio.Event) -> None:
        try:
            async with (
                asyncio.timeout(self._member_s),
                aclosing(_closable(self._ctx.chat(self._for(member, {})))) as said,
            ):
                async for chunk in said:
                    began.set()
                    self._take(member, chunk)
        except TimeoutError:
            self._finish([member], self._late())
        except ProxyError as exc:
            self._finish([member], exc)
        finally:
            began.set()
        self._finish([member])

    def _for(self, member: Member, more: Json) -> ChatRequest:
        request = self._request.copy()
        request.body = {key: value for key, value in request.body.items() if key not in NOT_FOR_MEMBERS}
        request.body |= {"model": member.model, **more}
        return request

    def _take(self, member: Member, chunk: Chunk) -> None:
        self._usage.add(chunk.usage)
        if chunk.text:
            member.begun = True
            self._events.put_nowait(Event(member, chunk.text))

    def _late(self) -> UpstreamFailed:
        return UpstreamFailed(f"no answer within {self._member_s:g} s", status=504, code="upstream_timeout")

    def _finish(self, members: Sequence[Member], failure: ProxyError | None = None) -> None:
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
