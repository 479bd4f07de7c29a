"""The pieces that are searched, made by the reader of the knowledge base, and the questions with their answers.

`chunks.jsonl`: a piece in each line, first those of all answers, then others up to `POOL`, then all the rest.
`kept.jsonl`: the pieces of the answers once more, with the question among their headings.
`questions.jsonl`: `question`, `gold` and `kept` (the numbers of its answer's lines in these two files), and `half`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from llama_smart_proxy.proxy.knowledge.base import Chunking, Unreadable
from llama_smart_proxy.proxy.knowledge.reading.documents import pieces_of
from tests.bench.rag.faq import Entry, entries
from tests.bench.rag.pod import as_markdown
from tests.bench.rag.sources import documents, unpack

POOL = 5760
"""Pieces of the small set: those of all answers, and others by chance."""
TUNE, HELD = "tune", "held"
"""What is chosen by measurement is chosen by the first half, and reported for both."""
GRAM = 3
"""Words by which a question is recognised at first; no question is shorter."""
WORKERS = 2


def build(folder: Path, report: Callable[[str], None] = print) -> None:
    """Write the three files, if they are not there."""
    if all((folder / f"{name}.jsonl").exists() for name in ("chunks", "kept", "questions")):
        return
    root = unpack(folder)
    asked = list({entry.question: entry for entry in reversed(entries(root))}.values())[::-1]
    report(f"{len(asked)} questions; reading the documents ...")
    chunks, gold = _of_answers(asked, with_question=False)
    kept, kept_gold = _of_answers(asked, with_question=True)
    known = {chunk["text"] for chunk in chunks}
    lists = Lists(entry.question for entry in asked)
    others = []
    with ProcessPoolExecutor(WORKERS) as pool:
        for found in pool.map(_of_document, list(map(str, documents(root))), chunksize=8):
            for chunk in found:
                if chunk["text"] not in known and not lists.has(chunk["text"]):
                    known.add(chunk["text"])
                    others.append(chunk)
    others.sort(key=lambda chunk: _chance(chunk["text"]))
    chunks += others
    questions = [
        {"question": entry.question, "gold": gold[at], "kept": kept_gold[at], "half": _half(entry.question)}
        for at, entry in enumerate(asked)
    ]
    for name, rows in (("chunks", chunks), ("kept", kept), ("questions", questions)):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    report(f"{len(chunks)} pieces, {len(kept)} of them of answers")


class Lists:
    """Recognises pieces that contain a question, such as tables of contents: they would be found, not the answers."""

    def __init__(self, questions: Iterable[str]) -> None:
        self._questions: dict[tuple[str, ...], list[str]] = {}
        for question in questions:
            words = _words(question)
            self._questions.setdefault(tuple(words[:GRAM]), []).append(" ".join(words))

    def has(self, text: str) -> bool:
        """Whether a question is in it, regardless of case, spaces and punctuation."""
        words = _words(text)
        found = {gram for gram in zip(*(words[at:] for at in range(GRAM)), strict=False) if gram in self._questions}
        line = f" {' '.join(words)} "
        return any(f" {question} " in line for gram in found for question in self._questions[gram])


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def load(folder: Path, name: str) -> list[dict[str, Any]]:
    """The lines of one of the files."""
    with (folder / f"{name}.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _of_answers(asked: Iterable[Entry], *, with_question: bool) -> tuple[list[dict[str, str]], list[list[int]]]:
    """The pieces of all answers, each read as a document of its own, and for each answer their numbers."""
    chunks: list[dict[str, str]] = []
    numbers = []
    for entry in asked:
        name = entry.document.removesuffix(".txt").rpartition(".")[0] + ".md"
        found = _pieces(entry.markdown(with_question=with_question).encode(), name, entry.document)
        numbers.append([*range(len(chunks), len(chunks) + len(found))])
        chunks += found
    return chunks, numbers


def _of_document(path: str) -> list[dict[str, str]]:
    file = Path(path)
    if file.suffix == ".pod":
        text = as_markdown(file.read_text(encoding="utf-8", errors="replace"))
        return _pieces(text.encode(), file.with_suffix(".md").name, file.name)
    return _pieces(file.read_bytes(), file.name, "/".join(file.parts[-3:]))


def _pieces(content: bytes, name: str, file: str) -> list[dict[str, str]]:
    try:
        return [
            {"file": file, "heading": piece.heading, "text": piece.text}
            for piece in pieces_of(content, name, "", Chunking())
        ]
    except Unreadable:
        return []


def _half(question: str) -> str:
    return HELD if _chance(question) % 2 else TUNE


def _chance(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
