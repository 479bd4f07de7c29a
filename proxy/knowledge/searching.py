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
        search = partial(self._opened.shelves.search, identity=identity, query=query, vector=vector)
        every = await asyncio.gather(*(search(kept, limit=depth, files=documents) for kept in found))
        results = _comparable(every)
        pieces = [hit.piece for hits in results for hit in hits]
        taken = await self._opened.database.run(partial(catalogue.taken, pieces=pieces))
        passages, surest = list[Passage](), 0.0
        for kept, hits in zip(found, results, strict=True):
            calibration = await self._opened.calibrations.of(kept, identity)
            there = [hit for hit in hits if hit.piece in taken]
            seen = [evidence(query, taken[hit.piece].text, hit.dense or 0.0) for hit in there]
            surest = max(surest, confidence(seen, calibration))
            passages += [
                _passage(hit, taken[hit.piece], relevance(one, calibration))
                for hit, one in zip(there, seen, strict=True)
            ]
        passages.sort(key=lambda passage: -passage.score)
        if reranks and passages:
            passages = await self._reranked(query, passages[:depth])
            surest = max(surest, passages[0].relevance)
        return Found(passages[:limit], surest)

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
        calibration = self._opened.calibrations.any(await self._ranker.identity())
        vectors = await self._ranker.embed([query, *texts])
        cosines = [float(cosine) for cosine in vectors[1:] @ vectors[0]]
        return [
            relevance(evidence(query, text, cosine), calibration) for text, cosine in zip(texts, cosines, strict=True)
        ]


def _comparable(results: Sequence[Sequence[Hit]]) -> Sequence[Sequence[Hit]]:
    """The hits of several collections with scores over all of them: an index scores those of one collection."""
    if len(results) < 2:
        return results
    from llama_smart_proxy.proxy.knowledge.index.fusion import hits as fused

    every = [(hit.piece, hit.dense, hit.lexical) for hits in results for hit in hits]
    scores = {hit.piece: hit.score for hit in fused(every, len(every))} if every else {}
    return [[hit._replace(score=scores[hit.piece]) for hit in hits] for hits in results]


def _passage(hit: Hit, taken: Taken, relevant: float) -> Passage:
    return Passage(
        taken.text, taken.document, taken.heading, taken.number, taken.collection, taken.document_id, taken.source,
        hit.score, relevant, taken.attributes,
    )  # fmt: skip


def _sigmoid(score: float) -> float:
    return 1 / (1 + math.exp(-max(-60.0, min(60.0, score))))
