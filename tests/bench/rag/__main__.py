"""`make eval-rag`: `--pieces N` searches N pieces in place of all, 0 only the small set; what is missing in
`build/rag-eval` is made, which for all pieces takes an hour of processor time, once."""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_smart_proxy.agents.rag.options import RagOptions
from llama_smart_proxy.proxy.knowledge.relevance import Calibration, Sample, measured
from tests.bench.rag.measure import COLLECTION, Floats, Pool, Question, Trigger, actions, auc, figures, methods, table
from tests.bench.rag.offtopic import QUESTIONS
from tests.bench.rag.pieces import HELD, POOL, TUNE, build, load
from tests.bench.rag.vectors import Vectors, served

FOLDER = Path(__file__).resolve().parents[3] / "build" / "rag-eval"
HALVES = {"all": (TUNE, HELD), "tuned on": (TUNE,), "held out": (HELD,)}
REPEATS = 60


class Evaluation:
    """Texts, their vectors and the questions, as far as they are measured."""

    def __init__(self, pieces: int) -> None:
        build(FOLDER)
        self._vectors = Vectors(FOLDER)
        self._chunks = load(FOLDER, "chunks")[:pieces]
        self._texts = [chunk["text"] for chunk in self._chunks]
        self._kept = [chunk["text"] for chunk in load(FOLDER, "kept")]
        self._questions = load(FOLDER, "questions")
        self._asked = self._vectors.of([question["question"] for question in self._questions])
        self.report: dict[str, Any] = {"pieces": len(self._texts), "questions": len(self._questions)}

    async def run(self) -> None:
        """Measure and print everything."""
        vectors = self._vectors.of(self._texts)
        pool = Pool(self._texts, vectors)
        await pool.fill()
        print(f"\n{len(self._texts)} pieces, {len(self._questions)} questions\n")
        await self._ranks(pool)
        await self._kept_ranks(vectors)
        await self._trigger(pool)
        await self._latency(pool)

    def _asking(self, field: str) -> list[Question]:
        pairs = zip(self._questions, self._asked, strict=True)
        return [Question(one["question"], vector, frozenset(one[field]), one["half"]) for one, vector in pairs]

    async def _ranks(self, pool: Pool) -> None:
        questions = self._asking("gold")
        ranks = await methods(pool, questions)
        for title, halves in HALVES.items():
            chosen = np.array([question.half in halves for question in questions])
            self._show(f"questions: {title}", {name: figures(found[chosen]) for name, found in ranks.items()})

    async def _kept_ranks(self, vectors: Floats) -> None:
        """With the question among the headings of its answer, as in the original documents."""
        others = max(max(question["gold"]) for question in self._questions) + 1
        texts = [*self._kept, *self._texts[others:]]
        pool = Pool(texts, np.concatenate([self._vectors.of(self._kept), vectors[others:]]))
        await pool.fill()
        ranks = await methods(pool, self._asking("kept"))
        self._show("headings kept", {name: figures(found) for name, found in ranks.items()})

    async def _trigger(self, pool: Pool) -> None:
        questions = self._asking("gold")
        off = [Question(text, vector, frozenset()) for text, vector in zip(QUESTIONS, self._of(QUESTIONS), strict=True)]
        calibration = await self._calibration(pool)
        trigger = Trigger(pool, calibration)
        held = [question for question in questions if question.half == HELD]
        answered, gone = await trigger.values(questions, gold=True), await trigger.values(questions, gold=False)
        away = await trigger.values(off, gold=True)
        held_in, held_out = await trigger.values(held, gold=True), await trigger.values(held, gold=False)
        rows = {
            name: {
                "off topic": auc(answered[name], away[name]),
                "answer removed": auc(answered[name], gone[name]),
                "the same, held out": auc(held_in[name], held_out[name]),
            }
            for name in answered
        }
        self._show(f"AUC, calibrated to {calibration.off:.2f} and {calibration.near:.2f}", rows)
        cuts = {"lower": RagOptions().lower, "upper": RagOptions().upper}
        kinds = {"answer there": answered, "answer removed": gone, "off topic": away}
        self._show("actions", {name: actions(found["confidence"], **cuts) for name, found in kinds.items()})

    async def _calibration(self, pool: Pool) -> Calibration:
        chance = np.random.default_rng(5)
        numbers = chance.choice(len(self._chunks), 60, replace=False).tolist()
        samples = [Sample(at, self._chunks[at]["heading"], self._chunks[at]["text"]) for at in numbers]
        return await measured(pool.index, COLLECTION, self, samples)

    async def _latency(self, pool: Pool) -> None:
        """The vector of a question by llama.cpp itself, and a search: without the proxy's share."""
        questions = self._asking("gold")[:REPEATS]
        embedding, searching = [], []
        with served(threads=2) as embed:
            for question in questions:
                began = time.perf_counter()
                embed([question.text])
                between = time.perf_counter()
                await pool.found(question)
                embedding.append((between - began) * 1e3)
                searching.append((time.perf_counter() - between) * 1e3)
        both = {"vector of the question": embedding, "search": searching}
        quantiles = {name: statistics.quantiles(found, n=20) for name, found in both.items()}
        self._show("ms", {name: {"p50": found[9], "p95": found[18]} for name, found in quantiles.items()})

    def _show(self, title: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
        self.report[title] = rows
        print(table(title, rows), end="\n\n", flush=True)

    def _of(self, texts: Sequence[str]) -> Floats:
        return self._vectors.of(texts)

    # an `Embedder` for the calibration

    async def identity(self) -> str:
        return "minilm"

    async def embed(self, texts: Sequence[str], *, background: bool = False) -> Floats:
        return self._of(texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pieces", type=int, default=10**9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    evaluation = Evaluation(max(POOL, args.pieces))
    asyncio.run(evaluation.run())
    if args.json:
        args.json.write_text(json.dumps(evaluation.report, indent=2))


main()
