"""An agent's object: who uses it, and its start and end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from llama_smart_proxy.agents.base import Agent
from llama_smart_proxy.proxy.middleware.functions import Function

logger = logging.getLogger(__name__)

START_S = 60.0
"""Time limit in seconds for an agent's `start`, and for its `close`."""


@dataclass(eq=False, slots=True)
class LoadedAgent:
    """One agent object, of one import of its module. `users` counts the requests that use it now, `holders` the
    configurations that it is part of: two while requests of an earlier one are answered."""

    agent: Agent
    functions: Mapping[str, Function] = field(default_factory=dict)
    users: int = 0
    holders: int = 0
    started: bool = False
    retired: bool = False
    closed: bool = False

    @property
    def rewrites(self) -> bool:
        """Whether it overrides a hook for answers."""
        cls = type(self.agent)
        changes = cls.on_chunk is not Agent.on_chunk or cls.on_response is not Agent.on_response
        return changes or bool(self.functions)

    @property
    def listens(self) -> bool:
        """Whether it overrides the hook after the answer."""
        return type(self.agent).on_reply is not Agent.on_reply

    async def start(self) -> BaseException | None:
        """Run its hook, once. Returns what that raised."""
        if self.started:
            return None
        self.started = True
        try:
            async with asyncio.timeout(START_S):
                await self.agent.start()
        except BaseException as exc:  # agent code may raise anything; the proxy continues
            _unless_cancelled(exc)
            return exc
        return None

    async def retire(self, name: str) -> None:
        """A configuration has let it go: it is closed after its last user, unless another one has it."""
        self.holders -= 1
        self.retired = self.holders <= 0
        if self.retired and not self.users:
            await self.close(name)

    async def release(self, name: str) -> None:
        """End a request's use of it."""
        self.users -= 1
        if self.retired and self.holders <= 0 and not self.users:
            await self.close(name)

    async def close(self, name: str) -> None:
        """Run its hook, once."""
        if self.closed:
            return
        self.closed = True
        try:
            async with asyncio.timeout(START_S):
                await self.agent.close()
        except BaseException as exc:  # as above
            _unless_cancelled(exc)
            logger.error("the agent %s did not close properly: %s", name, first_line(exc), exc_info=exc)


def _unless_cancelled(exc: BaseException) -> None:
    """Raises: `exc`, if it is the cancellation of the current task, and not raised by the agent itself."""
    task = asyncio.current_task()
    if isinstance(exc, asyncio.CancelledError) and task is not None and task.cancelling():
        raise exc


def first_line(exc: BaseException) -> str:
    """The exception's class and the first line of its text."""
    return f"{type(exc).__name__}: {exc}".partition("\n")[0].rstrip(": ")
