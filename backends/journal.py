"""What one request waited for on its way, as noted by those who let it wait."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol


class StepKind(StrEnum):
    """What a request went through."""

    QUEUE = "queue"  # a place for its `model`, or a free slot. `ahead`: how many requests waited before it, `behind`:
    # ids of those and of the ones that were served, `places`: the models that had the places, if it had none
    LOAD = "load"  # its model's server was starting; `model`
    DOWNLOAD = "download"  # the files of its model were fetched; `model`
    EVICT = "evict"  # a model was stopped for it; `model`, `why`
    RETRY = "retry"  # it was sent to its server once more; `why`
    AGENT = "agent"  # the own code of an agent, all of it; `agent`


@dataclass(frozen=True, slots=True)
class Step:
    """One wait. Times are seconds of `time.monotonic()`."""

    kind: StepKind
    began_s: float
    ended_s: float
    detail: Mapping[str, Any] = field(default_factory=dict)


class Journal(Protocol):
    """The journal of one request. A request that waits for nothing writes nothing but `sent_s`: when it was sent to its
    server, in seconds of `time.monotonic()`."""

    sent_s: float

    pending: Callable[[Journal], None] | None
    """Notes in a journal what the request waits for now; None if it waits for nothing."""

    @property
    def request_id(self) -> str: ...
    def note(self, kind: StepKind, began_s: float, ended_s: float, **detail: Any) -> None:
        """Add one step. Times are seconds of `time.monotonic()`."""


@contextmanager
def waiting(journal: Journal | None, note: Callable[[Journal], None]) -> Iterator[None]:
    """Within the context the request waits: `note` notes in a journal how, as far as it has."""
    if journal is None:
        yield
        return
    journal.pending = note
    try:
        yield
    finally:
        journal.pending = None
        note(journal)


def noted(journal: Journal | None, kind: StepKind, model: str) -> AbstractContextManager[None]:
    """Note how long the context takes, as a wait for `model`."""
    began_s = time.monotonic()
    return waiting(journal, lambda journal: journal.note(kind, began_s, time.monotonic(), model=model))


def note_now(journal: Journal | None, kind: StepKind, **detail: Any) -> None:
    """Note in the journal, if there is one, what takes no time."""
    if journal is not None:
        now = time.monotonic()
        journal.note(kind, now, now, **detail)
