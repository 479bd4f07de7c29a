"""How many models llama-swap runs at one time, by its groups or its matrix."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from llama_smart_proxy.proxy.cli.importing.values import mapping, text, texts


def processes(models: Sequence[str], groups: Mapping[str, Any]) -> int:
    """The most processes at one time.

    Within a group with `swap` one member runs, otherwise all. An `exclusive` group unloads the others, but for
    persistent ones. Models without a group are in one with both. Source: llama-swap's config.example.yaml.
    """
    staying = shared = alone = 0
    grouped: set[str] = set()
    for group in map(mapping, groups.values()):
        members = [member for member in texts(group.get("members")) if member in models]
        grouped.update(members)
        count = min(1, len(members)) if group.get("swap", True) else len(members)
        if group.get("persistent"):
            staying += count
        elif group.get("exclusive", True):
            alone = max(alone, count)
        else:
            shared += count
    if set(models) - grouped:
        alone = max(alone, 1)
    return max(1, staying + shared + alone)


def staying(groups: Mapping[str, Any]) -> list[str]:
    """The models that no other one unloads: those of persistent groups whose members run together."""
    lasting = [
        group for group in map(mapping, groups.values()) if group.get("persistent") and not group.get("swap", True)
    ]
    return [member for group in lasting for member in texts(group.get("members"))]


def largest_set(matrix: Mapping[str, Any]) -> int:
    """The most models in one of the sets of a matrix: `&` runs them together, `|` one of them, `+name` is another set.

    An expression that cannot be read counts as one model. Source: llama-swap's config.example.yaml.
    """
    sets = {name: text(value) for name, value in mapping(matrix.get("sets")).items()}
    return max([1, *(_Expression(sets, (name,)).size(value) for name, value in sets.items())])


class _Expression:
    """An expression over models; `within` are the sets that it is a part of."""

    def __init__(self, sets: Mapping[str, str], within: tuple[str, ...]) -> None:
        self._sets = sets
        self._within = within
        self._tokens: list[str] = []

    def size(self, expression: str) -> int:
        self._tokens = re.findall(r"[&|()+]|[^\s&|()+]+", expression)[::-1]
        return self._any() if self._tokens else 0

    def _next(self, token: str) -> bool:
        """Whether that comes next; then it is taken."""
        found = bool(self._tokens) and self._tokens[-1] == token
        if found:
            self._tokens.pop()
        return found

    def _any(self) -> int:
        size = self._all()
        while self._next("|"):
            size = max(size, self._all())
        return size

    def _all(self) -> int:
        size = self._one()
        while self._next("&"):
            size += self._one()
        return size

    def _one(self) -> int:
        if self._next("("):
            size = self._any()
            self._next(")")
            return size
        refers = self._next("+")
        name = self._tokens.pop() if self._tokens else ""
        if not refers:
            return 1
        known = name in self._sets and name not in self._within
        return _Expression(self._sets, (*self._within, name)).size(self._sets[name]) if known else 1
