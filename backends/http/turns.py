"""Turns at work that there is much of, such as a burst of frames: between any two, the event loop serves all others.

How much one stream does in a row is no measure: a hundred of them would each do that in the same iteration of the loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque

TURN_S = 0.005
"""Seconds of such work in one iteration of the loop."""


class Turns:
    """Whose turn it is, first come, first served: one in each iteration of the loop that has more to do than its time
    allows."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._holder: asyncio.Task[object] | None = None
        self._counting = False  # the time of this iteration
        self._until = 0.0

    def over(self) -> bool:
        """Whether such work has had its time in this iteration."""
        now = time.monotonic()
        if not self._counting:
            self._counting, self._until = True, now + TURN_S
            self.loop.call_soon(self._next)
        return now >= self._until

    async def breathe(self) -> None:
        """Wait for a turn."""
        task = asyncio.current_task()
        if (not self._waiting or self._holder is task) and not self.over():
            return
        turn: asyncio.Future[None] = self.loop.create_future()
        self._waiting.append(turn)
        await turn
        self._holder, self._until = task, time.monotonic() + TURN_S

    def _next(self) -> None:
        """Called first in the next iteration."""
        self._holder, self._counting = None, False
        while self._waiting and not self._counting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                self._counting = True
        if self._counting:
            self.loop.call_soon(self._next)


_turns: Turns | None = None


def turns() -> Turns:
    """Those of the running loop."""
    global _turns
    loop = asyncio.get_running_loop()
    if _turns is None or _turns.loop is not loop:
        _turns = Turns(loop)
    return _turns


async def breathe() -> None:
    """Let others go on, if it is time to: for a task between the parts of much work."""
    await turns().breathe()
