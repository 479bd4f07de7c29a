"""The sentences of a passage: what one of the decisions about its relevance is about."""

from __future__ import annotations

import re
from collections.abc import Iterator

FENCE = re.compile(r"\A[ \t]*(```+|~~~+)")
ITEM = re.compile(r"[ \t]*(?:[-*+•]|\d{1,3}[.)])[ \t]")
ALONE = re.compile(r"[ \t]*(?:#{1,6}[ \t]|\||>)")
"""Starts of lines that go on in no other line: headings, rows of tables, quotations."""
END = re.compile(
    r"(?<=[.!?\u2026])[\"'\u201d\u2019)\]]*\s+(?=[\"'\u201c\u2018(\[]*[^\W_a-z])|(?<=[\u3002\uff01\uff1f])"
)
ABBREVIATION = re.compile(
    r"(?:^|[\s(])(?:[A-Za-z]|e\.g|i\.e|etc|vs|cf|ca|approx|resp|incl|fig|figs|eq|sec|ch|no|nos|vol|pp|ed|eds|al|"
    r"mr|mrs|ms|dr|prof|st|jr|sr|inc|ltd|co|corp|dept|est|jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec)\.$",
    re.IGNORECASE,
)
SHORT = 12
"""A sentence of less bytes of UTF-8 ("Yes.", "See below.") says nothing alone; it stays with its neighbour."""


def strips(text: str) -> list[str]:
    """The sentences, list items, rows of tables, lines of headings and whole code blocks of `text`, in order, each on
    lines as they were; without blank ones. Takes time in proportion to its length."""
    found: list[str] = []
    for block in _blocks(text):
        found += [block] if FENCE.match(block) or ALONE.match(block) else _sentences(block)
    return found


def _blocks(text: str) -> Iterator[str]:
    """Paragraphs, list items, single lines, and code blocks."""
    held: list[str] = []
    fence = ""
    for line in text.split("\n"):
        mark = FENCE.match(line)
        if fence:
            held.append(line)
            if mark and mark[1].startswith(fence):
                fence = ""
                yield "\n".join(held)
                held = []
            continue
        alone = ALONE.match(line)
        if held and (mark or alone or not line.strip() or ITEM.match(line)):
            yield "\n".join(held)
            held = []
        if alone:
            yield line.strip()
        elif line.strip():
            held.append(line)
            fence = mark[1] if mark else ""
    if held:
        yield "\n".join(held)


def _sentences(block: str) -> list[str]:
    found: list[str] = []
    start = 0
    for end in END.finditer(block):
        if _is_short(block[start : min(end.start(), start + 2 * SHORT)]) or _is_abbreviated(block, end.start()):
            continue
        found.append(block[start : end.end()].strip())
        start = end.end()
    rest = block[start:].strip()
    if found and _is_short(rest):
        found[-1] += f" {rest}" if rest else ""
    elif rest:
        found.append(rest)
    return found


def _is_short(text: str) -> bool:
    return len(text.strip().encode("utf-8", "surrogatepass")) < SHORT


def _is_abbreviated(block: str, end: int) -> bool:
    return bool(ABBREVIATION.search(block[max(0, end - 12) : end]))
