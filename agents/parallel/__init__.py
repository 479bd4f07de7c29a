"""The agent that asks several models at once."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from agents.base import Agent, Context, Options
from agents.parallel.members import Member, Round, Usage
from agents.parallel.merging import best, graded, majority, synthesis
from proxy.chat import ChatRequest, Chunk, ChunkStream
from proxy.errors import BadRequest, UpstreamFailed


def _names(value: Any) -> Any:
    """`a,b` as two names."""
    return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value


class Parallel(Agent):
    """Asks several models, or the same one several times, and makes one answer of theirs: `strategy=synthesize` has a
    model merge them, `judge` has them grade each other, `vote` takes what most say, `show` shows all.

    Everybody gets the whole conversation. Who fails does not spoil the answer.
    """

    command = "parallel"
    per_call = frozenset({"models", "n", "strategy", "chairman", "progress"})

    class Config(Options):
        """What may stand behind `parallel` in the configuration."""

        models: Annotated[list[str], BeforeValidator(_names)] = Field(
            default=[], description="The models to ask, separated by commas; by default the chat's own, `n` times."
        )
        n: int = Field(default=3, ge=1, le=16, description="How often the chat's own model is asked, without `models`.")
        strategy: Literal["synthesize", "judge", "vote", "show"] = Field(
            default="synthesize", description="What becomes of the answers: synthesize, judge, vote or show."
        )
        chairman: str | None = Field(default=None, description="The model that merges; by default the chat's own.")
        progress: bool = Field(default=True, description="Tell what is going on, as the answer's thoughts.")
        temperature: float = Field(default=0.8, ge=0, description="For answers of one model, if the request sets none.")
        quorum: int = Field(default=1, ge=1, description="How many have to answer, or the request fails.")
        member_s: float = Field(default=300.0, gt=0, description="Seconds that each may take.")

    async def on_request(self, request: ChatRequest, ctx: Context) -> ChunkStream | None:
        if not request.last_user_text.strip():
            raise BadRequest("/parallel needs a question behind it")
        return _Session(request.copy(), ctx).answer()


class _Session:
    """One question, from asking to the answer."""

    def __init__(self, request: ChatRequest, ctx: Context) -> None:
        self._request = request
        self._ctx = ctx
        self._config: Parallel.Config = ctx.config
        self._usage = Usage()
        own = request.body.get("n")
        self._indexed = self._config.strategy == "show" and isinstance(own, int) and own > 1
        times = own if self._indexed and isinstance(own, int) else self._config.n
        if self._config.models:
            self._members = [Member(name, name) for name in self._config.models]
        else:
            self._members = [Member(f"{request.model} #{at}", request.model) for at in range(1, times + 1)]
            request.body.setdefault("temperature", self._config.temperature)

    async def answer(self) -> AsyncGenerator[Chunk, None]:
        """The answer, then its end, and what it cost."""
        labels = ", ".join(member.label for member in self._members)
        for chunk in self._progress(f"Asking {labels}."):
            yield chunk
        strategy = {"show": self._show, "judge": self._judge, "vote": self._vote, "synthesize": self._synthesize}
        async with aclosing(strategy[self._config.strategy]()) as chunks:
            async for chunk in chunks:
                yield chunk
        for index in range(len(self._members) if self._indexed else 1):
            yield Chunk({"choices": [{"index": index, "delta": {}, "finish_reason": "stop"}]})
        for chunk in self._usage.chunks():
            yield chunk

    def _progress(self, words: str) -> list[Chunk]:
        return [Chunk.of(reasoning=f"{words}\n")] if self._config.progress else []

    def _round(self) -> Round:
        return Round(self._ctx, self._request, self._members, self._usage, self._config.member_s)

    def _check_quorum(self) -> list[Member]:
        """Those that have answered. Raises: the first failure, if these are too few."""
        answered = [member for member in self._members if member.answered]
        if len(answered) < min(self._config.quorum, len(self._members)):
            failures = [member.failure for member in self._members if member.failure is not None]
            raise failures[0] if failures else UpstreamFailed("nobody has answered", code="upstream_error")
        return answered

    async def _collect(self) -> AsyncGenerator[Chunk, None]:
        """Ask them all; progress in between."""
        async with aclosing(self._round().events()) as events:
            async for event in events:
                if event.text:
                    continue
                member = event.member
                if member.failure is not None:
                    told = f"{member.label} failed: {member.failure.message}"
                else:
                    told = f"{member.label} has answered ({len(member.text.split())} words)."
                for chunk in self._progress(told):
                    yield chunk

    async def _judge(self) -> AsyncGenerator[Chunk, None]:
        async for chunk in self._collect():
            yield chunk
        answered = self._check_quorum()
        grades = await graded(self._ctx, self._request.last_user_text, answered, self._usage)
        winner = answered[best(grades)]
        told = [f"{m.label}: {'no grade' if g is None else f'{g:g}'}" for m, g in zip(answered, grades, strict=True)]
        for chunk in self._progress(f"Grades: {', '.join(told)}. The answer of {winner.label} it is."):
            yield chunk
        yield Chunk.of(winner.text)

    async def _vote(self) -> AsyncGenerator[Chunk, None]:
        async for chunk in self._collect():
            yield chunk
        answered = self._check_quorum()
        place, votes = majority([member.text for member in answered])
        for chunk in self._progress(f"{votes} of {len(answered)} agree."):
            yield chunk
        yield Chunk.of(answered[place].text)

    async def _synthesize(self) -> AsyncGenerator[Chunk, None]:
        async for chunk in self._collect():
            yield chunk
        answered = self._check_quorum()
        if len(answered) == 1:
            yield Chunk.of(answered[0].text)
            return
        chairman = self._config.chairman or self._request.model
        for chunk in self._progress(f"{chairman} merges {len(answered)} answers."):
            yield chunk
        async for chunk in self._ctx.chat(synthesis(self._request, chairman, answered)):
            self._usage.add(chunk.usage)
            if chunk.text:
                yield Chunk.of(chunk.text)
            elif chunk.reasoning and self._config.progress:
                yield Chunk.of(reasoning=chunk.reasoning)

    async def _show(self) -> AsyncGenerator[Chunk, None]:
        """One section for each, in the order in which they begin; who comes first is shown live, and so is who comes
        next from where he is by then. For a client that asked for several answers they are these."""
        shown: list[Member] = []
        async with aclosing(self._round().events()) as events:
            async for event in events:
                if self._indexed:
                    if event.text:
                        yield Chunk.of(event.text, index=self._members.index(event.member))
                    continue
                for text in _sections(self._members, shown, event.member, event.text):
                    yield Chunk.of(text)
        self._check_quorum()


def _sections(members: Sequence[Member], shown: list[Member], member: Member, text: str) -> list[str]:
    """What is to be shown now that `member` has said `text`, or is done. The last of `shown` is shown live."""
    if not shown:
        shown.append(member)
        return [_heading(member, first=True), _whole(member)]
    told = [text] if member is shown[-1] and text else []
    if member is shown[-1] and not text and member.failure is not None:
        told.append(f"\n\n*{member.failure.message}*")
    while shown[-1].done:
        waiting = [other for other in members if other not in shown and (other.pieces or other.done)]
        if not waiting:
            break
        shown.append(waiting[0])
        told += [_heading(waiting[0]), _whole(waiting[0])]
    return told


def _heading(member: Member, *, first: bool = False) -> str:
    return ("" if first else "\n\n") + f"### {member.label}\n\n"


def _whole(member: Member) -> str:
    failure = f"*{member.failure.message}*" if member.failure is not None else ""
    return "".join(member.pieces) + ("\n\n" if member.pieces and failure else "") + failure
