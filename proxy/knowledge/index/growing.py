"""An array that grows at its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T", bound=np.generic)


class Growing(Generic[T]):
    """One dimension of `kind`. `values` that were taken before stay as they are when more are added."""

    def __init__(self, kind: type[T]) -> None:
        self._array: NDArray[T] = np.zeros(0, kind)
        self._count = 0

    @property
    def values(self) -> NDArray[T]:
        """What was added; a view, not a copy."""
        return self._array[: self._count]

    @property
    def bytes(self) -> int:
        """What it takes in memory."""
        return self._array.nbytes

    def add(self, values: Sequence[Any] | NDArray[Any]) -> None:
        """Append values."""
        needed = self._count + len(values)
        if needed > len(self._array):
            grown = np.zeros(max(needed, len(self._array) * 5 // 4, 1024), self._array.dtype)
            grown[: self._count] = self.values
            self._array = grown
        self._array[self._count : needed] = values
        self._count = needed

    def keep(self, kept: NDArray[np.intp]) -> None:
        """Drop all but these positions."""
        self._array = self._array[kept]
        self._count = len(kept)
