"""Formats several answers under headings, as one Markdown text that is only appended to."""

from __future__ import annotations

import re
from collections.abc import Sequence

from llama_smart_proxy.agents.parallel.members import Member

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})(.*)")


class Sections:
    """Sections in the order of their first text. The first member is streamed; when it is done, the next one that has
    begun follows, with its text so far, and is streamed; members that failed without text come last. A code block that
    one section leaves open is closed before the next."""

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = members
        self._shown: list[Member] = []

    def add(self, member: Member, text: str) -> str:
        """The text to append after `text` was added to the answer of `member`."""
        if not self._shown:
            return self._show(member)
        return text if member is self._shown[-1] else ""

    def done(self, member: Member) -> str:
        """The text to append after `member` is done."""
        shown = _failure(member) if self._shown and member is self._shown[-1] else ""
        while not self._shown or self._shown[-1].done:
            begun = (other for other in self._members if other not in self._shown and other.pieces)
            if (following := next(begun, None)) is None:
                break
            shown += self._show(following)
        return shown

    def end(self) -> str:
        """The text to append when all are done."""
        return "".join(self._show(member) for member in self._members if member not in self._shown)

    def _show(self, member: Member) -> str:
        """The heading of `member`, and its answer so far."""
        before = f"{_left_open(self._shown[-1])}\n\n" if self._shown else ""
        self._shown.append(member)
        failure = _failure(member) if member.done else ""
        return f"{before}### {member.label}\n\n" + "".join(member.pieces) + failure


def _left_open(member: Member) -> str:
    """The end of a code block that its section leaves open; with a failure, that was closed before the message."""
    return closing("".join(member.pieces)) if member.failure is None else ""


def _failure(member: Member) -> str:
    if member.failure is None:
        return ""
    text = "".join(member.pieces)
    return f"{closing(text)}\n\n*{member.failure.message}*" if text else f"*{member.failure.message}*"


def closing(text: str) -> str:
    """The fence that closes the code block in which `text` ends; empty if it does not end in one."""
    fence = ""
    for line in text.splitlines():
        if (found := _FENCE.fullmatch(line)) is None:
            continue
        if not fence:
            fence = found[1]
        elif found[1].startswith(fence) and not found[2].strip():
            fence = ""
    return f"\n{fence}" if fence else ""
