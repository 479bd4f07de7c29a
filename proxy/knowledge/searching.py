"""Searches: the pieces that the index finds, of several collections, as passages."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from llama_smart_proxy.proxy.chat.passage import Found, Passage
from llama_smart_proxy.proxy.knowledge import catalogue
from llama_smart_proxy.proxy.knowledge.base import Hit, Ranker
from llama_smart_proxy.proxy.knowledge.catalogue import Taken
from llama_smart_proxy.proxy.knowledge.relevance import COMPARED, confidence, evidence, relevance
from llama_smart_proxy.proxy.knowledge.tables import Kept

if TYPE_CHECKING:
    from llama_smart_proxy.proxy.knowledge.base import Vector
    from llama_smart_proxy.proxy.knowledge.knowledge import Opened

RERANKED = 50
"""Passages that the reranking model is asked about."""


class Searching:
    """Searches in what is open, with the models of `ranker`."""

    def __init__(self, opened: Opened, ranker: Ranker) -> None:
        self._opened = opened
        self._ranker = ranker

    async def search(
        self, query: str, found: Sequence[Kept], limit: int, documents: frozenset[str] | None, *, rerank: bool
    ) -> Found:
        """As `Library.search`."""
        reranks = rerank and self._ranker.reranks
        depth = max(limit, RERANKED if reranks else COMPARED)
        identity = await self._ranker.identity()
        vector = (await self._ranker.embed([query]))[0]
        results = await asyncio.gather(*(self._in(kept, identity, query, vector, depth, documents) for kept in found))
        passages = sorted((passage for each, _ in results for passage in each), key=lambda passage: -passage.score)
        trust = max((each for _, each in results), default=0.0)
        if reranks and passages:
            passages = await self._reranked(query, passages[:depth])
            trust = max(passage.relevance for passage in passages)
        return Found(passages[:limit], trust)

    async def _in(
        self, kept: Kept, identity: str, query: str, vector: Vector, limit: int, documents: frozenset[str] | None
    ) -> tuple[list[Passage], float]:
        """The passages of one collection, and the confidence that they have the answer."""
        hits = await self._opened.shelves.search(kept, identity, query, vector, limit, documents)
        taken = await self._opened.database.run(partial(catalogue.taken, pieces=[hit.piece for hit in hits]))
        calibration = await self._opened.calibrations.of(kept, identity, _Measured(self._opened, kept, identity))
        known = [(hit, taken[hit.piece]) for hit in hits if hit.piece in taken]
        seen = [evidence(query, found.text, hit.dense or 0.0) for hit, found in known]
        passages = [
            _passage(hit.score, found, relevance(each, calibration))
            for (hit, found), each in zip(known, seen, strict=True)
        ]
        return passages, confidence(seen, calibration)

    async def _reranked(self, query: str, passages: Sequence[Passage]) -> list[Passage]:
        scores = await self._ranker.rerank(query, [passage.text for passage in passages])
        found = [
            replace(passage, score=_sigmoid(score), relevance=_sigmoid(score))
            for passage, score in zip(passages, scores, strict=True)
        ]
        return sorted(found, key=lambda passage: -passage.score)

    async def grade(self, query: str, texts: Sequence[str]) -> list[float]:
        """As `Library.grade`."""
        if not texts:
            return []
        vectors = await self._ranker.embed([query, *texts])
        calibration = self._opened.calibrations.last
        found = zip(texts, vectors[1:] @ vectors[0], strict=True)
        return [relevance(evidence(query, text, float(cosine)), calibration) for text, cosine in found]


class _Measured:
    """A collection, to be measured."""

    def __init__(self, opened: Opened, kept: Kept, identity: str) -> None:
        self._opened, self._kept, self._identity = opened, kept, identity

    async def search(self, collection: str, query: str, vector: Vector, limit: int) -> list[Hit]:
        """As `Index.search`."""
        return await self._opened.shelves.search(self._kept, self._identity, query, vector, limit, None)


def _passage(score: float, taken: Taken, relevant: float) -> Passage:
    return Passage(
        taken.text, taken.document, taken.heading, taken.number, taken.collection, taken.document_id, taken.source,
        score, relevant, taken.attributes,
    )  # fmt: skip


def _sigmoid(score: float) -> float:
    return 1 / (1 + math.exp(-max(-60.0, min(60.0, score))))
