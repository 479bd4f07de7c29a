"""Vectors of one collection, and the search for those nearest to another by cosine.

A component is kept as a whole number of 1/32767: half the memory of a float, read faster, and exact to 1e-4 in the
cosine. Up to `EXACT` rows all cosines are computed; above, only those of the rows whose signs differ least from the
query's (one bit per component), which finds the same ones but for about one in a hundred.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BLOCK = 16_384
"""Rows that are allocated together; what one step works on stays in the processor's cache."""
EXACT = 50_000
"""Rows up to which all cosines are computed."""
RESCORED = 3000
"""Rows of which the cosine is computed in a larger collection."""
SAMPLE = 65_536
"""Rows, about, that the number of differing signs is chosen by which so many rows do not exceed."""
_ONE = 32767
_STEP = 512

Rows = NDArray[np.intp]
Scores = NDArray[np.float32]


class Snapshot(NamedTuple):
    """The rows at one time; those that are added later are in the same blocks, behind `size`."""

    size: int
    blocks: tuple[NDArray[np.int16], ...]
    signs: tuple[NDArray[np.uint64], ...]

    def nearest(self, query: NDArray[np.float32], limit: int, allowed: NDArray[np.bool_]) -> tuple[Rows, Scores]:
        """At most `limit` of the `allowed` rows (a mask of all), the nearest first, and their cosines."""
        usable = int(np.count_nonzero(allowed))
        if usable <= EXACT:
            rows = np.flatnonzero(allowed)
            scores = self._all_cosines(query) if usable == self.size else self.cosines(query, rows)
        else:
            rows = self._likely(query, allowed)
            scores = self.cosines(query, rows)
        best = top(scores, limit)
        return rows[best], scores[best]

    def cosines(self, query: NDArray[np.float32], rows: Rows) -> Scores:
        """The cosines of some rows, given in ascending order."""
        found = np.empty(len(rows), np.float32)
        scaled = query / np.float32(_ONE)
        edges = np.searchsorted(rows, np.arange(len(self.blocks) + 1) * BLOCK)
        for number, block in enumerate(self.blocks):
            for at in range(edges[number], edges[number + 1], _STEP):
                end = min(at + _STEP, edges[number + 1])
                found[at:end] = block[rows[at:end] - number * BLOCK].astype(np.float32) @ scaled
        return found

    def _all_cosines(self, query: NDArray[np.float32]) -> Scores:
        found = np.empty(self.size, np.float32)
        scaled = query / np.float32(_ONE)
        floats = np.empty((_STEP, len(query)), np.float32)
        for at in range(0, self.size, _STEP):  # BLOCK is a multiple of _STEP
            end = min(at + _STEP, self.size)
            step = floats[: end - at]
            np.copyto(step, self.blocks[at // BLOCK][at % BLOCK : at % BLOCK + end - at])
            np.dot(step, scaled, out=found[at:end])
        return found

    def _likely(self, query: NDArray[np.float32], allowed: NDArray[np.bool_]) -> Rows:
        """The rows with the fewest different signs, about `RESCORED`, in ascending order."""
        asked = _signs(query[None, :])
        differing = np.empty(self.size, np.uint16)
        for number, signs in enumerate(self.signs):
            part = differing[number * BLOCK : (number + 1) * BLOCK]
            np.bitwise_count(signs[:, : len(part)] ^ asked).sum(axis=0, dtype=np.uint16, out=part)
        if not allowed.all():
            differing[~allowed] = 0xFFFF
        step = 1 + self.size // SAMPLE
        upto = np.bincount(differing[::step], minlength=1).cumsum()
        return np.flatnonzero(differing <= np.searchsorted(upto, RESCORED / step))


class Matrix:
    """The vectors, each of `dimensions` floats and of length 1. Only `add` changes it, by one thread at a time;
    snapshots may be used by others meanwhile."""

    def __init__(self, dimensions: int) -> None:
        self.dimensions = dimensions
        self.count = 0
        self._blocks: list[NDArray[np.int16]] = []
        self._signs: list[NDArray[np.uint64]] = []

    @property
    def bytes(self) -> int:
        """What it takes in memory."""
        return sum(block.nbytes for block in self._blocks) + sum(signs.nbytes for signs in self._signs)

    def add(self, vectors: NDArray[np.float32]) -> None:
        """Append rows."""
        while len(vectors):
            at = self.count % BLOCK
            if at == 0:
                self._blocks.append(np.empty((BLOCK, self.dimensions), np.int16))
                self._signs.append(np.empty(((self.dimensions + 63) // 64, BLOCK), np.uint64))
            part, vectors = vectors[: BLOCK - at], vectors[BLOCK - at :]
            self._blocks[-1][at : at + len(part)] = np.rint(part * _ONE)
            self._signs[-1][:, at : at + len(part)] = _signs(part)
            self.count += len(part)

    def snapshot(self) -> Snapshot:
        """The rows that there are now."""
        return Snapshot(self.count, tuple(self._blocks), tuple(self._signs))

    def rows(self, kept: Rows) -> Matrix:
        """A copy with only the rows `kept`, in their order."""
        copy = Matrix(self.dimensions)
        for at in range(0, len(kept), BLOCK):
            some = kept[at : at + BLOCK]
            block = np.empty((BLOCK, self.dimensions), np.int16)
            signs = np.empty(((self.dimensions + 63) // 64, BLOCK), np.uint64)
            for number in np.unique(some // BLOCK):
                here = some // BLOCK == number
                block[: len(some)][here] = self._blocks[number][some[here] % BLOCK]
                signs[:, : len(some)][:, here] = self._signs[number][:, some[here] % BLOCK]
            copy._blocks.append(block)
            copy._signs.append(signs)
        copy.count = len(kept)
        return copy


def top(scores: NDArray[np.floating], limit: int) -> Rows:
    """Positions of the `limit` highest scores, the highest first."""
    if limit < len(scores):
        best = np.argpartition(scores, len(scores) - limit)[len(scores) - limit :]
    else:
        best = np.arange(len(scores))
    return best[np.argsort(-scores[best], kind="stable")]


def _signs(vectors: NDArray[np.float32]) -> NDArray[np.uint64]:
    """One bit per component, in words of 64: shape (words, rows)."""
    missing = -vectors.shape[1] % 64
    bits = np.pad(vectors > 0, ((0, 0), (0, missing)))
    return np.ascontiguousarray(np.packbits(bits, axis=1).view(np.uint64).T)
