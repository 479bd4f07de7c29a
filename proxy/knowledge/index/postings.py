"""Text search by BM25: for each term the rows that contain it, and how often.

Rows are added in segments, which are merged as they become many. Rows that were removed stay until `rows`; the caller
masks them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from itertools import chain, pairwise
from math import log1p
from operator import attrgetter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llama_smart_proxy.proxy.knowledge.index.growing import Growing
from llama_smart_proxy.proxy.knowledge.index.matrix import top
from llama_smart_proxy.proxy.knowledge.index.words import question_terms, terms

K1, B = 1.2, 0.75
"""BM25's usual values: how soon more of the same word counts no more, and how much a long text is worth less."""
SCANNED = 100_000
"""Rows that are read to find the best ones. Words that most texts have are read only for those."""

STEP, PAUSE_S = 32, 5e-5
"""Texts after which this thread rests, and for how many seconds: splitting them holds the interpreter's lock, which the
event loop then gets at once, and not after its limit of 5 ms."""
MOVED = 300_000
"""Rows that are copied at a time when segments are merged."""


class Segment(NamedTuple):
    """Rows by term. `words` ascend; the rows of `words[i]` are `rows[starts[i]:starts[i + 1]]`, ascending."""

    words: NDArray[np.uint32]
    starts: NDArray[np.int64]
    rows: NDArray[np.uint32]
    counts: NDArray[np.uint8]

    def places(self, words: NDArray[np.uint32]) -> list[slice]:
        """Where the rows of each term are."""
        at = np.searchsorted(self.words, words)
        at[at == len(self.words)] = 0
        has = self.words[at] == words if len(self.words) else np.zeros(len(words), np.bool_)
        return [
            slice(int(self.starts[place]), int(self.starts[place + 1])) if known else slice(0, 0)
            for place, known in zip(at, has, strict=True)
        ]


class Entry(NamedTuple):
    """A term of a query: its weight, how many rows have it, and where these are."""

    rarity: float
    found: int
    places: Sequence[tuple[Segment, slice]]


class Snapshot(NamedTuple):
    """The rows at one time."""

    segments: tuple[Segment, ...]
    lengths: NDArray[np.uint16]
    mean_length: float

    def entries(self, query: str) -> list[Entry]:
        """The terms of a query that any rows have, the rarest first."""
        asked = sorted(Counter(question_terms(query)).items())
        words = np.array([word for word, _ in asked], np.uint32)
        places = [segment.places(words) for segment in self.segments]
        entries = []
        for number, (_, times) in enumerate(asked):
            own = [(segment, each[number]) for segment, each in zip(self.segments, places, strict=True)]
            found = sum(place.stop - place.start for _, place in own)
            rarity = times * log1p((len(self.lengths) - found + 0.5) / (found + 0.5))
            entries.append(Entry(rarity, found, [(segment, place) for segment, place in own if place.stop]))
        return sorted((entry for entry in entries if entry.found), key=attrgetter("found"))

    def best(self, entries: Sequence[Entry], limit: int, allowed: NDArray[np.bool_]) -> NDArray[np.intp]:
        """At most `limit` of the `allowed` rows (a mask of all), in no order: those with the highest scores by the
        rarest terms, of which at least one is read, and not much more than `SCANNED` rows in all."""
        rows: list[NDArray[np.uint32]] = []
        weights = []
        read = 0
        for entry in entries:
            if read and read + entry.found > SCANNED:
                break
            read += entry.found
            for segment, place in entry.places:
                rows.append(segment.rows[place])
                weights.append(self._weights(rows[-1], segment.counts[place], entry.rarity))
        if not rows:
            return np.zeros(0, np.intp)
        scores = np.bincount(np.concatenate(rows), np.concatenate(weights), minlength=len(allowed))
        matching = np.flatnonzero((scores > 0) & allowed)
        return matching[top(scores[matching].astype(np.float32), limit)]

    def scores(self, entries: Sequence[Entry], rows: NDArray[np.intp]) -> NDArray[np.float32]:
        """The BM25 scores of these rows."""
        scores = np.zeros(len(rows), np.float32)
        sought = rows.astype(np.uint32)  # of the same kind: the other array would be converted as a whole
        for entry in entries:
            for segment, place in entry.places:
                has = segment.rows[place]
                at = np.searchsorted(has, sought)
                at[at == len(has)] = 0
                same = np.flatnonzero(has[at] == sought)
                if len(same):
                    scores[same] += self._weights(has[at[same]], segment.counts[place][at[same]], entry.rarity)
        return scores

    def _weights(self, rows: NDArray[np.uint32], counts: NDArray[np.uint8], rarity: float) -> NDArray[np.float32]:
        """What a word adds to the scores of rows that have it so many times."""
        times = counts.astype(np.float32)
        norm = self.lengths[rows].astype(np.float32) * np.float32(K1 * B / self.mean_length)
        norm += np.float32(K1 * (1 - B))
        times *= np.float32(rarity * (K1 + 1)) / (times + norm)
        return times


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
        found: list[list[int]] = []
        for at in range(0, len(texts), STEP):
            found += map(terms, texts[at : at + STEP])
            time.sleep(PAUSE_S)
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
        while len(segments) > 1 and len(segments[-2].rows) <= len(segments[-1].rows):
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
    words = np.sort(np.concatenate([first.words, second.words]))  # not `union1d`: it takes long, with the lock held
    words = words[np.diff(words, prepend=words[:1] - np.uint32(1)) != 0]
    sizes = np.zeros((2, len(words)), np.int64)
    for number, segment in enumerate((first, second)):
        sizes[number, np.searchsorted(words, segment.words)] = np.diff(segment.starts)
    starts = np.concatenate(([0], sizes.sum(axis=0).cumsum()))
    merged = Segment(words, starts, np.empty(starts[-1], np.uint32), np.empty(starts[-1], np.uint8))
    for segment, begins in ((first, starts[:-1]), (second, starts[:-1] + sizes[0])):
        _move(segment, merged, begins[np.searchsorted(words, segment.words)])
    return merged


def _move(segment: Segment, to: Segment, begins: NDArray[np.int64]) -> None:
    """Copy the rows of each word to where they begin in another segment; some at a time, as the index of all would take
    more memory than they do, and the interpreter's lock for long."""
    steps = np.searchsorted(segment.starts, np.arange(0, len(segment.rows), MOVED))
    for first, end in pairwise([*np.unique(steps).tolist(), len(segment.words)]):
        part = slice(segment.starts[first], segment.starts[end])
        shifts = np.repeat(begins[first:end] - segment.starts[first:end], np.diff(segment.starts[first : end + 1]))
        at = shifts + np.arange(part.start, part.stop)
        to.rows[at] = segment.rows[part]
        to.counts[at] = segment.counts[part]
