"""One rank from two searches.

A cosine means the same in each search, so it is not scaled; a BM25 score does not, and is divided by the best one. In
`make eval-rag` this was better than min-max over both, z-scores, and much better than reciprocal ranks, which are worse
than the cosine alone. Scores of several collections, searched for one question, can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llama_smart_proxy.proxy.knowledge.base import Hit
from llama_smart_proxy.proxy.knowledge.index.matrix import top

LEXICAL = 0.15
"""What the best text score is worth, as a difference of cosines."""


def fuse(dense: NDArray[np.float32], lexical: NDArray[np.float32]) -> NDArray[np.float32]:
    """The scores, 0 to 1, of pieces with these cosines and text scores. NaN is what one search has not found: it counts
    as the worst cosine, or as no common word."""
    if not len(dense):
        return np.zeros(0, np.float32)
    cosines = np.nan_to_num(dense, nan=float(np.nanmin(dense)) if not np.isnan(dense).all() else 0.0)
    texts = np.nan_to_num(lexical, nan=0.0)
    scores = np.maximum(cosines, 0) + LEXICAL * texts / max(float(texts.max()), 1e-6)
    fused: NDArray[np.float32] = np.minimum(scores / (1 + LEXICAL), 1).astype(np.float32)
    return fused


def hits(found: Sequence[tuple[int, float | None, float | None]], limit: int) -> list[Hit]:
    """The best of what was found, given as piece, cosine and text score (None or 0: none)."""
    dense = np.array([row[1] if row[1] is not None else np.nan for row in found], np.float32)
    lexical = np.array([row[2] or np.nan for row in found], np.float32)
    scores = fuse(dense, lexical)
    return [
        Hit(found[at][0], float(scores[at]), found[at][1], found[at][2] or None) for at in top(scores, limit).tolist()
    ]
