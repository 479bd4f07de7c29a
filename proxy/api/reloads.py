"""How the last reload of the configuration ended, and how another one is begun."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a reload ended: with `problems`, and nothing has changed; or else with what has."""

    problems: Sequence[str] = ()
    changes: Mapping[str, Any] = field(default_factory=dict)


async def _cannot(cause: str) -> Outcome:
    return Outcome(["this proxy has no configuration to read again"])


@dataclass(slots=True)
class Reloads:
    """The reloads of the running proxy. `problems` are those of the last one, each `file: path: problem`; empty if the
    configuration in use is the one in the file, as far as known. `reload` begins one, and is called with its cause."""

    problems: Sequence[str] = ()
    reload: Callable[[str], Awaitable[Outcome]] = _cannot
