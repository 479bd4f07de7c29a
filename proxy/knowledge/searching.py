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
from llama_smart_proxy.proxy.knowledge.tables import Kept

if TYPE_CHECKING:
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
        depth = max(limit, RERANKED) if reranks else limit
        identity = await self._ranker.identity()
        vector = (await self._ranker.embed([query]))[0]
        search = partial(self._opened.shelves.search, identity=identity, query=query, vector=vector)
        results = await asyncio.gather(*(search(kept, limit=depth, files=documents) for kept in found))
        hits = _merged(results)[:depth]
        taken = await self._opened.database.run(partial(catalogue.taken, pieces=[hit.piece for hit in hits]))
        passages = [_passage(hit, taken[hit.piece]) for hit in hits if hit.piece in taken]
        if reranks and passages:
            passages = await self._reranked(query, passages)
        confidence = max((passage.relevance for passage in passages), default=0.0)
        return Found(passages[:limit], confidence)

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
        return [_relevance(float(cosine)) for cosine in vectors[1:] @ vectors[0]]


def _merged(results: Sequence[Sequence[Hit]]) -> list[Hit]:
    """The hits of all collections, the best first. Scores are relative to those of the same search: they are computed
    again over all of them."""
    hits = [hit for hits in results for hit in hits]
    if len(results) < 2 or not hits:
        return hits
    import numpy as np

    from llama_smart_proxy.proxy.knowledge.index.fusion import fuse

    scores = fuse(
        np.array([math.nan if hit.dense is None else hit.dense for hit in hits], np.float32),
        np.array([0.0 if hit.lexical is None else hit.lexical for hit in hits], np.float32),
    )
    hits = [hit._replace(score=float(score)) for hit, score in zip(hits, scores, strict=True)]
    return sorted(hits, key=lambda hit: -hit.score)


def _passage(hit: Hit, taken: Taken) -> Passage:
    return Passage(
        taken.text, taken.document, taken.heading, taken.number, taken.collection, taken.document_id, taken.source,
        hit.score, _relevance(hit.dense or 0.0), taken.attributes,
    )  # fmt: skip


def _relevance(cosine: float) -> float:
    return min(1.0, max(0.0, cosine))


def _sigmoid(score: float) -> float:
    return 1 / (1 + math.exp(-max(-60.0, min(60.0, score))))
