"""The hook `on_reply`: called with the whole answer when the client has it, or has left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence

from llama_smart_proxy.proxy.chat import Chunk, Fold, Json, Reply
from llama_smart_proxy.proxy.http.aside import in_thread
from llama_smart_proxy.proxy.middleware.context import AgentContext, agents_worker
from llama_smart_proxy.proxy.middleware.hooks import failure_of
from llama_smart_proxy.proxy.middleware.scope import Scope
from llama_smart_proxy.proxy.middleware.side_calls import SideCalls

CLOSE_S = 5.0
"""Time limit in seconds for the hooks that run when the proxy is stopped."""


class Heard:
    """The chunks of an answer, kept on their way to the client. `ended`: it is complete."""

    def __init__(self) -> None:
        self.chunks: list[Json] = []
        self.ended = False

    async def passing(self, stream: AsyncIterator[Chunk]) -> AsyncGenerator[Chunk, None]:
        """`stream`, unchanged."""
        keep = self.chunks.append
        async for chunk in stream:
            keep(chunk.seen)
            yield chunk
        self.ended = True

    def reply(self) -> Reply:
        """The answer as far as the client got it."""
        whole = Fold()
        for chunk in self.chunks:
            whole.add(chunk)
        return Reply(whole.completion(ended=self.ended), complete=self.ended)


class Afterwards:
    """The hooks that run after their requests, each in a scope and with a budget of its own."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(
        self,
        contexts: Sequence[AgentContext],
        heard: Heard,
        usage: Callable[[], Awaitable[Json | None]],
        calls: Callable[[Scope], SideCalls],
    ) -> None:
        """Run the hooks of `contexts`. `usage` returns the token counts, `calls` makes the side calls of a scope."""
        for ctx in contexts:
            ctx.active.loaded.users += 1
            task = asyncio.get_running_loop().create_task(self._run(ctx, heard, usage, calls))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def ended(self) -> None:
        """Return once none of them runs."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def close(self) -> None:
        """Wait for the hooks for a limited time, then cancel them."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_S)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(
        self,
        ctx: AgentContext,
        heard: Heard,
        usage: Callable[[], Awaitable[Json | None]],
        calls: Callable[[Scope], SideCalls],
    ) -> None:
        try:
            reply = await in_thread(Heard.reply, heard, urgent=False, worker=agents_worker)
            if reply.usage is None and (counts := await usage()) is not None:
                reply.data["usage"] = counts
            scope = Scope()
            await scope.run(_hear(ctx.afterwards(scope, calls(scope)), reply))
        except Exception as exc:  # logged with the agent's name; the client has its answer
            failure_of(ctx, exc)
        finally:
            await ctx.active.loaded.release(ctx.active.plugin.name)


async def _hear(ctx: AgentContext, reply: Reply) -> None:
    ctx.timer.begin()
    try:
        await ctx.active.loaded.agent.on_reply(reply, ctx)
    except BaseException as exc:
        failure_of(ctx, exc)
    finally:
        ctx.timer.end()
        ctx.active.plugin.counts.spent_s += ctx.timer.spent_s
