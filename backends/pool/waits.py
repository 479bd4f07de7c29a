"""What a request of the pool waits for, in one line for the person who waits. Computed only when it is read."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from llama_smart_proxy.backends.pool.instance import State
from llama_smart_proxy.backends.pool.load_times import LoadTimes
from llama_smart_proxy.backends.pool.queue import ModelQueue, Place, Waiter
from llama_smart_proxy.backends.progress import timed
from llama_smart_proxy.proxy.config import PoolConfig

NAMED = 2
"""Most models that one line names."""


class Standing(Protocol):
    """What there is besides the queue of the request: the scheduler."""

    config: PoolConfig
    queues: dict[str, ModelQueue]

    def rivals(self, queue: ModelQueue) -> list[Place]: ...


@dataclass(frozen=True, slots=True)
class Wait:
    """What `waiter` waits for; a description for `Progress.waits`."""

    waiter: Waiter
    queue: ModelQueue
    standing: Standing
    times: LoadTimes

    def __call__(self) -> str:
        now = asyncio.get_running_loop().time()
        place, spent_s = self.queue.place, now - self.waiter.since
        if place is not None and place.state is State.STARTING:
            return self._loading(place)
        if place is not None and place.open:
            before = self.queue.ahead(self.waiter) + 1
            return timed(f"Waiting, {before} before you", spent_s, _turn_s(place, before, now))
        load_s = self.times.typical_s(self.queue.name)
        places = self.standing.rivals(self.queue)
        if place is not None:  # it makes room for another one
            first = [
                queue
                for queue in self.standing.queues.values()
                if queue.length and queue.cold and queue.helper is self.queue.helper
            ]
            if rivals := [queue for queue in first if queue is not self.queue]:
                return timed(f"Waiting for a place: {self._named(rivals, 'comes', 'come')} first", spent_s)
        elif not any(map(_makes_room, places)):
            busy = [place for place in places if not place.pinned]
            left = [self._end_s(place, now) for place in busy]
            left_s = min((seconds for seconds in left if seconds is not None), default=None)
            queues = [place.queue for place in busy]
            known_s = left_s + load_s if left_s is not None and load_s is not None else None
            return timed(f"Waiting for a place: {self._named(queues, 'is', 'are')} busy", spent_s, known_s)
        return timed(f"Loading {self.queue.shown}", spent_s, load_s)

    def _loading(self, place: Place) -> str:
        instance, name = place.instance, self.queue.shown
        spent_s = instance.loading_s
        load_s = self.times.typical_s(self.queue.name, instance.size_bytes)
        share = f": {100 * instance.share:.0f} %" if instance.share is not None else ""
        return timed(f"Loading {name}{share}", spent_s, load_s - spent_s if load_s is not None else None)

    def _named(self, queues: Sequence[ModelQueue], one: str, several: str) -> str:
        """The models with their verb; their names only if all of them may be named to the client."""
        progress = self.waiter.request.progress
        if len(queues) > NAMED or (progress is not None and not all(progress.shows(queue.name) for queue in queues)):
            return f"{len(queues)} models {several}" if len(queues) > 1 else f"another model {one}"
        return f"{' and '.join(queue.shown for queue in queues)} {one if len(queues) == 1 else several}"

    def _end_s(self, place: Place, now: float) -> float | None:
        """Seconds until a process in use is idle and can make room; None if that is unknown."""
        if place.state is not State.READY or place.queue.request_s is None:
            return None
        left_s = max((slot.since + place.queue.request_s - now for slot in place.slots if slot.busy), default=0.0)
        if place.open and place.awaited:  # it goes on with its own queue for a while
            since = max(place.ready_at, self.queue.starved_since)
            left_s += max(0.0, since + self.standing.config.swap_after_s - now)
        return max(0.0, left_s)


def _turn_s(place: Place, before: int, now: float) -> float | None:
    """Seconds until so many of the requests before have ended; None if it is unknown how long they take."""
    typical_s = place.queue.request_s
    if typical_s is None:
        return None
    ends_s = min((slot.since + typical_s - now for slot in place.slots if slot.busy), default=0.0)
    return max(0.0, ends_s) + (before - 1) * typical_s / max(1, len(place.slots))


def _makes_room(place: Place) -> bool:
    return place.state is State.STOPPING or not (place.pinned or place.leases or place.awaited)
