"""`kb eval`: how well a collection answers questions whose answers are known."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.cli.remote import Remote, RemoteError, at
from llama_smart_proxy.proxy.cli.tables import NONE, print_json, print_table

DEPTH = 10
"""Passages that are looked at for each question."""


@dataclass(frozen=True)
class Question:
    """A question, and what a right passage has: the name, path, URL or id of its document, a text in it, or both. One
    with neither has no answer in the collection."""

    text: str
    document: str = ""
    answer: str = ""

    @property
    def has_answer(self) -> bool:
        return bool(self.document or self.answer)

    def rank(self, results: Sequence[Json]) -> int:
        """The place of the first right passage, from 1; 0 if there is none."""
        return next((place for place, result in enumerate(results, 1) if self._is_right(result)), 0)

    def _is_right(self, result: Json) -> bool:
        source = result["x_source"]
        is_document = self.document in (result["filename"], result["file_id"], source)
        is_document = not self.document or is_document or source.endswith(f"/{self.document}")
        return is_document and _plain(self.answer) in _plain(result["content"][0]["text"])


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def eval_command(proxy: Remote, args: argparse.Namespace) -> int:
    """Ask all questions of `args.file`, and print how they were answered. Returns the exit status. Raises:
    RemoteError."""
    path = at("v1", "vector_stores", args.collection, "search")
    ranks: list[int] = []
    found: list[float] = []
    missed: list[float] = []
    for question in questions(args.file):
        answer: Any = proxy.ask("POST", path, {"query": question.text, "max_num_results": DEPTH})
        rank = question.rank(answer["data"]) if question.has_answer else 0
        (found if rank else missed).append(answer["x_confidence"])
        if question.has_answer:
            ranks.append(rank)
    measured = measures(ranks, found, missed)
    if args.json:
        print_json(measured)
        return 0
    rows = [[name, NONE if value is None else f"{value:g}"] for name, value in measured.items()]
    print_table(["MEASURE", "VALUE"], rows, right="VALUE")
    return 0


def questions(path: str) -> Iterator[Question]:
    """Those of a file of lines of JSON. Raises: RemoteError for one that is none."""
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _question(line, f"{path}:{number}")
    except (OSError, UnicodeDecodeError) as exc:
        raise RemoteError(f"{path}: {getattr(exc, 'strerror', None) or exc}", 2) from exc


def _question(line: str, where: str) -> Question:
    try:
        value = json.loads(line)
    except ValueError as exc:
        raise RemoteError(f"{where}: is no line of JSON: {exc}", 2) from None
    fields = [value.get(name) or "" for name in ("question", "document", "answer")] if isinstance(value, dict) else [""]
    if not fields[0] or not all(isinstance(item, str) for item in fields):
        raise RemoteError(f'{where}: must be {{"question": TEXT, "document": NAME}} or with "answer": TEXT', 2)
    return Question(*fields)


def measures(ranks: Sequence[int], found: Sequence[float], missed: Sequence[float]) -> dict[str, float | None]:
    """Hit rates and the mean reciprocal rank of questions that have an answer, 0 for a rank of 0; the mean confidence
    of searches that have found it, and of all others, and how well it separates them (AUC)."""
    hits = {f"hit@{most}": _mean([0 < rank <= most for rank in ranks]) for most in (1, 5, 10)}
    return {
        "questions": len(found) + len(missed),
        **hits,
        "mrr": _mean([1 / rank if rank else 0.0 for rank in ranks]),
        "confidence_found": _mean(found),
        "confidence_missed": _mean(missed),
        "confidence_auc": _auc(found, missed),
    }


def _mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None


def _auc(above: Sequence[float], below: Sequence[float]) -> float | None:
    """How often one of `above` is greater than one of `below`; equal ones count half."""
    if not above or not below:
        return None
    wins = sum((high > low) + (high == low) / 2 for high in above for low in below)
    return round(wins / (len(above) * len(below)), 4)
