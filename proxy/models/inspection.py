"""Finds what keeps the proxy from serving what is configured: for `check`, the log at start and `/health`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence

from llama_smart_proxy.backends.base import Problem

logger = logging.getLogger(__name__)

LIMIT_S = 0.7
"""Longest wait in seconds for one look; a disk or a server may not answer, and `/health` has to within a second."""

Look = Callable[[], Awaitable[Sequence[Problem]]]


class Inspection:
    """The problems that each of the `looks` finds; these are named by the section of the configuration.

    A look that has not ended within `limit_s` is not repeated before it ends, and delays no later caller. Until then
    its problems are those that it found last, and one more that it does not end.
    """

    def __init__(self, looks: Mapping[str, Look], *, limit_s: float = LIMIT_S) -> None:
        self.limit_s = limit_s
        self._looks = looks
        self._found: dict[str, Sequence[Problem]] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._overdue: set[str] = set()

    async def problems(self, *, harmless: bool = False) -> list[Problem]:
        """All of them now, in the order of the looks, those that prevent the start first; with `harmless`, also those
        that keep no model from being served."""
        awaited = {name: self._running_look(name) for name in self._looks if name not in self._overdue}
        if awaited:
            await asyncio.wait(awaited.values(), timeout=self.limit_s)
        self._overdue |= {name for name, task in awaited.items() if not task.done()}
        found = [problem for name in self._looks for problem in self._found.get(name, ())]
        late = f"cannot be checked: no answer within {self.limit_s:g} s"
        found += [Problem(name, late) for name in self._looks if name in self._overdue]
        return sorted(
            (problem for problem in found if harmless or not problem.harmless), key=lambda problem: not problem.fatal
        )

    async def close(self) -> None:
        """Cancel what is running; a thread that waits for a disk is left to itself."""
        running = list(self._running.values())
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)

    def _running_look(self, name: str) -> asyncio.Task[None]:
        if name not in self._running:
            self._running[name] = asyncio.get_running_loop().create_task(self._look(name), name=f"inspection of {name}")
        return self._running[name]

    async def _look(self, name: str) -> None:
        try:
            self._found[name] = await self._looks[name]()
        except Exception as exc:  # of a backend that a module adds, or of the system: no more threads
            logger.debug("inspection of %s", name, exc_info=exc)
            self._found[name] = [Problem(name, f"cannot be checked: {exc}")]
        finally:
            del self._running[name]
            self._overdue.discard(name)
