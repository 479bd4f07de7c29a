"""Text search by BM25: for each term the rows that contain it, and how often.

Rows are added in segments, which are merged as they become many. Rows that were removed stay until `rows`; the caller
masks them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llama_smart_proxy.proxy.knowledge.index.growing import Growing
from llama_smart_proxy.proxy.knowledge.index.words import terms

K1, B = 1.2, 0.75
"""BM25's usual values: how soon more of the same word counts no more, and how much a long text is worth less."""
MERGED = 4
"""A segment that is at most so many times as large as all behind it is merged with them."""


class Segment(NamedTuple):
    """Rows by term. `words` ascend; the rows of `words[i]` are `rows[starts[i]:starts[i + 1]]`, ascending."""

    words: NDArray[np.uint32]
    starts: NDArray[np.int64]
    rows: NDArray[np.uint32]
    counts: NDArray[np.uint8]

    def of(self, word: int) -> slice:
        """Where the rows of a term are."""
        at = int(np.searchsorted(self.words, word))
        if at == len(self.words) or self.words[at] != word:
            return slice(0, 0)
        return slice(int(self.starts[at]), int(self.starts[at + 1]))


class Snapshot(NamedTuple):
    """The rows at one time."""

    segments: tuple[Segment, ...]
    lengths: NDArray[np.uint16]
    mean_length: float

    def scores(self, query: str) -> NDArray[np.float32]:
        """The BM25 score of each row."""
        rows, weights = [], []
        total = len(self.lengths)
        for word, times in Counter(terms(query)).items():
            places = [(segment, segment.of(word)) for segment in self.segments]
            found = sum(place.stop - place.start for _, place in places)
            rarity = times * np.log1p((total - found + 0.5) / (found + 0.5))
            for segment, place in places:
                counts = segment.counts[place].astype(np.float32)
                here = segment.rows[place]
                norm = K1 * (1 - B + B / self.mean_length * self.lengths[here].astype(np.float32))
                rows.append(here)
                weights.append(np.float32(rarity * (K1 + 1)) * counts / (counts + norm))
        if not rows:
            return np.zeros(total, np.float32)
        return np.bincount(np.concatenate(rows), np.concatenate(weights), minlength=total).astype(np.float32)


class Postings:
    """The texts. Only `add` changes it, by one thread at a time; snapshots may be used by others meanwhile."""

    def __init__(self) -> None:
        self._segments: list[Segment] = []
        self._lengths = Growing(np.uint16)
        self._total = 0

    @property
    def bytes(self) -> int:
        """What it takes in memory."""
        return self._lengths.bytes + sum(array.nbytes for segment in self._segments for array in segment)

    def add(self, texts: Sequence[str]) -> None:
        """Append rows."""
        found = [terms(text) for text in texts]
        lengths = np.fromiter(map(len, found), np.int64, len(found))
        words = np.fromiter(chain.from_iterable(found), np.uint64, int(lengths.sum()))
        first = len(self._lengths.values)
        rows = np.repeat(np.arange(first, first + len(texts), dtype=np.uint64), lengths)
        self._lengths.add(np.minimum(lengths, 0xFFFF))
        self._total += len(words)
        self._append(_segment(words, rows))

    def snapshot(self) -> Snapshot:
        """The rows that there are now."""
        lengths = self._lengths.values
        return Snapshot(tuple(self._segments), lengths, max(1.0, self._total / max(1, len(lengths))))

    def rows(self, kept: NDArray[np.intp]) -> Postings:
        """A copy with only the rows `kept`, which ascend."""
        copy = Postings()
        copy._lengths.add(self._lengths.values[kept])
        copy._total = int(copy._lengths.values.sum(dtype=np.int64))
        numbers = np.full(len(self._lengths.values), -1, np.int64)
        numbers[kept] = np.arange(len(kept))
        for segment in self._segments:
            moved = numbers[segment.rows]
            stays = moved >= 0
            words = np.repeat(segment.words, np.diff(segment.starts))[stays]
            copy._append(_grouped(words, moved[stays].astype(np.uint32), segment.counts[stays]))
        return copy

    def _append(self, segment: Segment) -> None:
        segments = [*self._segments, segment]
        while len(segments) > 1 and len(segments[-2].rows) <= MERGED * len(segments[-1].rows):
            segments[-2:] = [_merged(*segments[-2:])]
        self._segments = segments


def _segment(words: NDArray[np.uint64], rows: NDArray[np.uint64]) -> Segment:
    pairs, counts = np.unique(words << np.uint64(32) | rows, return_counts=True)
    return _grouped(
        (pairs >> np.uint64(32)).astype(np.uint32), pairs.astype(np.uint32), np.minimum(counts, 255).astype(np.uint8)
    )


def _grouped(words: NDArray[np.uint32], rows: NDArray[np.uint32], counts: NDArray[np.uint8]) -> Segment:
    firsts = np.flatnonzero(np.diff(words, prepend=np.uint32(0)) != 0) if len(words) else np.zeros(0, np.intp)
    if len(words) and (not len(firsts) or firsts[0] != 0):
        firsts = np.concatenate(([0], firsts))
    return Segment(words[firsts], np.append(firsts, len(words)).astype(np.int64), rows, counts)


def _merged(first: Segment, second: Segment) -> Segment:
    """Both; the rows of `second` are above all of `first`."""
    words = np.union1d(first.words, second.words)
    sizes = np.zeros((2, len(words)), np.int64)
    for number, segment in enumerate((first, second)):
        sizes[number, np.searchsorted(words, segment.words)] = np.diff(segment.starts)
    starts = np.concatenate(([0], sizes.sum(axis=0).cumsum()))
    rows = np.empty(starts[-1], np.uint32)
    counts = np.empty(starts[-1], np.uint8)
    for segment, begins in ((first, starts[:-1]), (second, starts[:-1] + sizes[0])):
        own = np.searchsorted(words, segment.words)
        to = np.repeat(begins[own] - segment.starts[:-1], np.diff(segment.starts)) + np.arange(len(segment.rows))
        rows[to] = segment.rows
        counts[to] = segment.counts
    return Segment(words, starts, rows, counts)
