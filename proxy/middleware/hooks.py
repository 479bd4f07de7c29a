"""Runs the hooks of agents around one request, each within its limits.

An answer passes through one layer per agent. A layer attributes failures of the agent's own code to the agent, and
passes failures of the layer below unchanged. It closes what the agent leaves open, so that an agent that stops early
frees the model at once.
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
"""Seconds that an agent has for cleaning up when an answer is cancelled."""
YIELD_EVERY = 256
"""Chunks that an agent may produce in a row without awaiting, before the layer yields to the event loop."""


async def run_request_hooks(
    contexts: Sequence[AgentContext], request: ChatRequest
) -> tuple[list[AgentContext], AgentContext | None, ChunkStream | None]:
    """Run `on_request` of the agents, first to last, until one returns an answer.

    Returns the agents that passed the request on, and the agent that answered with its answer, or None and None.
    Raises: AgentError, and any `ProxyError` that an agent raises itself.
    """
    entered: list[AgentContext] = []
    left_out: set[str] = set()
    for ctx in contexts:
        if ctx.name in left_out and not ctx.active.explicit:
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
    agent = ctx.active.loaded.agent
    if type(agent).on_request is Agent.on_request:
        return None
    before = request.copy() if ctx.active.settings.on_error == "skip" else None
    try:
        ctx.timer.begin()
        try:
            answer = await agent.on_request(request, ctx)
        finally:
            ctx.timer.end()
        if ctx.timer.was_cancelled():
            raise ctx.timer.hung()
        _check_request(ctx, request)
        if answer is not None and not hasattr(answer, "__anext__"):
            raise AgentError(ctx.name, f"returned a {type(answer).__name__} from on_request, which is not a stream")
        return answer
    except BaseException as exc:
        failure = failure_of(ctx, exc)
        if before is None:
            raise failure from exc
        request.body, request.stream = before.body, before.stream
        return None


def failure_of(ctx: AgentContext, exc: BaseException) -> ProxyError:
    """The error to report for an exception in an agent, which is counted and logged. Raises: `exc` itself if it is the
    cancellation of the request, and not a failure."""
    hung = ctx.timer.was_cancelled()
    if isinstance(exc, asyncio.CancelledError):
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise exc
    elif isinstance(exc, GeneratorExit):
        raise exc
    if hung:  # replaces any exception that the cancellation caused in the agent
        exc = ctx.timer.hung()
    ctx.failed = True
    ctx.active.plugin.failures += not isinstance(exc, BadRequest)  # the client's fault
    if isinstance(exc, ProxyError):
        logger.warning("agent %s: %s", ctx.name, exc.message)
        return exc
    logger.error("agent %s failed", ctx.name, exc_info=exc)
    return AgentError(ctx.name, f"failed: {type(exc).__name__}")


def _check_request(ctx: AgentContext, request: ChatRequest) -> None:
    body = request.body
    messages = body.get("messages", []) if isinstance(body, dict) else None
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise AgentError(ctx.name, "changed the messages to something other than a list of objects")
    if not isinstance(body.get("model"), str) or ("messages" not in body and "prompt" not in body):
        raise AgentError(ctx.name, "left a request without model, or without messages or prompt")
    if not messages and "messages" in body:
        raise AgentError(ctx.name, "left a request without messages")


# -- answers -----------------------------------------------------------------------------------------------------------


def response_layer(ctx: AgentContext, below: AsyncIterator[Chunk]) -> AsyncGenerator[Chunk, None]:
    """The answer `below`, transformed by the agent of `ctx`."""
    cls = type(ctx.active.loaded.agent)
    return _mapped(ctx, below) if cls.on_response is Agent.on_response else _transformed(ctx, below)


async def _mapped(ctx: AgentContext, below: AsyncIterator[Chunk]) -> AsyncGenerator[Chunk, None]:
    """The layer of an agent with `on_chunk` only. With `on_error: skip`, a chunk that it fails on passes unchanged."""
    on_chunk, timer = ctx.active.loaded.agent.on_chunk, ctx.timer
    limit = _OutputLimit(ctx)
    timer.below = below
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


async def _transformed(ctx: AgentContext, below: AsyncIterator[Chunk]) -> AsyncGenerator[Chunk, None]:
    """The layer of an agent with `on_response`. With `on_error: skip`, a failure passes the chunks that it has received
    since its last output, and then the rest, unchanged."""
    timer, limit, skips = ctx.timer, _OutputLimit(ctx), ctx.active.settings.on_error == "skip"
    source = _InputStream(ctx, below, limit, keeps=skips)
    timer.below = below
    output: Any = None
    chunk: Any
    try:
        try:
            output = ctx.active.loaded.agent.on_response(source, ctx)
            while True:  # as in `reply_layer`; a shared generator would add a fifth to the cost of each token
                timer.begin()
                try:
                    chunk = await output.__anext__()
                except StopAsyncIteration:
                    return
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
            if exc is source.failure:
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


async def reply_layer(ctx: AgentContext, answer: Any) -> AsyncGenerator[Chunk, None]:
    """The answer of an agent in place of a model. Its failure ends the request: there is no answer below to use."""
    timer, limit = ctx.timer, _OutputLimit(ctx)
    chunk: Any
    try:
        while True:
            timer.begin()
            try:
                chunk = await answer.__anext__()
            except StopAsyncIteration:
                return
            finally:
                timer.end()
                if timer.cancels:
                    _raise_if_timed_out(ctx)
            limit.check(chunk)
            yield chunk
            if limit.since_input >= YIELD_EVERY:
                await limit.yield_control()
    except BaseException as exc:
        raise failure_of(ctx, exc) from exc
    finally:
        await _close(ctx, answer)


def _raise_if_timed_out(ctx: AgentContext) -> None:
    """After a hook that was cancelled for its time limit. Raises: AgentError, in place of any result or exception; a
    CancelledError is left to `failure_of`."""
    if not isinstance(sys.exc_info()[1], asyncio.CancelledError):
        ctx.timer.was_cancelled()
        raise ctx.timer.hung()


class _InputStream:
    """The input of `on_response`. The agent's timer is stopped while it waits for the next chunk."""

    __slots__ = (
        "_below",
        "_ctx",
        "_driver",
        "_keeps",
        "_limit",
        "_reader",
        "_retired",
        "_timer",
        "failure",
        "unpassed",
    )

    def __init__(self, ctx: AgentContext, below: AsyncIterator[Chunk], limit: _OutputLimit, *, keeps: bool) -> None:
        self._ctx = ctx
        self._driver = _current_task()
        self._reader: asyncio.Task[Any] | None = None
        self._retired: asyncio.Event | None = None
        self._below = below
        self._limit = limit
        self._timer = ctx.timer
        self._keeps = keeps
        self.unpassed: list[Chunk] = []
        self.failure: BaseException | None = None

    def __aiter__(self) -> _InputStream:
        return self

    async def __anext__(self) -> Chunk:
        if _current_task() is not self._driver:
            return await self._next_for_task()
        self._timer.end()
        try:
            chunk = await self._below.__anext__()
        except StopAsyncIteration:
            self._check_complete()
            raise
        except BaseException as exc:
            self.failure = exc
            raise
        finally:
            self._timer.begin()
        self._limit.received(chunk)
        if self._keeps:
            self.unpassed.append(chunk)
        return chunk

    async def _next_for_task(self) -> Chunk:
        """The next chunk, for a task that the agent has started; the hook itself may run meanwhile."""
        if self._retired is not None:
            raise StopAsyncIteration
        self._reader = _current_task()
        try:
            with self._timer.awaiting_model():
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
        self._limit.received(chunk)
        if self._keeps:
            self.unpassed.append(chunk)
        return chunk

    def passed_on(self, chunk: Chunk) -> None:
        """Forget the input up to this chunk, or all input if the agent created the chunk."""
        for position, received in enumerate(self.unpassed):
            if received is chunk:
                del self.unpassed[: position + 1]
                return
        self.unpassed.clear()

    def _check_complete(self) -> None:
        """Raises: the answer's own failure, if it is read again after it; AgentError if the agent cancelled an earlier
        read. Otherwise a truncated answer would appear complete."""
        if isinstance(self.failure, ProxyError):
            raise self.failure
        if self.failure is not None:
            raise AgentError(self._ctx.name, "cancelled a read of the answer and read again")

    async def aclose(self) -> None:
        """No effect: the layer closes what is below."""

    async def retire(self) -> None:
        """End the agent's input. A pending read of one of its tasks is awaited; its chunk is in `unpassed` then."""
        self._retired = asyncio.Event()
        if self._reader is not None:
            await self._retired.wait()
        self._check_complete()

    async def release(self) -> None:
        """Cancel a pending read, and close what is below."""
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.wait({self._reader}, timeout=CLOSE_S)
        if isinstance(self._below, AsyncGenerator):
            await self._below.aclose()


class _OutputLimit:
    """Bounds the bytes that an agent adds to an answer, and the chunks it produces without awaiting: a faulty agent
    must not fill the memory or block the event loop."""

    __slots__ = ("_ctx", "_surplus", "since_input")

    def __init__(self, ctx: AgentContext) -> None:
        self._ctx = ctx
        self._surplus = 0
        self.since_input = 0
        """Chunks produced since the last one received."""

    def received(self, chunk: Chunk) -> None:
        frame = chunk.frame
        self._surplus -= len(frame) if frame is not None else chunk.size
        self.since_input = 0

    def check(self, chunk: Any) -> None:
        """Count an output chunk. Raises: AgentError if it is not a Chunk, or over the limit."""
        if chunk.__class__ is not Chunk:
            raise AgentError(self._ctx.name, f"answered with a {type(chunk).__name__}, which is not a Chunk")
        frame = chunk.frame
        if frame is None:
            _check_chunk(self._ctx, chunk)
        self.since_input += 1
        self._surplus += len(frame) if frame is not None else chunk.size
        if self._surplus > self._ctx.output_limit:
            message = f"added over {self._ctx.output_limit // 1024} KiB to an answer"
            raise AgentError(self._ctx.name, message, code="agent_output")

    async def yield_control(self) -> None:
        """Yield to the event loop every `YIELD_EVERY` chunks."""
        if self.since_input % YIELD_EVERY == 0:
            await asyncio.sleep(0)


def _check_chunk(ctx: AgentContext, chunk: Chunk) -> None:
    """Raises: AgentError for a chunk that does not have the shape of OpenAI's."""
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


async def _close(ctx: AgentContext, output: Any) -> None:
    """Close the agent's generator. Failures are only logged: the answer is over."""
    aclose = getattr(output, "aclose", None)
    if aclose is None:
        return
    try:
        async with asyncio.timeout(CLOSE_S):
            await aclose()
    except asyncio.CancelledError:
        raise
    except BaseException as exc:  # agent code may raise anything
        ctx.active.plugin.failures += 1
        logger.error("agent %s did not clean up properly", ctx.name, exc_info=exc)
