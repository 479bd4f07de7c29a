"""Time limits for many things at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Sweeper:
    """Calls `look` every `interval_s` seconds for as long as it returns True.

    One timer for all requests: setting and cancelling one for each would be a noticeable part of what relaying a small
    request costs. The price is that a limit is met up to `interval_s` late.
    """

    def __init__(self, interval_s: float, look: Callable[[], bool]) -> None:
        self._interval_s = interval_s
        self._look = look
        self._timer: asyncio.TimerHandle | None = None

    def wake(self) -> None:
        """There is something to look at; cheap when it was known."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._interval_s, self._sweep)

    def stop(self) -> None:
        """Look no more, until the next `wake`."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _sweep(self) -> None:
        self._timer = None
        if self._look():
            self.wake()
