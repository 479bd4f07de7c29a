"""Which passages of the web come first."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from llama_smart_proxy import Context, Passage

_WORD = re.compile(r"\w+")
MOST_GRADED = 64
"""Passages that are graded by their meaning: the ones with most words of the query."""


def overlap(query: str, texts: Sequence[str]) -> list[float]:
    """How many of the words of `query` are in each text, 0 to 1; a word that is in few of the texts counts more."""
    words = {word for word in _WORD.findall(query.casefold()) if len(word) > 1}
    contained = [words & set(_WORD.findall(text.casefold())) for text in texts]
    weights = {word: 1 / (1 + sum(word in found for found in contained)) for word in words}
    total = sum(weights.values()) or 1.0
    return [sum(weights[word] for word in found) / total for found in contained]


async def graded(query: str, passages: Sequence[Passage], ctx: Context) -> list[Passage]:
    """The passages with their `score` and `relevance`, the best first."""
    scores = overlap(query, [f"{passage.document} {passage.text}" for passage in passages])
    ranked = [replace(passage, score=score, relevance=score) for passage, score in zip(passages, scores, strict=True)]
    return sorted(ranked, key=lambda passage: -passage.score)
