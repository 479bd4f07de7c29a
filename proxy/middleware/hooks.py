"""Runs the hooks of agents, around one request: each in its turn, each within its limits, each failure its own.

An answer passes one layer an agent. A layer tells an agent's failure from one that came to it from below, which passes
as it is; and closes what the agent leaves open, so that whoever stops early frees the model at once.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from llama_smart_proxy.agents.base import Agent
from llama_smart_proxy.proxy.chat import ChatRequest, Chunk, ChunkStream
from llama_smart_proxy.proxy.errors import AgentError, BadRequest, ProxyError
from llama_smart_proxy.proxy.middleware.context import AgentContext

logger = logging.getLogger(__name__)
_current_task = asyncio.current_task

CLOSE_S = 0.2
"""Seconds that an agent may take to clean up when an answer is broken off."""
BREATH = 256
"""Chunks in a row that an agent may make without awaiting anything, before others get their turn."""


async def enter(
    contexts: Sequence[AgentContext], request: ChatRequest
) -> tuple[list[AgentContext], AgentContext | None, ChunkStream | None]:
    """Show the request to the agents, first to last, until one answers it: who saw it and did not, the one that did,
    and its answer.

    Raises: AgentError, and whatever `ProxyError` an agent raises itself.
    """
    entered: list[AgentContext] = []
    left_out: set[str] = set()
    for ctx in contexts:
        if ctx.name in left_out and not ctx.active.wanted:
            continue
        ctx.active.plugin.calls += 1
        answer = await _on_request(ctx, request)
        if answer is not None:
            return entered, ctx, answer
        if not ctx.failed:
            entered.append(ctx)
            left_out |= ctx.leaves_out
    return entered, None, None


async def _on_request(ctx: AgentContext, request: ChatRequest) -> ChunkStream | None:
    agent = ctx.active.made.agent
    if type(agent).on_request is Agent.on_request:
        return None
    before = request.copy() if ctx.active.settings.on_error == "skip" else None
    try:
        ctx.turn.begin()
        try:
            answer = await agent.on_request(request, ctx)
        finally:
            ctx.turn.end()
        if ctx.turn.was_cancelled():
            raise ctx.turn.hung()
        _check_request(ctx, request)
        if answer is not None and not hasattr(answer, "__anext__"):
            raise AgentError(ctx.name, f"returned a {type(answer).__name__} from on_request, which is no stream")
        return answer
    except BaseException as exc:
        failure = blame(ctx, exc)
        if before is None:
            raise failure from exc
        request.body, request.stream = before.body, before.stream
        return None


def blame(ctx: AgentContext, exc: BaseException) -> ProxyError:
    """What the client is told of an agent's failure, which is counted and logged. Raises: `exc` itself if it is none:
    the request is over."""
    hung = ctx.turn.was_cancelled()
    if isinstance(exc, asyncio.CancelledError):
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise exc
    elif isinstance(exc, GeneratorExit):
        raise exc
    if hung:  # whatever it said to that; one that was not told to end has made its cancellation up
        exc = ctx.turn.hung()
    ctx.failed = True
    ctx.active.plugin.failures += not isinstance(exc, BadRequest)  # that one is the client's
    if isinstance(exc, ProxyError):
        logger.warning("agent %s: %s", ctx.name, exc.message)
        return exc
    logger.error("agent %s failed", ctx.name, exc_info=exc)
    return AgentError(ctx.name, f"failed: {type(exc).__name__}")


def _check_request(ctx: AgentContext, request: ChatRequest) -> None:
    body = request.body
    messages = body.get("messages", []) if isinstance(body, dict) else None
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise AgentError(ctx.name, "made the messages something else than a list of objects")
    if not isinstance(body.get("model"), str) or ("messages" not in body and "prompt" not in body):
        raise AgentError(ctx.name, "left a request without model, or without messages or prompt")
    if not messages and "messages" in body:
        raise AgentError(ctx.name, "left a request without messages")


# -- answers -----------------------------------------------------------------------------------------------------------


def layer(ctx: AgentContext, below: AsyncIterator[Chunk]) -> AsyncGenerator[Chunk, None]:
    """The answer `below` as the agent of `ctx` makes it."""
    cls = type(ctx.active.made.agent)
    return _mapped(ctx, below) if cls.on_response is Agent.on_response else _transformed(ctx, below)


async def _mapped(ctx: AgentContext, below: AsyncIterator[Chunk]) -> AsyncGenerator[Chunk, None]:
    """An agent that sees one chunk at a time: what it fails at passes as it was, if it is to be skipped."""
    on_chunk, turn = ctx.active.made.agent.on_chunk, ctx.turn
    extra = _Extra(ctx)
    turn.below = below
    async for chunk in below:
        if ctx.failed:
            yield chunk
            continue
        extra.gave(chunk)
        try:
            turn.begin()
            try:
                passed = await on_chunk(chunk, ctx)
            finally:
                turn.end()
            if turn.cancels and turn.was_cancelled():
                raise ctx.turn.hung()
            if passed is None:
                continue
            extra.check(passed)
        except BaseException as exc:
            failure = blame(ctx, exc)
            if ctx.active.settings.on_error != "skip":
                raise failure from exc
            passed = chunk
        yield passed


async def _transformed(ctx: AgentContext, below: AsyncIterator[Chunk]) -> AsyncGenerator[Chunk, None]:
    """An agent that sees the whole stream. If it is skipped, what it was given since it last passed on a chunk goes by,
    and so does the rest."""
    turn, extra, skips = ctx.turn, _Extra(ctx), ctx.active.settings.on_error == "skip"
    feed = _Feed(ctx, below, extra, keeps=skips)
    turn.below = below
    made: Any = None
    chunk: Any
    try:
        try:
            made = ctx.active.made.agent.on_response(feed, ctx)
            while True:  # as in `answered`, but a generator of their own would cost each token a fifth more
                turn.begin()
                try:
                    chunk = await made.__anext__()
                except StopAsyncIteration:
                    return
                finally:
                    turn.end()
                    if turn.cancels:
                        _settle(ctx)
                extra.check(chunk)
                if skips:
                    feed.passed_on(chunk)
                yield chunk
                if extra.run >= BREATH:
                    await extra.breathe()
        except BaseException as exc:
            if exc is feed.failure:
                raise
            failure = blame(ctx, exc)
            if not skips:
                raise failure from exc
        await feed.retire()
        for chunk in feed.unpassed:
            yield chunk
        async for chunk in below:
            yield chunk
    finally:
        await _close(ctx, made)
        await feed.release()  # it may have stopped early, and those above may go on for long


async def answered(ctx: AgentContext, answer: Any) -> AsyncGenerator[Chunk, None]:
    """The answer that an agent gave in place of a model. There is none to go on with if it fails."""
    turn, extra = ctx.turn, _Extra(ctx)
    chunk: Any
    try:
        while True:
            turn.begin()
            try:
                chunk = await answer.__anext__()
            except StopAsyncIteration:
                return
            finally:
                turn.end()
                if turn.cancels:
                    _settle(ctx)
            extra.check(chunk)
            yield chunk
            if extra.run >= BREATH:
                await extra.breathe()
    except BaseException as exc:
        raise blame(ctx, exc) from exc
    finally:
        await _close(ctx, answer)


def _settle(ctx: AgentContext) -> None:
    """Behind a hook that was told that it hangs. Raises: AgentError, in place of whatever it did then; but not when it
    ended as it was told, which `blame` sees to."""
    if not isinstance(sys.exc_info()[1], asyncio.CancelledError):
        ctx.turn.was_cancelled()
        raise ctx.turn.hung()


class _Feed:
    """The answer as an agent gets it: its clock stands still while it waits for the next chunk."""

    __slots__ = ("_below", "_ctx", "_driver", "_extra", "_keeps", "_reader", "_retired", "_turn", "failure", "unpassed")

    def __init__(self, ctx: AgentContext, below: AsyncIterator[Chunk], extra: _Extra, *, keeps: bool) -> None:
        self._ctx = ctx
        self._driver = _current_task()
        self._reader: asyncio.Task[Any] | None = None
        self._retired: asyncio.Event | None = None
        self._below = below
        self._extra = extra
        self._turn = ctx.turn
        self._keeps = keeps
        self.unpassed: list[Chunk] = []
        self.failure: BaseException | None = None

    def __aiter__(self) -> _Feed:
        return self

    async def __anext__(self) -> Chunk:
        if _current_task() is not self._driver:
            return await self._for_a_task()
        self._turn.end()
        try:
            chunk = await self._below.__anext__()
        except StopAsyncIteration:
            self._check_complete()
            raise
        except BaseException as exc:
            self.failure = exc
            raise
        finally:
            self._turn.begin()
        self._extra.gave(chunk)
        if self._keeps:
            self.unpassed.append(chunk)
        return chunk

    async def _for_a_task(self) -> Chunk:
        """The next chunk for a task that the agent has started, while the agent itself may wait, or not."""
        if self._retired is not None:
            raise StopAsyncIteration
        self._reader = _current_task()
        try:
            with self._turn.awaiting_model():
                chunk = await self._below.__anext__()
        except StopAsyncIteration:
            self._check_complete()
            raise
        except BaseException as exc:
            self.failure = exc
            raise
        finally:
            self._reader = None
            if self._retired is not None:
                self._retired.set()
        self._extra.gave(chunk)
        if self._keeps:
            self.unpassed.append(chunk)
        return chunk

    def passed_on(self, chunk: Chunk) -> None:
        """The agent has passed on what it was given up to this chunk, or all of it if the chunk is its own."""
        for place, given in enumerate(self.unpassed):
            if given is chunk:
                del self.unpassed[: place + 1]
                return
        self.unpassed.clear()

    def _check_complete(self) -> None:
        """Raises: what the answer failed with, if somebody reads on; the agent's fault if it broke off an earlier wait.
        An answer that ends there must not pass for a whole one."""
        if isinstance(self.failure, ProxyError):
            raise self.failure
        if self.failure is not None:
            raise AgentError(self._ctx.name, "broke off the answer and read on")

    async def aclose(self) -> None:
        """The layer closes what is below."""

    async def retire(self) -> None:
        """The agent gets no more. What a task of its own waits for just now is awaited, and is in `unpassed` then."""
        self._retired = asyncio.Event()
        if self._reader is not None:
            await self._retired.wait()
        self._check_complete()

    async def release(self) -> None:
        """Nobody waits for a chunk any more: what is below is closed."""
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.wait({self._reader}, timeout=CLOSE_S)
        if isinstance(self._below, AsyncGenerator):
            await self._below.aclose()


class _Extra:
    """What an agent adds to an answer beyond what it was given: a fault of it must not fill the memory, or take all of
    the processor."""

    __slots__ = ("_ctx", "_surplus", "run")

    def __init__(self, ctx: AgentContext) -> None:
        self._ctx = ctx
        self._surplus = 0
        self.run = 0
        """How many chunks it has made since it took one."""

    def gave(self, chunk: Chunk) -> None:
        frame = chunk.frame
        self._surplus -= len(frame) if frame is not None else chunk.size
        self.run = 0

    def check(self, chunk: Any) -> None:
        """Raises: AgentError for what is no chunk, and for too much."""
        if chunk.__class__ is not Chunk:
            raise AgentError(self._ctx.name, f"answered with a {type(chunk).__name__}, which is no Chunk")
        frame = chunk.frame
        if frame is None:
            _check_chunk(self._ctx, chunk)
        self.run += 1
        self._surplus += len(frame) if frame is not None else chunk.size
        if self._surplus > self._ctx.output_limit:
            words = f"added over {self._ctx.output_limit // 1024} KiB to an answer"
            raise AgentError(self._ctx.name, words, code="agent_output")

    async def breathe(self) -> None:
        """Let others have their turn, now and then, while the agent makes one chunk after the other."""
        if self.run % BREATH == 0:
            await asyncio.sleep(0)


def _check_chunk(ctx: AgentContext, chunk: Chunk) -> None:
    """Raises: AgentError for a chunk that an agent has given another shape than OpenAI's."""
    data: Any = chunk.seen
    try:
        for choice in data.get("choices") or ():
            delta = choice.get("delta") or {}
            for key in ("content", "reasoning_content"):
                if delta.get(key) is not None and not isinstance(delta[key], str):
                    raise TypeError(key)
            if not isinstance(choice.get("index", 0), int):
                raise TypeError("index")
            for call in delta.get("tool_calls") or ():
                call.get("function")
    except (AttributeError, TypeError) as exc:
        raise AgentError(ctx.name, "gave a chunk of the answer a shape that no API has") from exc


async def _close(ctx: AgentContext, made: Any) -> None:
    """Have the agent's generator clean up. What goes wrong is logged: the answer is over."""
    aclose = getattr(made, "aclose", None)
    if aclose is None:
        return
    try:
        async with asyncio.timeout(CLOSE_S):
            await aclose()
    except asyncio.CancelledError:
        raise
    except BaseException as exc:  # the agent's own, whatever it is
        ctx.active.plugin.failures += 1
        logger.error("agent %s did not clean up properly", ctx.name, exc_info=exc)
