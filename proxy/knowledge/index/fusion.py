"""One rank from two searches: the weighted sum of their scores, each brought to 0 to 1 over what was found.

Source of the comparison: reciprocal rank fusion ranks worse than vectors alone where one search is much better than the
other (`make eval-rag`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llama_smart_proxy.proxy.knowledge.base import Hit
from llama_smart_proxy.proxy.knowledge.index.matrix import top

DENSE = 0.7
"""The weight of the cosine; the rest is BM25's."""


def fuse(dense: NDArray[np.float32], lexical: NDArray[np.float32]) -> NDArray[np.float32]:
    """The scores, 0 to 1, of pieces with these cosines and BM25 scores; NaN where one was not computed."""
    return (DENSE * _scaled(dense) + (1 - DENSE) * _scaled(lexical)).astype(np.float32)


def hits(found: Sequence[tuple[int, float | None, float | None]], limit: int) -> list[Hit]:
    """The best of what was found, given as piece, cosine and lexical score (None or 0: none)."""
    dense = np.array([row[1] if row[1] is not None else np.nan for row in found], np.float32)
    lexical = np.array([row[2] or np.nan for row in found], np.float32)
    scores = fuse(dense, lexical)
    return [
        Hit(found[at][0], float(scores[at]), found[at][1], found[at][2] or None) for at in top(scores, limit).tolist()
    ]


def _scaled(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    known = scores[~np.isnan(scores)]
    if not len(known):
        return np.zeros(len(scores), np.float32)
    low, high = known.min(), known.max()
    scaled: NDArray[np.float32] = np.nan_to_num((scores - low) / max(high - low, np.float32(1e-6)), nan=0.0)
    return scaled
