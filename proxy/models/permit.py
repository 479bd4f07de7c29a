"""Which models exist for a client."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import lru_cache

from llama_smart_proxy.backends.names import key_of


@dataclass(frozen=True, slots=True)
class Permit:
    """The models whose name or alias matches one of `patterns`, in any spelling of it; None for all. `pulls`: also
    those that would be downloaded for their first use. `also` are names besides, for one request."""

    patterns: tuple[str, ...] | None
    pulls: bool
    also: frozenset[str] = frozenset()

    def including(self, name: str) -> Permit:
        """The same, and the model of this name: that of a virtual model, for its agents."""
        return replace(self, also=self.also | {name})

    def allows(self, names: Iterable[str]) -> bool:
        """Whether a model with these names exists for the client."""
        if self.patterns is None:
            return True
        return any(name in self.also or _matches(name, self.patterns) for name in names)


@lru_cache(maxsize=1024)
def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    forms = (name.lower(), key_of(name))
    return any(fnmatchcase(form, spelled) for given in patterns for spelled in _forms(given) for form in forms)


def _forms(pattern: str) -> set[str]:
    return {pattern.lower()} if any(sign in pattern for sign in "*?[") else {pattern.lower(), key_of(pattern)}
