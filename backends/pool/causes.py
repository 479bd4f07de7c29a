"""Why a server did not start, from what it printed. No I/O."""

from __future__ import annotations

import re
from collections.abc import Sequence

_STAMP = re.compile(r"[\d.:,TZ \[\]-]{0,40}(?:[EWF] |(?:ERROR|FATAL|CRITICAL)\b[: ]*)")
_WHERE = re.compile(r"(?:\w{1,20} +)?[\w:<>~]{2,60}(?:\(\))?: +")
_FAILURE = re.compile(
    r"\b(?:error|fail(?:ed|ure)?|fatal|cannot|can't|could ?n[o']t|unable|invalid|unknown|unsupported|not supported|"
    r"no such|not found|out of memory|exception|abort(?:ed|ing)?|denied|refused|corrupt(?:ed)?|missing)\b|what\(\):",
    re.IGNORECASE,
)
_OPENING = re.compile(r"(?:error|fatal|what\(\))(?: loading model)?: +", re.IGNORECASE)
_FOLDERS = re.compile(r"(?<![\w.:/])(?:~|\.{1,2})?/(?:[^\s'\"/:]{1,255}/)*(?=[^\s'\"/:])")
MOST = 300
"""Most characters of a cause, and of a line that is looked at."""


def cause_in(lines: Sequence[str], echoes: re.Pattern[str] | None = None) -> str | None:
    """The cause of a failure in one sentence, without the folders of files; None if no line shows any.

    Servers report a failure from the inside out: the first line about a failure is its origin, the last
    one what came of it. Lines that `echoes` matches only repeat that something has failed.
    """
    failures = [text for line in lines if (text := _failure_in(line[:MOST])) and not (echoes and echoes.search(text))]
    if not failures:
        return None
    origin, outcome = failures[0], failures[-1]
    text = outcome if origin in outcome else origin if outcome in origin else f"{outcome}: {origin}"
    return _FOLDERS.sub("", text)[:MOST].rstrip(" .:")


def _failure_in(line: str) -> str:
    """The text of a line about a failure, without time, level and function; empty for any other line."""
    text = _STAMP.sub("", line.strip(), count=1)
    if not _FAILURE.search(text):
        return ""
    while (found := _WHERE.match(text)) is not None and not _OPENING.match(text):
        text = text[found.end() :]
    return _OPENING.sub("", text, count=1).strip()
