"""What a client waits for as a part of the reasoning: how it is written, and removed from a chat that is sent again."""

from __future__ import annotations

STATUS_MARK = "\u23f3 "
"""The beginning of a line of reasoning that only describes the wait for the answer."""


def status_line(text: str) -> str:
    """The line for `text`."""
    return f"{STATUS_MARK}{' '.join(text.split())}\n"


def without_status(reasoning: str) -> str:
    """Reasoning without the lines that `status_line` has put in front of it."""
    while reasoning.startswith(STATUS_MARK):
        reasoning = reasoning.partition("\n")[2]
    return reasoning
