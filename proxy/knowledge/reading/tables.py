"""Tables of Markdown that are longer than a piece: each part gets the table's head, without which it says nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

RULE = re.compile(r"\|?[ \t]*:?-+:?(?:[ \t]*\|[ \t]*:?-+:?)*[ \t]*\|?")
HEAD = 3
"""A head of more than this fraction of a piece is not repeated."""


def long_tables(text: str, room: int) -> Iterator[tuple[str, str]]:
    """`text` in segments, each with the head that its parts are to begin with: empty, but for tables of more than
    `room` characters, whose rows are a segment without their head."""
    lines = text.split("\n")
    start = number = 0
    while number + 1 < len(lines):
        if not (_is_row(lines[number]) and "|" in lines[number + 1] and RULE.fullmatch(lines[number + 1].strip())):
            number += 1
            continue
        end = next((end for end in range(number + 2, len(lines)) if not _is_row(lines[end])), len(lines))
        head = "\n".join(lines[number : number + 2]) + "\n"
        if len(head) * HEAD <= room < sum(len(line) + 1 for line in lines[number:end]):
            yield from _segment(lines[start:number])
            yield from _rows(lines[number + 2 : end], head, room - len(head))
            start = end
        number = end
    yield from _segment(lines[start:])


def _is_row(line: str) -> bool:
    return line.lstrip().startswith("|")


def _segment(lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    text = "\n".join(lines).strip("\n")
    if text.strip():
        yield text, ""


def _rows(rows: Sequence[str], head: str, room: int) -> Iterator[tuple[str, str]]:
    """As many rows as fit, for each part."""
    held: list[str] = []
    size = 0
    for row in rows:
        if held and size + len(row) + 1 > room:
            yield "\n".join(held), head
            held, size = [], 0
        held.append(row)
        size += len(row) + 1
    if held:
        yield "\n".join(held), head
