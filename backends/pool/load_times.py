"""How long models take to load, learned from their last starts."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from llama_smart_proxy.backends.feed import Feed, Kind

KEPT = 5
"""How many starts of a model count."""
SHORT_S = 1.0
"""Starts that take less are remembered only until the proxy ends, as no one notices them."""
SAME_SIZE = 0.2
"""A file that is larger or smaller by more than this share is another model, though its name is the same."""
MOST = 500
"""Most models that are remembered; those that were loaded longest ago are left out."""
_KEY = "load_times"


class Memory(Protocol):
    """What outlives a restart (`proxy.store`). Neither method waits, or raises."""

    def recall(self, key: str, on_value: Callable[[Any], None]) -> None:
        """Call `on_value` in the event loop with the value of `key`, if there is one."""

    def remember(self, key: str, value: Any) -> None:
        """Set the value of `key`."""


class LoadTimes:
    """The durations of starts by model, in seconds, with the size of its file in bytes (0: unknown)."""

    def __init__(self, feed: Feed, memory: Memory | None = None) -> None:
        self._feed = feed
        self._memory = memory
        self._recalled = memory is None
        self._known: dict[str, tuple[int, Sequence[float]]] = {}

    def recall(self) -> None:
        """Begin to read what earlier runs have learned, once; called with the first start."""
        if not self._recalled and self._memory is not None:
            self._recalled = True
            self._memory.recall(_KEY, self._take)

    def typical_s(self, name: str, size: int = 0) -> float | None:
        """How long a start of the model takes; None if that is unknown."""
        known, durations = self._known.get(name, (0, ()))
        return statistics.median(durations) if durations and _is_same(known, size) else None

    def learn(self, name: str, seconds: float, size: int = 0) -> None:
        """A start has succeeded after so long."""
        known, durations = self._known.get(name, (0, ()))
        before = durations if _is_same(known, size) else ()
        self._known.pop(name, None)
        self._known[name] = size, (*before, round(seconds, 3))[-KEPT:]
        self._feed.publish(Kind.LOAD_TIME, name, {"seconds": self.typical_s(name)})
        if self._memory is not None and max(seconds, *durations, 0.0) >= SHORT_S:
            long = {name: known for name, known in self._known.items() if max(known[1]) >= SHORT_S}
            self._memory.remember(_KEY, dict(list(long.items())[-MOST:]))

    def _take(self, value: Any) -> None:
        """Those of this run come later than the remembered ones."""
        for name, (size, durations) in value.items():
            now_size, now = self._known.get(name, (size, ()))
            if _is_same(size, now_size):
                self._known[name] = now_size, (*durations, *now)[-KEPT:]
            self._feed.publish(Kind.LOAD_TIME, name, {"seconds": self.typical_s(name)})


def _is_same(before: int, now: int) -> bool:
    return not before or not now or abs(now - before) <= SAME_SIZE * before
