"""How well questions find their answers, and whether it is noticed that there is none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_smart_proxy.agents.rag.loop import Verdict, verdict_of
from llama_smart_proxy.proxy.knowledge.base import Hit, Row
from llama_smart_proxy.proxy.knowledge.index.local import LocalIndex
from llama_smart_proxy.proxy.knowledge.index.postings import Postings
from llama_smart_proxy.proxy.knowledge.relevance import Calibration, confidence, evidence

SHOWN, DEPTH = 10, 100
"""Pieces whose ranks count, and pieces that each method finds."""
COLLECTION = "c"
RRF = 60
"""The constant of reciprocal rank fusion. Source: Cormack, Clarke and Buettcher, SIGIR 2009."""
Floats = NDArray[np.float32]
Ranks = NDArray[np.float64]
"""For each question, the position (from 1) of the first piece of its answer; infinity if it was not found."""


@dataclass(frozen=True)
class Question:
    """A question, its vector, and the pieces of its answer."""

    text: str
    vector: Floats
    gold: frozenset[int]
    half: str = ""


class Pool:
    """Pieces to be searched, numbered from 0, in the index of the knowledge base."""

    def __init__(self, texts: Sequence[str], vectors: Floats) -> None:
        self.texts, self.vectors = texts, vectors
        self.index = LocalIndex()
        self._postings = Postings()

    async def fill(self) -> None:
        """Add all pieces. To be called once."""
        self._postings.add(self.texts)
        await self.index.open(COLLECTION, self.vectors.shape[1], "")
        pairs = zip(self.texts, self.vectors, strict=True)
        rows = [Row(at, str(at), text, vector) for at, (text, vector) in enumerate(pairs)]
        await self.index.add(COLLECTION, rows)
        await self.index.settle(COLLECTION, "filled")

    async def found(self, question: Question) -> list[Hit]:
        """What the knowledge base finds."""
        return await self.index.search(COLLECTION, question.text, question.vector, DEPTH)

    def by_words(self, question: Question) -> list[int]:
        """The best pieces by BM25."""
        postings = self._postings.snapshot()
        entries = postings.entries(question.text)
        rows = postings.best(entries, DEPTH, np.ones(len(self.texts), np.bool_))
        return [int(row) for row in rows[np.argsort(-postings.scores(entries, rows))]]

    def by_vector(self, question: Question) -> list[int]:
        """The best pieces by cosine."""
        return [int(row) for row in np.argsort(-(self.vectors @ question.vector))[:DEPTH]]


def rank(order: Iterable[int], gold: frozenset[int]) -> float:
    return next((at for at, piece in enumerate(order, 1) if piece in gold), np.inf)


async def methods(pool: Pool, questions: Sequence[Question]) -> dict[str, Ranks]:
    """The ranks by each method."""
    ranks: dict[str, list[float]] = {}
    for question in questions:
        by_words, by_vector = pool.by_words(question), pool.by_vector(question)
        orders = {
            "BM25": by_words,
            "dense": by_vector,
            "RRF": reciprocal(by_words, by_vector),
            "fusion": [hit.piece for hit in await pool.found(question)],
        }
        for name, order in orders.items():
            ranks.setdefault(name, []).append(rank(order, question.gold))
    return {name: np.array(found) for name, found in ranks.items()}


def reciprocal(*orders: Sequence[int]) -> list[int]:
    """The order by reciprocal rank fusion."""
    scores: dict[int, float] = {}
    for order in orders:
        for at, piece in enumerate(order, 1):
            scores[piece] = scores.get(piece, 0.0) + 1 / (RRF + at)
    return sorted(scores, key=lambda piece: -scores[piece])


def figures(ranks: Ranks) -> dict[str, float]:
    """hit@1, 5 and 10, and the mean reciprocal rank of the first ten."""
    hits = {f"hit@{depth}": float((ranks <= depth).mean()) for depth in (1, 5, SHOWN)}
    return hits | {"MRR@10": float(np.where(ranks <= SHOWN, 1 / ranks, 0).mean())}


def auc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """The probability that a positive has a greater value than a negative."""
    values = np.concatenate([positive, negative])
    order = values.argsort(kind="stable")
    ranks = np.empty(len(values))
    ranks[order] = np.arange(1, len(values) + 1)
    for value in np.unique(values):  # equal values share their rank
        ranks[values == value] = ranks[values == value].mean()
    ahead = ranks[: len(positive)].sum() - len(positive) * (len(positive) + 1) / 2
    return float(ahead / (len(positive) * len(negative)))


class Trigger:
    """What shows that an answer is there: by name a value for each question."""

    def __init__(self, pool: Pool, calibration: Calibration) -> None:
        self._pool = pool
        self._calibration = calibration

    async def values(self, questions: Sequence[Question], *, gold: bool) -> dict[str, list[float]]:
        """With the answers in the pool (`gold`), or as if they were not there."""
        found: dict[str, list[float]] = {}
        for question in questions:
            hits = [hit for hit in await self._pool.found(question) if gold or hit.piece not in question.gold]
            cosines = sorted((hit.dense or 0.0 for hit in hits), reverse=True)
            evidences = [evidence(question.text, self._pool.texts[hit.piece], hit.dense or 0.0) for hit in hits]
            signals = {
                "best cosine": cosines[0],
                "margin to the fifth": cosines[0] - cosines[4],
                "confidence": confidence(evidences[:SHOWN], self._calibration),
            }
            for name, value in signals.items():
                found.setdefault(name, []).append(value)
        return found


def actions(values: Sequence[float], *, lower: float, upper: float) -> dict[str, float]:
    """The share of each action."""
    verdicts = [str(verdict_of(value, lower=lower, upper=upper)) for value in values]
    return {name: verdicts.count(name) / len(verdicts) for name in map(str, Verdict)}


def table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """As Markdown."""
    heads = list(dict.fromkeys(head for row in rows.values() for head in row))
    lines = [f"| {title} | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, row in rows.items():
        cells = [f"{row[head]:.3f}" if isinstance(row.get(head), float) else str(row.get(head, "")) for head in heads]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
