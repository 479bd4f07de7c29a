"""Problems of a configuration, and the paths of its fields."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

Loc = tuple[str | int, ...]
"""A path through mappings (by key) and lists (by position, from 0)."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem. The message never contains the value, which may be a secret."""

    loc: Loc
    message: str


def dotted(loc: Iterable[str | int]) -> str:
    """`("models", "a", "args", 0)` as `models.a.args.0`."""
    return ".".join(str(part) for part in loc)
