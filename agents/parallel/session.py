"""One question to several models, from the requests to the combined answer."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from typing import Any

from llama_smart_proxy import ChatRequest, Chunk, Context, ProxyError, UpstreamFailed
from llama_smart_proxy.agents.parallel.members import Member, Round, Usage, members_of
from llama_smart_proxy.agents.parallel.merging import best, graded, majority, synthesis
from llama_smart_proxy.agents.parallel.sections import Sections

DRAFT = 20_000
"""Number of characters of an answer that a user can look up."""


class Session:
    """`request`, sent to each of `models`. `as_choices`: each answer is returned as a choice; nothing is combined."""

    def __init__(self, request: ChatRequest, ctx: Context, models: Sequence[str], as_choices: bool) -> None:
        self._request = request
        self._ctx = ctx
        self._config: Any = ctx.config
        self._chairman: str = ctx.config.chairman or request.model
        self._usage = Usage()
        self._round = Round(ctx, request, members_of(models), self._usage)
        self._as_choices = as_choices
        self._finish = "stop"

    async def answer(self) -> AsyncGenerator[Chunk, None]:
        """The answer, then its end and usage.

        Raises: the first failure, as soon as the quorum cannot be reached.
        """
        merging: Mapping[str, Callable[[], AsyncGenerator[Chunk, None]]] = {
            "judge": self._judge,
            "vote": self._vote,
            "synthesize": self._synthesize,
            "show": self._choices if self._as_choices else self._show,
        }
        await self._plan()
        for chunk in self._asking():
            yield chunk
        await self._ctx.status(self._awaited())
        async with aclosing(merging[self._config.strategy]()) as chunks:
            async for chunk in chunks:
                yield chunk
        for index, finish in enumerate(
            [member.finish for member in self._round.members] if self._as_choices else [self._finish]
        ):
            yield Chunk.ending(finish, index=index)
        for chunk in self._usage.chunks():
            yield chunk

    # -- asking --------------------------------------------------------------------------------------------------------

    async def _plan(self) -> None:
        """Plan the round. Certain failures are raised here, before anything is sent, with their status."""
        merges = self._config.strategy == "synthesize"
        if merges:
            await self._ctx.fitting([self._chairman])
        await self._round.plan(self._chairman if merges else None)
        self._check_quorum()

    def _check_quorum(self) -> None:
        """Raises: the first failure, if the quorum cannot be reached any more."""
        failures = [member.failure for member in self._round.members if member.failure is not None]
        if failures and len(self._round.members) - len(failures) < min(self._config.quorum, len(self._round.members)):
            raise failures[0]

    async def _answered(self) -> list[Member]:
        """The members with an answer; the user can look up each of several. Raises: UpstreamFailed if there is none."""
        answered = [member for member in self._round.members if member.answered]
        if not answered:
            raise UpstreamFailed("no model has answered", code="upstream_error")
        for member in answered if len(answered) > 1 else ():
            text = member.text if len(member.text) <= DRAFT else f"{member.text[:DRAFT]}..."
            # Open WebUI shows the texts of one `source` in `metadata` as one.
            draft = {"source": {"name": member.label}, "document": [text], "metadata": [{"source": member.label}]}
            with suppress(ProxyError):  # beyond the limits of agents there is the answer alone
                await self._ctx.event("source", draft)
        return answered

    def _progress(self, text: str) -> list[Chunk]:
        return [Chunk.progress(text)] if self._config.progress else []

    def _asking(self) -> list[Chunk]:
        members = self._round.members
        groups = [[member.label for member in members if member.model in group] for group in self._round.groups]
        asked = self._progress(f"Asking {'; then '.join(map(', '.join, groups))}.")
        return asked + [chunk for member in members if member.done for chunk in self._progress_of(member)]

    def _progress_of(self, member: Member) -> list[Chunk]:
        if member.failure is not None:
            return self._progress(f"{member.label} failed: {member.failure.message}")
        return self._progress(f"{member.label} has answered ({len(member.text.split())} words).")

    def _awaited(self) -> str:
        """What the user waits for, until all members are done."""
        members = self._round.members
        models = {member.model for member in members}
        whom = f"{len(models)} models" if len(models) > 1 else f"{members[0].model}, {len(members)} times"
        done = sum(member.done for member in members)
        return f"Asking {whom}" + (f": {done} of {len(members)} done" if done else "")

    async def _collect(self) -> AsyncGenerator[Chunk, None]:
        """Run the round; yields the progress."""
        async with aclosing(self._round.events()) as events:
            async for event in events:
                if not event.text:
                    self._check_quorum()
                    for chunk in self._progress_of(event.member):
                        yield chunk
                    await self._ctx.status(self._awaited())
        await self._ctx.status("Comparing answers")

    # -- strategies ----------------------------------------------------------------------------------------------------

    def _chosen(self, member: Member) -> Chunk:
        self._finish = member.finish
        return Chunk.of(member.text)

    async def _judge(self) -> AsyncGenerator[Chunk, None]:
        async for chunk in self._collect():
            yield chunk
        answered = await self._answered()
        grades = await graded(self._ctx, self._request, answered, self._usage)
        winner = answered[best(grades)]
        shown = [f"{m.label}: {'no grade' if g is None else f'{g:g}'}" for m, g in zip(answered, grades, strict=True)]
        for chunk in self._progress(f"Grades: {', '.join(shown)}. Selected: {winner.label}."):
            yield chunk
        yield self._chosen(winner)

    async def _vote(self) -> AsyncGenerator[Chunk, None]:
        async for chunk in self._collect():
            yield chunk
        answered = await self._answered()
        place, votes = majority([member.text for member in answered])
        for chunk in self._progress(f"{votes} of {len(answered)} agree."):
            yield chunk
        yield self._chosen(answered[place])

    async def _synthesize(self) -> AsyncGenerator[Chunk, None]:
        async for chunk in self._collect():
            yield chunk
        answered = await self._answered()
        if len(answered) == 1:
            yield self._chosen(answered[0])
            return
        for chunk in self._progress(f"{self._chairman} merges {len(answered)} answers."):
            yield chunk
        await self._ctx.status("Comparing answers")
        async for chunk in self._ctx.chat(synthesis(self._request, self._chairman, answered)):
            self._usage.add(chunk.usage)
            self._finish = chunk.finish_reason or self._finish
            if chunk.text or chunk.reasoning:
                yield Chunk.of(chunk.text, reasoning=chunk.reasoning)

    async def _show(self) -> AsyncGenerator[Chunk, None]:
        sections = Sections(self._round.members)
        async with aclosing(self._round.events()) as events:
            async for event in events:
                self._check_quorum()
                shown = sections.add(event.member, event.text) if event.text else sections.done(event.member)
                if shown:
                    yield Chunk.of(shown)
        if text := sections.end():
            yield Chunk.of(text)

    async def _choices(self) -> AsyncGenerator[Chunk, None]:
        """All answers, interleaved, each with its index; a failure message replaces a missing answer."""
        members = self._round.members
        begun: set[Member] = set()

        def piece(member: Member, text: str) -> Chunk:
            delta = {"content": text} | ({} if member in begun else {"role": "assistant"})
            begun.add(member)
            return Chunk({"choices": [{"index": members.index(member), "delta": delta, "finish_reason": None}]})

        for member in members:
            if member.failure is not None:
                yield piece(member, member.failure.message)
        async with aclosing(self._round.events()) as events:
            async for event in events:
                self._check_quorum()
                if text := event.text or (event.failure.message if event.failure is not None else ""):
                    yield piece(event.member, text)
