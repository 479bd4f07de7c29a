"""The list of sources below an answer: how it is written, and removed from a chat that is sent again."""

from __future__ import annotations

import re
from collections.abc import Iterable

SOURCES_MARK = "\n\n\U0001f4da Sources:\n"
"""Above the list."""
_LINES = re.compile(r"(?:- \[\d+\] [^\n]*(?:\n+|\Z))+")


def sources_list(lines: Iterable[str]) -> str:
    """The text for these lines, each of which begins with a number in square brackets."""
    return SOURCES_MARK + "\n".join(f"- {' '.join(line.split())}" for line in lines)


def may_have_sources(text: str) -> bool:
    """Whether the last line of a text looks like one of such a list. Cheap; True may be a false positive."""
    return text.startswith("- [", text.rfind("\n", 0, -1) + 1)


def without_sources(text: str) -> str:
    """A text without the list that `sources_list` has put below it."""
    before, mark, after = text.rpartition(SOURCES_MARK)
    return before if mark and _LINES.fullmatch(after) else text
