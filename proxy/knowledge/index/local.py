"""The index in this process: a matrix for the vectors and postings for the texts, for each collection."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llama_smart_proxy.proxy.knowledge.base import Hit, Row
from llama_smart_proxy.proxy.knowledge.index import matrix, postings
from llama_smart_proxy.proxy.knowledge.index.fusion import hits
from llama_smart_proxy.proxy.knowledge.index.growing import Growing

if TYPE_CHECKING:
    from llama_smart_proxy.proxy.knowledge.base import Vector

DEPTH = 100
"""How many pieces of each of the two searches are compared, at least."""
SLICE = 512
"""Pieces that are added in one step: a search may be answered, and the event loop runs, between two."""
DEAD = 0.25
"""The share of removed pieces above which their memory is released."""


class LocalIndex:
    """An `Index` in memory. It is empty after a restart."""

    def __init__(self) -> None:
        self._collections: dict[str, _Collection] = {}

    async def open(self, collection: str, dimensions: int, stamp: str) -> bool:
        """As `Index.open`."""
        known = self._collections.get(collection)
        if known is not None and known.dimensions == dimensions and known.stamp == stamp:
            return True
        self._collections[collection] = _Collection(dimensions)
        return False

    async def add(self, collection: str, rows: Sequence[Row]) -> None:
        """As `Index.add`."""
        known = self._collections.get(collection)
        if known is not None and rows:
            await asyncio.to_thread(known.add, list(rows))

    async def remove(self, collection: str, pieces: Sequence[int]) -> None:
        """As `Index.remove`."""
        known = self._collections.get(collection)
        if known is not None and pieces:
            await asyncio.to_thread(known.remove, list(pieces))

    async def settle(self, collection: str, stamp: str) -> None:
        """As `Index.settle`."""
        known = self._collections.get(collection)
        if known is not None:
            await asyncio.to_thread(known.compact)
            known.stamp = stamp

    async def drop(self, collection: str) -> None:
        """As `Index.drop`."""
        self._collections.pop(collection, None)

    async def search(
        self, collection: str, query: str, vector: Vector, limit: int, files: frozenset[str] | None = None
    ) -> list[Hit]:
        """As `Index.search`."""
        known = self._collections.get(collection)
        if known is None:
            return []
        return await asyncio.to_thread(known.search, query, vector, limit, files)

    @property
    def bytes(self) -> int:
        """What the pieces take in memory."""
        return sum(known.bytes for known in self._collections.values())

    def state(self, collection: str) -> State:
        """What a search of a collection would use now."""
        return self._collections[collection].state

    async def close(self) -> None:
        """As `Index.close`."""
        self._collections.clear()


class State(NamedTuple):
    """A collection at one time, for a search: row by row its vector, its text, its piece, its file's number, and
    whether it is there still."""

    matrix: matrix.Snapshot
    postings: postings.Snapshot
    pieces: NDArray[np.int64]
    files: NDArray[np.int32]
    alive: NDArray[np.bool_]


class _Collection:
    """The pieces of one collection. Its methods are called in threads; those that change it wait for each other, and
    `search` waits for none: it uses the state that the last change has published."""

    def __init__(self, dimensions: int) -> None:
        self.dimensions = dimensions
        self.stamp: str | None = None
        self._writing = threading.Lock()
        self._files: dict[str, int] = {}
        self._matrix = matrix.Matrix(dimensions)
        self._postings = postings.Postings()
        self._pieces = Growing(np.int64)
        self._file_of = Growing(np.int32)
        self._alive = Growing(np.bool_)
        self.state = self._published()

    @property
    def bytes(self) -> int:
        """What it takes in memory, but for the names of files."""
        parts = (self._matrix, self._postings, self._pieces, self._file_of, self._alive)
        return sum(part.bytes for part in parts)

    def add(self, rows: Sequence[Row]) -> None:
        last = list({row.piece: row for row in rows}.values())
        with self._writing:
            self.stamp = None
            for at in range(0, len(last), SLICE):
                some = last[at : at + SLICE]
                self._postings.add([row.text for row in some])
                self._matrix.add(np.stack([row.vector for row in some]))
                self._bury([row.piece for row in some])
                self._pieces.add([row.piece for row in some])
                self._file_of.add([self._files.setdefault(row.file, len(self._files)) for row in some])
                self._alive.add([True] * len(some))
                self.state = self._published()

    def remove(self, pieces: Sequence[int]) -> None:
        with self._writing:
            self.stamp = None
            self._bury(pieces)

    def compact(self) -> None:
        """Release the memory of removed pieces, if they are many."""
        with self._writing:
            alive = self._alive.values
            kept = np.flatnonzero(alive)
            if len(alive) - len(kept) <= DEAD * len(alive):
                return
            self._matrix, self._postings = self._matrix.rows(kept), self._postings.rows(kept)
            for part in (self._pieces, self._file_of, self._alive):
                part.keep(kept)
            self.state = self._published()

    def search(self, query: str, vector: Vector, limit: int, files: frozenset[str] | None) -> list[Hit]:
        state = self.state
        allowed = state.alive.copy()
        if files is not None:
            allowed &= np.isin(state.files, [self._files[file] for file in files if file in self._files])
        depth = max(DEPTH, 2 * limit)
        nearest, _ = state.matrix.nearest(vector, depth, allowed)
        entries = state.postings.entries(query)
        rows = np.union1d(nearest, state.postings.best(entries, depth, allowed))
        dense, lexical = state.matrix.cosines(vector, rows), state.postings.scores(entries, rows)
        found = zip(state.pieces[rows].tolist(), dense.tolist(), lexical.tolist(), strict=True)
        return hits(list(found), limit)

    def _published(self) -> State:
        return State(
            self._matrix.snapshot(),
            self._postings.snapshot(),
            self._pieces.values,
            self._file_of.values,
            self._alive.values,
        )

    def _bury(self, pieces: Sequence[int]) -> None:
        """Mark pieces as removed."""
        known = self._pieces.values
        if len(known) and pieces and min(pieces) <= known.max():  # those of the catalogue only grow
            self._alive.values[np.isin(known, pieces)] = False
