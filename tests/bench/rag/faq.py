"""The questions: those of perlfaq1 to 9 and of Python's FAQ, each with its answer as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.bench.rag.pod import as_markdown, inline
from tests.bench.rag.sources import FAQS, RST

SHORTEST = 80
"""Characters; shorter answers only refer to others."""
UNDERLINE = re.compile(r"^([=\-~^\"*])\1{3,}$")
DIRECTIVE = re.compile(r"^\.\. (?:only|contents|index|_).*\n(?:[ \t]+.*\n|\n(?=[ \t]))*", re.MULTILINE)
ROLE = re.compile(r":[a-z:+-]+:`([^`<]*?)\s*(?:<[^`>]*>)?`")


@dataclass(frozen=True)
class Entry:
    """A question with its answer: the document, the headings above the question, and the answer's Markdown."""

    document: str
    headings: tuple[str, ...]
    question: str
    answer: str

    def markdown(self, *, with_question: bool) -> str:
        """A document of its own, that has this answer alone."""
        headings = [*self.headings, *([self.question] if with_question else [])]
        lines = [f"{'#' * (level + 1)} {heading}" for level, heading in enumerate(headings)]
        return "\n\n".join([*lines, self.answer]) + "\n"


def entries(root: Path) -> list[Entry]:
    """All of them whose answers say something, without the questions in any answer."""
    found = [entry for path in sorted(root.glob(FAQS)) for entry in _of_pod(path)]
    found += [entry for path in sorted(root.glob(RST)) for entry in _of_rst(path)]
    found = [entry for entry in found if len(entry.answer) >= SHORTEST]
    words = [r"\s+".join(map(re.escape, entry.question.split())) for entry in found]
    asked = re.compile("|".join(sorted(words, key=len, reverse=True)), re.IGNORECASE)
    return [Entry(one.document, one.headings, one.question, asked.sub("", one.answer)) for one in found]


def _of_pod(path: Path) -> Iterator[Entry]:
    text = path.read_text(encoding="utf-8", errors="replace")
    name = re.search(r"^=head1 NAME\n\n(?:\S+ - )?(.*)", text, re.MULTILINE)
    title = f"{path.stem}: {name[1]}" if name else path.stem
    parts = re.split(r"^=head([12]) +((?:.+\n)+)", text, flags=re.MULTILINE)
    section = ""
    for level, heading, body in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        if level == "1":
            section = inline(heading).strip()
        else:
            headings = tuple(text for text in (title, section) if text and section != "DESCRIPTION")
            yield Entry(path.name, headings or (title,), " ".join(inline(heading).split()), as_markdown(body).strip())


def _of_rst(path: Path) -> Iterator[Entry]:
    lines = DIRECTIVE.sub("", path.read_text(encoding="utf-8")).splitlines()
    marks: list[str] = []
    above: list[str] = []
    question, body = "", list[str]()
    lines += ["", ""]
    for number, line in enumerate(lines):
        following = lines[number + 1] if number + 1 < len(lines) else ""
        is_title = bool(line.strip()) and UNDERLINE.match(following) and len(following) >= len(line.rstrip())
        if UNDERLINE.match(line) or (not is_title and number < len(lines) - 1):
            body += [] if UNDERLINE.match(line) else [line]
            continue
        if question.endswith("?"):
            yield Entry(f"python-{path.name}", tuple(above[:-1]), question, _plain("\n".join(body)).strip())
        mark = lines[number - 1][:1] * 2 if number and UNDERLINE.match(lines[number - 1]) else following[:1]
        if mark not in marks:
            marks.append(mark)
        depth = marks.index(mark)
        question, body = _plain(line).strip(), []
        above = [*above[:depth], question]


def _plain(rst: str) -> str:
    return ROLE.sub(r"`\1`", rst).replace("``", "`").replace("::\n", ":\n")
