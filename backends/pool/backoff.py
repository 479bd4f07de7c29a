"""When a model that failed may be tried again. Pure: the current time is an argument, in seconds."""

from __future__ import annotations

from collections import deque

FIRST_S = 1.0
LONGEST_S = 60.0
BUDGET = 3
WINDOW_S = 60.0


class Backoff:
    """The failures of one model. After each the next start has to wait 1, 2, 4 ... 60 s, and at most `BUDGET` starts
    that fail are spent in `WINDOW_S` seconds.
    """

    def __init__(self) -> None:
        self._streak = 0
        self._until = 0.0
        self._failures: deque[float] = deque(maxlen=BUDGET)

    def failed(self, now: float) -> None:
        """A start failed."""
        self._streak += 1
        self._count(now, self._streak)

    def crashed(self, now: float) -> None:
        """A server died before it had served anything.

        The first time is forgiven, so that a request that met the death of a server can be sent again at once.
        """
        self._streak += 1
        self._count(now, self._streak - 1)

    def worked(self) -> None:
        """A server did its work: earlier failures no longer count."""
        self._streak = 0
        self._until = 0.0
        self._failures.clear()

    def wait_s(self, now: float) -> float:
        """Seconds until the next start is allowed; 0 when it is."""
        return max(0.0, self._until - now)

    def _count(self, now: float, step: int) -> None:
        self._failures.append(now)
        delay_s = min(LONGEST_S, FIRST_S * 2.0 ** min(step - 1, 16)) if step > 0 else 0.0
        self._until = now + delay_s
        if len(self._failures) == BUDGET:
            self._until = max(self._until, self._failures[0] + WINDOW_S)
