"""What a request waited for in the pool, as its journal has it: noted once it waits no more, computed from what there
is then."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain, islice
from typing import Self

from llama_smart_proxy.backends.base import UpstreamRequest
from llama_smart_proxy.backends.journal import Journal, StepKind, note_now, waiting
from llama_smart_proxy.backends.pool.instance import State
from llama_smart_proxy.backends.pool.queue import ModelQueue, Place

MOST_NAMED = 10
"""Most requests that one step names."""
SHORTEST_S = 0.005
"""What took less was no wait."""


@dataclass(frozen=True, slots=True)
class _Wait:
    """How things were when a request began to wait: how many requests were before it, the ids of the first of them as
    far as they have any, and which models had the places of the pool if its own had none."""

    queue: ModelQueue
    began_s: float
    ahead: int
    behind: Sequence[str]
    places: Sequence[str]

    @classmethod
    def of(cls, queue: ModelQueue, places: Sequence[Place], request: UpstreamRequest) -> Self:
        waiters = queue.waiters(request)
        people = queue.slot_waiters if waiters is queue.later_waiters else {}
        before = (waiter.request for waiter in chain(people, waiters))
        occupied = places if queue.cold else [place for place in places if place.queue is queue]
        ids = filter(None, map(_id_of, chain(_served(occupied), before)))
        others = [place.queue.name for place in places] if queue.cold else []
        return cls(queue, time.monotonic(), len(people) + len(waiters), [*islice(ids, MOST_NAMED)], others)

    def note(self, journal: Journal) -> None:
        """Note the wait up to now: the start of the model's server as far as the request waited for it, and the queue
        before and after that."""
        now = time.monotonic()
        begins_s, ends_s = _load(self.queue, self.began_s, now)
        self._note_queue(journal, self.began_s, begins_s, self.places)
        if ends_s - begins_s >= SHORTEST_S:
            journal.note(StepKind.LOAD, begins_s, ends_s, model=self.queue.name)
        self._note_queue(journal, ends_s, now, [])  # it had a place by then

    def _note_queue(self, journal: Journal, began_s: float, ended_s: float, places: Sequence[str]) -> None:
        if ended_s - began_s >= SHORTEST_S:
            detail = {"ahead": self.ahead, "behind": self.behind, "places": places}
            journal.note(StepKind.QUEUE, began_s, ended_s, model=self.queue.name, **detail)


def note_load_begin(queue: ModelQueue) -> None:
    """A start of the model's server begins."""
    queue.load_began_s, queue.load_ended_s = time.monotonic(), math.inf


def note_load_end(queue: ModelQueue) -> None:
    """That start has ended, if it had not yet."""
    queue.load_ended_s = min(queue.load_ended_s, time.monotonic())


def journaled(queue: ModelQueue, places: Sequence[Place], request: UpstreamRequest) -> AbstractContextManager[None]:
    """Within the context `request` waits in `queue`, to which it is about to be added. Its journal, if it has one, gets
    what it waited for."""
    journal = request.journal
    return waiting(journal, _Wait.of(queue, places, request).note) if journal is not None else nullcontext()


def note_eviction(queue: ModelQueue, victim: Place, now: float) -> None:
    """Note that `victim` is stopped for the requests of `queue`; `now` is the time of the event loop."""
    why = _why(victim, now)
    for waiter in queue.waiting():
        note_now(waiter.request.journal, StepKind.EVICT, model=victim.queue.name, why=why)


def _why(victim: Place, now: float) -> str:
    if victim.draining:
        return f"it had accepted no more requests for {now - victim.closed_since:.1f} s, as other models waited"
    if victim.state is State.STARTING:
        return "it was loading, and no request waited for it any more"
    return f"it was the least recently used idle model, unused for {now - victim.released_at:.1f} s"


def _load(queue: ModelQueue, began_s: float, now: float) -> tuple[float, float]:
    """The part of the time from `began_s` to `now` in which the model's server was starting; none of it, at its end, if
    there is no such part."""
    begins_s, ends_s = max(began_s, queue.load_began_s), min(now, queue.load_ended_s)
    return (begins_s, ends_s) if begins_s < ends_s else (now, now)


def _served(places: Sequence[Place]) -> Iterator[UpstreamRequest]:
    """The requests that occupy slots there."""
    busy = (slot for place in places for slot in place.slots if slot.busy and slot.since)
    return (slot.last for slot in busy if slot.last is not None)


def _id_of(request: UpstreamRequest) -> str:
    return request.journal.request_id if request.journal is not None else ""
