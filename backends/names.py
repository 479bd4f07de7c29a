"""Equality of model names."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache


def key_of(name: str) -> str:
    """The canonical form of a name by Ollama's rules: case-insensitive; the tag `latest`, Ollama's own registry and its
    user `library` are optional."""
    key = name.lower().removeprefix("registry.ollama.ai/").removeprefix("library/")
    return key if ":" in key.rpartition("/")[2] else f"{key}:latest"


def other_forms(name: str) -> Sequence[str]:
    """The other spellings of `name` by these rules, apart from case, the closest first."""
    return _remembered_forms(name) if len(name) <= _REMEMBERED_LENGTH else _forms(name)


def _forms(name: str) -> Sequence[str]:
    short = name
    for prefix in ("registry.ollama.ai/", "library/"):
        if short.lower().startswith(prefix):
            short = short[len(prefix) :]
    forms = [_other_tag(name)]
    if short != name and short:
        forms += [short, _other_tag(short)]
    return tuple(form for form in forms if form != name)


_REMEMBERED_LENGTH = 200
_remembered_forms = lru_cache(maxsize=256)(_forms)


def _other_tag(name: str) -> str:
    """`name` without its tag `latest`, or with it; unchanged with any other tag."""
    if name.lower().endswith(":latest"):
        return name[: -len(":latest")]
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"
