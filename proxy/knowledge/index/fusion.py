"""One rank from two searches: the weighted sum of their scores, each brought to 0 to 1 over what was found.

Source of the comparison: reciprocal rank fusion ranks worse than vectors alone where one search is much better than the
other (`make eval-rag`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

DENSE = 0.7
"""The weight of the cosine; the rest is BM25's."""


def fuse(dense: NDArray[np.float32], lexical: NDArray[np.float32]) -> NDArray[np.float32]:
    """The scores, 0 to 1, of pieces with these cosines and BM25 scores; NaN where one was not computed."""
    return (DENSE * _scaled(dense) + (1 - DENSE) * _scaled(lexical)).astype(np.float32)


def _scaled(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    known = scores[~np.isnan(scores)]
    if not len(known):
        return np.zeros(len(scores), np.float32)
    low, high = known.min(), known.max()
    scaled: NDArray[np.float32] = np.nan_to_num((scores - low) / max(high - low, np.float32(1e-6)), nan=0.0)
    return scaled
