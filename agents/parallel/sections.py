"""Several answers under headings, in one Markdown text that grows at its end."""

from __future__ import annotations

import re
from collections.abc import Sequence

from llama_smart_proxy.agents.parallel.members import Member

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})(.*)")


class Sections:
    """Who speaks first is shown live. Then comes who has begun by then, from its start and on, live again; last, those
    that failed without a word. Nothing that one leaves open reaches into the section of another."""

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = members
        self._shown: list[Member] = []

    def add(self, member: Member, text: str) -> str:
        """What is to be shown now that `text` was added to the answer of `member`."""
        if not self._shown:
            return self._show(member)
        return text if member is self._shown[-1] else ""

    def done(self, member: Member) -> str:
        """What is to be shown now that `member` is done."""
        shown = _failure(member) if self._shown and member is self._shown[-1] else ""
        while not self._shown or self._shown[-1].done:
            begun = (other for other in self._members if other not in self._shown and other.pieces)
            if (following := next(begun, None)) is None:
                break
            shown += self._show(following)
        return shown

    def end(self) -> str:
        """What is to be shown when all are done."""
        return "".join(self._show(member) for member in self._members if member not in self._shown)

    def _show(self, member: Member) -> str:
        """Its heading, and its answer so far."""
        before = f"{_left_open(self._shown[-1])}\n\n" if self._shown else ""
        self._shown.append(member)
        failure = _failure(member) if member.done else ""
        return f"{before}### {member.label}\n\n" + "".join(member.pieces) + failure


def _left_open(member: Member) -> str:
    """What is to be closed behind its section; in front of its failure that was done already."""
    return closing("".join(member.pieces)) if member.failure is None else ""


def _failure(member: Member) -> str:
    if member.failure is None:
        return ""
    text = "".join(member.pieces)
    return f"{closing(text)}\n\n*{member.failure.message}*" if text else f"*{member.failure.message}*"


def closing(text: str) -> str:
    """The line that ends the block of code in which `text` ends, if it does."""
    fence = ""
    for line in text.splitlines():
        if (found := _FENCE.fullmatch(line)) is None:
            continue
        if not fence:
            fence = found[1]
        elif found[1].startswith(fence) and not found[2].strip():
            fence = ""
    return f"\n{fence}" if fence else ""
