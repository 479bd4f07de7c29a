"""How fast the knowledge base is searched and filled, and what it takes in memory, by the number of its pieces.

`python -m tests.bench.retrieval --json build/retrieval.json` measures 10,000, 100,000 and 1,000,000 pieces, each size
in a process of its own. Texts are made of words as frequent as those of a language, vectors lie in clusters;
`--vectors` takes the rows of a .npy file, with noise, in their place.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
from numpy.typing import NDArray

from llama_smart_proxy.proxy.knowledge.base import Row
from llama_smart_proxy.proxy.knowledge.index.local import LocalIndex

DIMENSIONS, BATCH, QUERIES = 384, 2048, 60
WORDS = 200_000
"""Different words in all texts."""
LENGTH = 110
"""Words of a text."""


class Texts:
    """Pieces made by chance, the same ones each time."""

    def __init__(self, vectors: Path | None) -> None:
        self._random = np.random.default_rng(7)
        self._words = np.array([f"{'aeiou'[at % 5]}w{at}" for at in range(WORDS)])
        self._centres = self._random.standard_normal((3000, DIMENSIONS), dtype=np.float32)
        self._noise = 1.0
        if vectors is not None:
            self._centres, self._noise = np.load(vectors).astype(np.float32), 0.02

    def text(self, words: int = LENGTH) -> str:
        return " ".join(self._words[np.minimum(self._random.zipf(1.15, words), WORDS) - 1])

    def vectors(self, count: int) -> NDArray[np.float32]:
        found = self._centres[self._random.integers(0, len(self._centres), count)]
        found = found + self._noise * self._random.standard_normal((count, DIMENSIONS), dtype=np.float32)
        return found / np.linalg.norm(found, axis=1, keepdims=True)  # type: ignore[no-any-return]

    def rows(self, count: int) -> Iterator[list[Row]]:
        for first in range(0, count, BATCH):
            vectors = self.vectors(min(BATCH, count - first))
            yield [Row(first + at, f"file-{(first + at) // 50}", self.text(), row) for at, row in enumerate(vectors)]


def resident_mb() -> float:
    return psutil.Process().memory_info().rss / 1e6


async def measure(count: int, vectors: Path | None) -> dict[str, float]:
    """The figures of one size."""
    texts, index = Texts(vectors), LocalIndex()
    await index.open("bench", DIMENSIONS, "")
    before_mb, adding_s, adding_cpu_s = resident_mb(), 0.0, 0.0
    longest_s = 0.0
    for rows in texts.rows(count):
        adding = asyncio.create_task(index.add("bench", rows))
        begun, busy = time.perf_counter(), time.process_time()
        while not adding.done():
            at = time.perf_counter()
            await asyncio.sleep(0.001)
            longest_s = max(longest_s, time.perf_counter() - at - 0.001)
        adding_s += time.perf_counter() - begun
        adding_cpu_s += time.process_time() - busy
    await index.settle("bench", "")
    figures = {
        "pieces": count,
        "added_per_s": count / adding_s,
        "added_per_cpu_s": count / adding_cpu_s,
        "loop_longest_ms": longest_s * 1e3,
        "rss_mb": resident_mb() - before_mb,
    }
    asked = [(texts.text(8), vector) for vector in texts.vectors(QUERIES)]
    some = frozenset(f"file-{number}" for number in range(0, count // 50, 10))
    for name, files in (("all", None), ("tenth", some)):
        took, worked = [], []
        for query, vector in asked:
            begun, busy = time.perf_counter(), time.process_time()
            await index.search("bench", query, vector, 10, files)
            took.append((time.perf_counter() - begun) * 1e3)
            worked.append((time.process_time() - busy) * 1e3)
        figures[f"search_{name}_p50_ms"], figures[f"search_{name}_p95_ms"] = np.percentile(took, [50, 95])
        figures[f"search_{name}_cpu_ms"] = float(np.median(worked))
    figures["recall_at_10"] = recall(index, [vector for _, vector in asked])
    return figures


def recall(index: LocalIndex, vectors: list[NDArray[np.float32]]) -> float:
    """The share of the ten nearest that the search for vectors finds."""
    matrix = index.state("bench").matrix
    everything, allowed, shares = np.arange(matrix.size), np.ones(matrix.size, np.bool_), []
    for vector in vectors:
        found, _ = matrix.nearest(vector, 10, allowed)
        nearest = np.argpartition(-matrix.cosines(vector, everything), 10)[:10]
        shares.append(len({*found.tolist()} & {*nearest.tolist()}) / 10)
    return float(np.mean(shares))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.retrieval", description=__doc__)
    parser.add_argument("--sizes", default="10000,100000,1000000", metavar="N,N")
    parser.add_argument("--vectors", type=Path, metavar="FILE", help="a .npy file: rows of real vectors")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(asyncio.run(measure(options.one, options.vectors))))
        return
    measured = []
    for size in map(int, options.sizes.split(",")):
        words = [sys.executable, "-m", "tests.bench.retrieval", "--one", str(size)]
        words += ["--vectors", str(options.vectors)] if options.vectors else []
        alone = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        measured.append(json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE, env=alone).stdout))
        print("  ".join(f"{name} {value:.4g}" for name, value in measured[-1].items()), flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
