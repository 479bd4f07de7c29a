"""Work that goes on in the background, with pauses, until the knowledge base is closed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable


class Repeated:
    """`work`, in a task of its own that begins with the first `wake`. It is done again with each `wake`, and after the
    seconds that it returns (None: not before)."""

    def __init__(self, work: Callable[[], Awaitable[float | None]], name: str) -> None:
        self._work = work
        self._name = name
        self._woken = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def wake(self) -> None:
        """Do it now."""
        self._woken.set()
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run(), name=self._name)

    async def close(self) -> None:
        """End it."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        while True:
            self._woken.clear()
            pause_s = await self._work()
            try:
                async with asyncio.timeout(pause_s):
                    await self._woken.wait()
            except TimeoutError:
                continue
