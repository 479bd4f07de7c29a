"""Values that are kept for some time, within a limit of memory."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

V = TypeVar("V")


class TimedCache(Generic[V]):
    """Values by key, for `ttl_s` seconds, of at most `max_bytes` altogether; what was used longest ago goes first.

    A value that alone is larger is not kept. `clock` returns seconds.
    """

    def __init__(self, ttl_s: float, max_bytes: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.ttl_s = ttl_s
        self.max_bytes = max_bytes
        self.bytes = 0
        """Of all values that are kept."""
        self._clock = clock
        self._kept: OrderedDict[Hashable, tuple[float, int, V]] = OrderedDict()

    def get(self, key: Hashable) -> V | None:
        """The value, if there is one that is not too old."""
        found = self._kept.get(key)
        if found is None:
            return None
        if self._clock() >= found[0]:
            self.drop(key)
            return None
        self._kept.move_to_end(key)
        return found[2]

    def put(self, key: Hashable, value: V, size: int, *, ttl_s: float | None = None) -> None:
        """Keep `value`, which takes `size` bytes of memory, for `ttl_s`, by default that of the cache."""
        self.drop(key)
        kept_s = self.ttl_s if ttl_s is None else ttl_s
        if size > self.max_bytes or kept_s <= 0:
            return
        self._kept[key] = (self._clock() + kept_s, size, value)
        self.bytes += size
        while self.bytes > self.max_bytes:
            self.drop(next(iter(self._kept)))

    def drop(self, key: Hashable) -> None:
        """Remove the value, if there is one."""
        found = self._kept.pop(key, None)
        if found is not None:
            self.bytes -= found[1]

    def __len__(self) -> int:
        return len(self._kept)
