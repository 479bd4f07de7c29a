"""Command lines of llama-server as the fields of a model."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from llama_smart_proxy.proxy.config import spelled

_PROGRAM = re.compile(r"llama-server(?:[-_.].*)?")
_ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)
_PATH, _REPO, _FILE = {"-m", "--model"}, {"-hf", "-hfr", "--hf-repo"}, {"-hff", "--hf-file"}
_CTX, _PARALLEL = {"-c", "--ctx-size"}, {"-np", "--parallel"}
_OURS = {"--host", "--port", "-a", "--alias"}
"""Flags that the proxy sets itself."""
_KEYS = {"--api-key", "--api-key-file"}
_ELSEWHERE = {"-mu", "--model-url", "--models-dir", "--models-preset"}
"""Flags that say what is served in a way that no field of ours does."""
_BARE = re.compile(r"[A-Za-z0-9_@%+=:,./${}-]+")


class Block(str):
    """A text of several lines, for the writer."""


@dataclass
class Server:
    """A command line of llama-server: its program, and the model it serves as our fields; `keyed`: it was given an API
    key of its own."""

    program: str
    fields: dict[str, Any] = field(default_factory=dict)
    keyed: bool = False


def split(command: str) -> list[str]:
    """The words of a command of llama-swap. Raises: ValueError for a quote that is not closed."""
    lines = [line for line in command.split("\n") if not line.lstrip().startswith("#")]
    return shlex.split(re.sub(r"\\[ \t]*\n", " ", "\n".join(lines)), posix=True)


def joined(words: Sequence[str]) -> str:
    """`words` as one text that is split into them again, a flag with its values on a line."""
    lines: list[list[str]] = [[]]
    for word in words:
        if word.startswith("-") and lines[-1]:
            lines.append([])
        lines[-1].append(word if _BARE.fullmatch(word) else shlex.quote(word))
    text = "\n".join(" ".join(line) for line in lines)
    return Block(text + "\n") if len(lines) > 1 else text


def llama_server(words: Sequence[str]) -> Server | None:
    """What a command line serves, if its program is llama-server and our fields can say it; else None."""
    env, rest = _leading_env(words)
    if not rest or not _PROGRAM.fullmatch(rest[0].rpartition("/")[2]):
        return None
    server = Server(rest[0])
    args: list[str] = []
    for flag, value, raw in _flags(rest[1:]):
        if flag in _ELSEWHERE:
            return None
        if not _taken(server, flag, value):
            args += raw
    fields = server.fields
    if ("path" in fields) == ("repo" in fields) or (args and not args[0].startswith("-")):
        return None
    if args:
        fields["args"] = joined(args)
    if env:
        fields["env"] = env
    return server


def is_llama_server(words: Sequence[str]) -> bool:
    """Whether the program is llama-server."""
    _, rest = _leading_env(words)
    return bool(rest) and _PROGRAM.fullmatch(rest[0].rpartition("/")[2]) is not None


def _leading_env(words: Sequence[str]) -> tuple[dict[str, str], Sequence[str]]:
    """The variables of a command that begins with `env A=b`, and the rest of it."""
    if not words or words[0].rpartition("/")[2] != "env":
        return {}, words
    env: dict[str, str] = {}
    for number, word in enumerate(words[1:], 1):
        found = _ASSIGNMENT.fullmatch(word)
        if found is None:
            return env, words[number:]
        env[found[1]] = found[2]
    return env, ()


def _flags(words: Sequence[str]) -> Iterator[tuple[str, str | None, list[str]]]:
    """Each flag of interest with its value, and what is written for both; any other word without a value."""
    position = 0
    known = _PATH | _REPO | _FILE | _CTX | _PARALLEL | _OURS | _KEYS | _ELSEWHERE
    while position < len(words):
        word = words[position]
        name, equals, value = word.partition("=")
        flag = spelled(name)
        position += 1
        if flag not in known:
            yield "", None, [word]
        elif equals:
            yield flag, value, [word]
        elif position < len(words):
            yield flag, words[position], [word, words[position]]
            position += 1
        else:
            yield flag, None, [word]


def _taken(server: Server, flag: str, value: str | None) -> bool:
    """Whether the flag is in our fields now, or needs none."""
    fields = server.fields
    if value is None or not flag:
        return False
    if flag in _PATH:
        fields["path"] = value
    elif flag in _REPO:
        fields["repo"], _, variant = value.partition(":")
        if variant:
            fields.setdefault("variant", variant)
    elif flag in _FILE:
        fields["variant"] = value
    elif flag in _CTX | _PARALLEL:
        if not value.isdecimal() or (flag in _PARALLEL and not int(value)):
            return False
        fields["ctx" if flag in _CTX else "parallel"] = int(value)
    server.keyed |= flag in _KEYS
    return True
