"""The answer, passed through the hooks of agents: one layer for each agent.

A layer attributes failures of the agent's own code to the agent, and passes failures of the layer below unchanged. It
closes what the agent leaves open, so that an agent that stops early frees the model at once.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from functools import partial
from typing import Any

from llama_smart_proxy.agents.base import Agent
from llama_smart_proxy.backends.http.turns import breathe
from llama_smart_proxy.proxy.chat import ChatRequest, Chunk
from llama_smart_proxy.proxy.middleware.context import AgentContext
from llama_smart_proxy.proxy.middleware.functions import calling
from llama_smart_proxy.proxy.middleware.hooks import failure_of
from llama_smart_proxy.proxy.middleware.passage import CLOSE_S, YIELD_EVERY, InputStream, OutputLimit

logger = logging.getLogger(__name__)


def response_layer(ctx: AgentContext, below: AsyncIterator[Chunk], choices: int) -> AsyncGenerator[Chunk, None]:
    """The answer `below`, transformed by the agent of `ctx`. It consists of so many `choices`, interleaved; a generator
    hook gets one after the other."""
    ctx.timer.below = below
    agent, functions = ctx.active.loaded.agent, ctx.active.loaded.functions
    if type(agent).on_response is Agent.on_response and not functions:
        return _mapped(ctx, below)
    hook = calling(agent, ctx, functions) if functions else partial(agent.on_response, ctx=ctx)
    if choices > 1:
        return _one_by_one(ctx, below, hook, choices)
    return _transformed(ctx, below, hook, skips=ctx.active.settings.on_error == "skip")


def reply_layer(ctx: AgentContext, answer: AsyncIterator[Chunk]) -> AsyncGenerator[Chunk, None]:
    """The answer of an agent in place of a model. Its failure ends the request: there is no answer below to use."""
    return _transformed(ctx, _nothing(), lambda source: answer, skips=False)


async def _nothing() -> AsyncGenerator[Chunk, None]:
    return
    yield


def choices_of(request: ChatRequest) -> int:
    """The number of choices that an answer to `request` has: `n`, for each of its prompts."""
    n, prompt = request.body.get("n"), request.body.get("prompt")
    prompts = len(prompt) if isinstance(prompt, list) and all(isinstance(one, str | list) for one in prompt) else 1
    return max(1, prompts) * (n if isinstance(n, int) and n > 1 else 1)


async def _mapped(ctx: AgentContext, below: AsyncIterator[Chunk]) -> AsyncGenerator[Chunk, None]:
    """The layer of an agent with `on_chunk` only. With `on_error: skip`, a chunk that it fails on passes unchanged."""
    on_chunk, timer = ctx.active.loaded.agent.on_chunk, ctx.timer
    limit = OutputLimit(ctx)
    async for chunk in below:
        if ctx.failed:
            yield chunk
            continue
        limit.received(chunk)
        try:
            timer.begin()
            try:
                passed = await on_chunk(chunk, ctx)
            finally:
                timer.end()
            if timer.cancels and timer.was_cancelled():
                raise ctx.timer.hung()
            if passed is None:
                continue
            limit.check(passed)
        except BaseException as exc:
            failure = failure_of(ctx, exc)
            if ctx.active.settings.on_error != "skip":
                raise failure from exc
            passed = chunk
        yield passed


async def _transformed(
    ctx: AgentContext, below: AsyncIterator[Chunk], hook: Callable[[InputStream], Any], *, skips: bool
) -> AsyncGenerator[Chunk, None]:
    """The layer of an agent whose `hook` makes a stream of its input. With `skips`, a failure passes the chunks that it
    has received since its last output, and then the rest, unchanged."""
    timer, limit = ctx.timer, OutputLimit(ctx)
    source, output = InputStream(ctx, below, limit, keeps=skips), None
    try:
        try:
            output = _output(hook, source)
            while True:
                timer.begin()
                try:
                    chunk = await output.__anext__()
                except StopAsyncIteration:
                    return
                except GeneratorExit as exc:  # the agent's own: that of a reader who has left arrives at the `yield`
                    raise _raised(exc) from exc
                finally:
                    timer.end()
                    if timer.cancels:
                        _raise_if_timed_out(ctx)
                limit.check(chunk)
                if skips:
                    source.passed_on(chunk)
                yield chunk
                if limit.since_input >= YIELD_EVERY:
                    await limit.yield_control()
        except BaseException as exc:
            if exc is source.failure or isinstance(exc, GeneratorExit):
                raise
            failure = failure_of(ctx, exc)
            if not skips:
                raise failure from exc
        await source.retire()
        for chunk in source.unpassed:
            yield chunk
        async for chunk in below:
            yield chunk
    finally:
        await _close(ctx, output)
        await source.release()  # the agent may have stopped early, while layers above go on for long


async def _one_by_one(
    ctx: AgentContext, below: AsyncIterator[Chunk], hook: Callable[[InputStream], Any], count: int
) -> AsyncGenerator[Chunk, None]:
    """The layer of an agent with `on_response` for an answer of `count` choices: the hook is called for each of them,
    and each is written out before the next one. Chunks without a choice, such as `usage`, follow at the end."""
    choices = _Choices(below)
    skips = ctx.active.settings.on_error == "skip"
    while (index := await choices.next()) is not None:
        async with aclosing(_transformed(ctx, choices.one(index), hook, skips=skips)) as layer:
            async for chunk in layer:
                if chunk.choice and chunk.index != index:
                    chunk.data["choices"][0]["index"] = index
                yield chunk
        choices.left.add(index)
        if len(choices.left) >= count and choices.left != choices.ended and isinstance(below, AsyncGenerator):
            await below.aclose()  # the agent has stopped early, and nothing else is awaited
    for chunk in choices.others:
        yield chunk


class _Choices:
    """The choices of an answer `below`, taken apart. `ended` are the numbers of those that have an end, `left` those
    that are not read any more."""

    def __init__(self, below: AsyncIterator[Chunk]) -> None:
        self._below = below
        self._received: dict[int, deque[Chunk]] = {}
        self.ended: set[int] = set()
        self.left: set[int] = set()
        self.others: list[Chunk] = []

    async def next(self) -> int | None:
        """The number of the first choice that has not been read yet; None at the end of the answer."""
        while not (waiting := self._received.keys() - self.left):
            if not await self._read():
                return None
        return min(waiting)

    async def one(self, index: int) -> AsyncGenerator[Chunk, None]:
        """The chunks of this choice."""
        received = self._received[index]
        while index not in self.ended:
            if not received and not await self._read():
                return
            while received:
                chunk = received.popleft()
                if chunk.finish_reason:
                    self.ended.add(index)
                yield chunk
                if len(received) % YIELD_EVERY == YIELD_EVERY - 1:
                    await breathe()

    async def _read(self) -> bool:
        """Receive a chunk. Returns False at the end of the answer."""
        try:
            chunk = await self._below.__anext__()
        except StopAsyncIteration:
            return False
        if chunk.choice:
            if chunk.index not in self.left:
                self._received.setdefault(chunk.index, deque()).append(chunk)
        elif chunk.seen:
            self.others.append(chunk)
        return True


def _output(hook: Callable[[InputStream], Any], source: InputStream) -> Any:
    """The agent's stream."""
    try:
        return hook(source)
    except GeneratorExit as exc:
        raise _raised(exc) from exc


def _raised(exc: GeneratorExit) -> RuntimeError:
    return RuntimeError(f"{type(exc).__name__} was raised, as if nothing read the answer")


def _raise_if_timed_out(ctx: AgentContext) -> None:
    """After a hook that was cancelled for its time limit. Raises: AgentError, in place of any result or exception; a
    CancelledError is left to `failure_of`."""
    if not isinstance(sys.exc_info()[1], asyncio.CancelledError):
        ctx.timer.was_cancelled()
        raise ctx.timer.hung()


async def _close(ctx: AgentContext, output: Any) -> None:
    """Close the agent's generator. Failures are only logged: the answer is over."""
    aclose = getattr(output, "aclose", None)
    if aclose is None:
        return
    try:
        async with asyncio.timeout(CLOSE_S):
            await aclose()
    except BaseException as exc:  # agent code may raise anything
        task = asyncio.current_task()
        if isinstance(exc, asyncio.CancelledError) and task is not None and task.cancelling():
            raise
        ctx.active.plugin.counts.failures += 1
        logger.error("agent %s did not clean up properly", ctx.name, exc_info=exc)
