"""What one request waited for on its way, as noted by those who let it wait."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol


class StepKind(StrEnum):
    """What a request went through."""

    QUEUE = "queue"  # a place for its model, or a free slot; `ahead`: how many requests, `behind`: their ids
    LOAD = "load"  # its model's server was starting; `model`
    DOWNLOAD = "download"  # the files of its model were fetched; `model`
    EVICT = "evict"  # a model was stopped for it; `model`, `why`
    AGENT = "agent"  # the own code of an agent; `agent`


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

    @property
    def request_id(self) -> str: ...
    def note(self, kind: StepKind, began_s: float, ended_s: float, **detail: Any) -> None:
        """Add one step. Times are seconds of `time.monotonic()`."""
