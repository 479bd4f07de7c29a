"""When work in the background (`Priority.BATCH`, such as the vectors of new documents) goes on: between the requests of
people, for any model of the pool, as they share the machine."""

from __future__ import annotations

from collections.abc import Iterable

from llama_smart_proxy.backends.base import Priority
from llama_smart_proxy.backends.pool.queue import ModelQueue, Place

PATIENCE_S = 2.0
"""So long a batch waits for people; then it is sent all the same, so that the work ends some day."""


def may_begin(place: Place, places: Iterable[Place], queues: Iterable[ModelQueue], waited_s: float) -> bool:
    """Whether a batch that has waited for `waited_s` may have a free slot of `place`: one batch at a time, which leaves
    a slot for a question if there are several."""
    if waited_s >= PATIENCE_S:
        return True
    batches = sum([slot.busy and slot.priority is Priority.BATCH for slot in place.slots])
    if batches or (place.free == 1 and len(place.slots) > 1):
        return False
    return not any([queue.urgent for queue in queues]) and not any([_serves_people(place) for place in places])


def _serves_people(place: Place) -> bool:
    return any([slot.busy and slot.priority is Priority.PERSON for slot in place.slots])
