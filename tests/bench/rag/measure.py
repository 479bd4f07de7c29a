"""How well questions find their answers, and whether it is noticed that there is none."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llama_smart_proxy.proxy.knowledge.base import Hit, Row
from llama_smart_proxy.proxy.knowledge.index.local import LocalIndex
from llama_smart_proxy.proxy.knowledge.index.postings import Postings

DEPTH = 10
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
        self._index = LocalIndex()
        postings = Postings()
        postings.add(list(texts))
        self._postings = postings.snapshot()

    async def fill(self) -> None:
        """Add all pieces. To be called once."""
        await self._index.open("c", self.vectors.shape[1], "")
        pairs = zip(self.texts, self.vectors, strict=True)
        await self._index.add("c", [Row(at, str(at), text, vector) for at, (text, vector) in enumerate(pairs)])
        await self._index.settle("c", "filled")

    async def found(self, question: Question, without: frozenset[int] = frozenset()) -> list[Hit]:
        """What the knowledge base finds; `without` some pieces."""
        hits = await self._index.search("c", question.text, question.vector, 100)
        return [hit for hit in hits if hit.piece not in without]

    def lexical(self, question: Question) -> Floats:
        return self._postings.scores(question.text)

    def dense(self, question: Question) -> Floats:
        return self.vectors @ question.vector


def rank(order: Iterable[int], gold: frozenset[int]) -> float:
    return next((at for at, piece in enumerate(order, 1) if piece in gold), np.inf)


async def methods(pool: Pool, questions: Sequence[Question]) -> dict[str, Ranks]:
    """The ranks by each method."""
    ranks: dict[str, list[float]] = {name: [] for name in ("BM25", "dense", "RRF", "fusion")}
    for question in questions:
        lexical, dense = pool.lexical(question), pool.dense(question)
        by_text, by_vector = np.argsort(-lexical)[:100], np.argsort(-dense)[:100]
        reciprocal: dict[int, float] = {}
        for order in (by_text, by_vector):
            for at, piece in enumerate(order.tolist(), 1):
                reciprocal[piece] = reciprocal.get(piece, 0.0) + 1 / (RRF + at)
        orders: dict[str, Iterable[int]] = {
            "BM25": by_text.tolist(),
            "dense": by_vector.tolist(),
            "RRF": sorted(reciprocal, key=lambda piece: -reciprocal[piece]),
            "fusion": [hit.piece for hit in await pool.found(question)],
        }
        for name, order in orders.items():
            ranks[name].append(rank(order, question.gold))
    return {name: np.array(found) for name, found in ranks.items()}


def figures(ranks: Ranks) -> dict[str, float]:
    """hit@1, 5 and 10, and the mean reciprocal rank of the first ten."""
    hits = {f"hit@{depth}": float((ranks <= depth).mean()) for depth in (1, 5, DEPTH)}
    return hits | {"MRR@10": float(np.where(ranks <= DEPTH, 1 / ranks, 0).mean())}


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


Signal = Callable[[Question, Sequence[Hit]], float]


def top_cosine(question: Question, hits: Sequence[Hit]) -> float:
    """The greatest cosine of what was found."""
    return max((hit.dense for hit in hits if hit.dense is not None), default=0.0)


def margin(question: Question, hits: Sequence[Hit]) -> float:
    """By how much the greatest cosine exceeds the fifth."""
    cosines = sorted((hit.dense for hit in hits if hit.dense is not None), reverse=True)
    return cosines[0] - cosines[4] if len(cosines) > 4 else 0.0


async def signals(
    pool: Pool, questions: Sequence[Question], known: Mapping[str, Signal], *, gold: bool
) -> dict[str, list[float]]:
    """The values of each signal, with the answers in the pool (`gold`), or without them."""
    values: dict[str, list[float]] = {name: [] for name in known}
    for question in questions:
        hits = await pool.found(question, frozenset() if gold else question.gold)
        for name, signal in known.items():
            values[name].append(signal(question, hits))
    return values


def table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """As Markdown."""
    heads = list(dict.fromkeys(head for row in rows.values() for head in row))
    lines = [f"| {title} | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, row in rows.items():
        cells = [f"{row[head]:.3f}" if isinstance(row.get(head), float) else str(row.get(head, "")) for head in heads]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def run(pool: Pool) -> None:
    """Fill it."""
    asyncio.run(pool.fill())
