"""What goes into an agent's hook for answers, and what comes out of it: the input stream, and the limits of output."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from typing import Any

from llama_smart_proxy.backends.http.turns import breathe
from llama_smart_proxy.proxy.chat import Chunk
from llama_smart_proxy.proxy.errors import AgentError, ProxyError
from llama_smart_proxy.proxy.middleware.context import AgentContext

_current_task = asyncio.current_task

CLOSE_S = 0.2
"""Seconds that an agent has for cleaning up when an answer is cancelled."""
YIELD_EVERY = 32
"""Chunks that an agent may produce in a row without awaiting, before the layer yields to the event loop if it must."""


class InputStream:
    """The input of `on_response`. The agent's timer is stopped while it waits for the next chunk."""

    __slots__ = (
        "_below",
        "_ctx",
        "_driver",
        "_keeps",
        "_limit",
        "_read",
        "_retired",
        "_timer",
        "failure",
        "unpassed",
    )

    def __init__(self, ctx: AgentContext, below: AsyncIterator[Chunk], limit: OutputLimit, *, keeps: bool) -> None:
        self._ctx = ctx
        self._driver = _current_task()
        self._read: asyncio.Task[Chunk | None] | None = None  # for the agent's tasks
        self._retired = False
        self._below = below
        self._limit = limit
        self._timer = ctx.timer
        self._keeps = keeps
        self.unpassed: list[Chunk] = []
        self.failure: BaseException | None = None

    def __aiter__(self) -> InputStream:
        return self

    async def __anext__(self) -> Chunk:
        if self._read is not None or _current_task() is not self._driver:
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
        """The next chunk, for a task that the agent has started, such as by `asyncio.wait_for`; the hook itself may run
        meanwhile. If that task is cancelled, the next read goes on with what it has begun."""
        if self._retired:
            raise StopAsyncIteration
        if self._read is None:
            self._read = asyncio.ensure_future(self._read_one())
        read = self._read
        with self._timer.awaiting_model():
            await asyncio.wait({read})
        if self._read is read:
            self._read = None
        elif self._retired:
            raise StopAsyncIteration
        return self._taken(read.result())

    async def _read_one(self) -> Chunk | None:
        """The next chunk; None if there is none: `failure` has the reason, unless the answer has ended."""
        self._timer.disown()
        try:
            return await self._below.__anext__()
        except StopAsyncIteration:
            return None
        except BaseException as exc:
            self.failure = exc
            if isinstance(exc, asyncio.CancelledError):
                raise
            return None

    def _taken(self, chunk: Chunk | None) -> Chunk:
        if chunk is not None:
            self._received(chunk)
            return chunk
        if self.failure is not None:
            raise self.failure
        raise StopAsyncIteration

    def _received(self, chunk: Chunk) -> None:
        self._limit.received(chunk)
        if self._keeps:
            self.unpassed.append(chunk)

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
        self._retired = True
        read, self._read = self._read, None
        if read is not None:
            with suppress(StopAsyncIteration):
                self._taken(await read)
        self._check_complete()

    async def release(self) -> None:
        """Cancel a pending read, and close what is below."""
        self._retired = True
        read, self._read = self._read, None
        if read is not None:
            read.cancel()
            await asyncio.wait({read}, timeout=CLOSE_S)
        if isinstance(self._below, AsyncGenerator):
            await self._below.aclose()


class OutputLimit:
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
            await breathe()


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
