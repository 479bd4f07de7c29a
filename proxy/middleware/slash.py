"""Slash commands: the words with a slash that a user's text begins with. No I/O."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

_COMMAND = re.compile(r"/([a-z][a-z0-9_-]*)(?=\s|\Z)")
_OPTION = re.compile(r"([a-z][a-z0-9_]*)=(\"[^\"]*\"|\S+)(?=\s|\Z)")
_SPACE = re.compile(r"\s*")
MOST = 50
"""Commands taken from one text, and options from one command: a text of nothing else must not keep the process."""


@dataclass(slots=True)
class Called:
    """One command, and the options behind it as they were typed."""

    command: str
    options: dict[str, str] = field(default_factory=dict)


def leading_commands(text: str, known: Mapping[str, frozenset[str]]) -> tuple[list[Called], str]:
    """The commands that `text` begins with, and what is left of it.

    `known` has the names of options for each command. The first word that is neither a known command nor an option of
    the command before it ends them, and so does the one over `MOST`: it and all after it is the text. A value in double
    quotes may hold spaces.
    """
    called: list[Called] = []
    place = 0
    while len(called) < MOST and (found := _COMMAND.match(text, place)) and found[1] in known:
        called.append(Called(found[1]))
        place = _behind_space(text, found.end())
        for _ in range(MOST):
            option = _OPTION.match(text, place)
            if option is None or option[1] not in known[found[1]]:
                break
            called[-1].options[option[1]] = _unquoted(option[2])
            place = _behind_space(text, option.end())
    return called, text[place:] if called else text


def _unquoted(value: str) -> str:
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] == '"' else value


def _behind_space(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    return found.end() if found else place
