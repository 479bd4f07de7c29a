"""Which passages of the web come first."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Sequence
from dataclasses import replace

from llama_smart_proxy import Context, Passage, ProxyError

logger = logging.getLogger(__name__)

_WORD = re.compile(r"\w+")
MOST_GRADED = 24
"""Passages that are graded by their meaning: the ones with most words of the query."""


def overlap(query: str, texts: Sequence[str]) -> list[float]:
    """How many of the words of `query` are in each text, 0 to 1; a word that is in few of the texts counts more."""
    words = {word for word in _WORD.findall(query.casefold()) if len(word) > 1}
    contained = [words & set(_WORD.findall(text.casefold())) for text in texts]
    weights = {word: 1 / (1 + sum(word in found for found in contained)) for word in words}
    total = sum(weights.values()) or 1.0
    return [sum(weights[word] for word in found) / total for found in contained]


async def graded(query: str, passages: Sequence[Passage], ctx: Context, timeout_s: float) -> list[Passage]:
    """The passages with their `score` and `relevance`, the best first: by their meaning where there is an embedding
    model that answers in time, else by the words of the query that they have."""
    scores = overlap(query, [f"{passage.document} {passage.text}" for passage in passages])
    ranked = _ranked(passages, scores)
    try:
        async with asyncio.timeout(timeout_s):
            most = ranked[:MOST_GRADED]
            return _ranked(most, await ctx.knowledge.grade(query, [passage.text for passage in most]))
    except (ProxyError, TimeoutError) as exc:
        logger.info("passages of the web are ranked by words: %s", str(exc) or "grading them took too long")
        return ranked


def _ranked(passages: Sequence[Passage], scores: Sequence[float]) -> list[Passage]:
    found = [replace(passage, score=score, relevance=score) for passage, score in zip(passages, scores, strict=True)]
    return sorted(found, key=lambda passage: -passage.score)
