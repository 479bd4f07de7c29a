"""One timer for the time limits of many objects."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Sweeper:
    """Calls `callback` every `interval_s` seconds as long as it returns True.

    A timer per request would add noticeably to the cost of relaying a small one. The disadvantage is that a limit is
    enforced up to `interval_s` late.
    """

    def __init__(self, interval_s: float, callback: Callable[[], bool]) -> None:
        self._interval_s = interval_s
        self._callback = callback
        self._timer: asyncio.TimerHandle | None = None

    def wake(self) -> None:
        """Start the timer if it is not running. Cheap."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._interval_s, self._sweep)

    def stop(self) -> None:
        """Stop the timer until the next `wake`."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _sweep(self) -> None:
        self._timer = None
        if self._callback():
            self.wake()
