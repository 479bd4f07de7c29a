"""Parses the slash commands at the beginning of a user's text. No I/O."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

_COMMAND = re.compile(r"/([A-Za-z][A-Za-z0-9_-]*)(?=\s|\Z)")
_OPTION = re.compile(r"([a-z][a-z0-9_]*)=(\"[^\"]*\"|\S+)(?=\s|\Z)")
_SPACE = re.compile(r"\s*")
MAX_ITEMS = 50
"""Most commands parsed from one text, and options of one command: bounds the time spent on a hostile text."""


@dataclass(slots=True)
class Command:
    """One command without its slash, in lower case, and its options as they were typed."""

    name: str
    options: dict[str, str] = field(default_factory=dict)


def leading_commands(text: str, known: Mapping[str, frozenset[str]]) -> tuple[list[Command], str]:
    """The commands that `text` begins with, and the rest of it.

    `known` maps each command, which is in lower case, to the names of its options; capitals in `text` make no
    difference. Parsing ends at the first word that is neither a known
    command nor an option of the previous command, or after `MAX_ITEMS`. A value in double quotes may contain spaces.
    """
    commands: list[Command] = []
    position = 0
    while len(commands) < MAX_ITEMS and (found := _COMMAND.match(text, position)):
        name = found[1].lower()
        if name not in known:
            break
        commands.append(Command(name))
        position = _skip_space(text, found.end())
        for _ in range(MAX_ITEMS):
            option = _OPTION.match(text, position)
            if option is None or option[1] not in known[name]:
                break
            commands[-1].options[option[1]] = _unquoted(option[2])
            position = _skip_space(text, option.end())
    return commands, text[position:] if commands else text


def first_command(text: str) -> str | None:
    """The command that `text` begins with, if it begins with what could be one, in lower case and without the slash."""
    found = _COMMAND.match(text)
    return found[1].lower() if found else None


def _unquoted(value: str) -> str:
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] == '"' else value


def _skip_space(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    return found.end() if found else position
