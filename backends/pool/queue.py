"""What the pool keeps of each model, of each process and of each request that waits. Nothing is decided here."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain

from llama_smart_proxy.backends.base import Priority, UpstreamRequest
from llama_smart_proxy.backends.pool.backoff import Backoff
from llama_smart_proxy.backends.pool.instance import Instance, State
from llama_smart_proxy.backends.pool.launcher import PoolModel
from llama_smart_proxy.backends.pool.output import Output
from llama_smart_proxy.backends.tasks import Task
from llama_smart_proxy.proxy.errors import ProxyError, StartFailed

RECENT = 0.3
"""The weight of the last request in the typical duration of a model's requests."""


@dataclass(eq=False, slots=True)
class Waiter:
    """A request that waits for its model; it knows its client and its priority. The future returns its lease."""

    request: UpstreamRequest
    future: asyncio.Future[Lease]
    since: float
    timers: list[asyncio.TimerHandle] = field(default_factory=list)  # while it waits

    @property
    def granted(self) -> bool:
        return self.future.done() and not self.future.cancelled() and self.future.exception() is None

    def fail(self, error: ProxyError) -> None:
        if not self.future.done():
            self.future.set_exception(error)


@dataclass(eq=False, slots=True)
class ModelQueue:
    """One model: the requests that wait for it, its process if it has one, and how its starts went.

    First come first served, but `later_waiters`, the background prompts and the like, are after all `slot_waiters`.
    """

    model: PoolModel
    changed: Callable[[ModelQueue], None]  # to be called when it accepts requests no more, or again
    place: Place | None = None
    slot_waiters: dict[Waiter, None] = field(default_factory=dict)  # a dict is an ordered set
    question_waiters: dict[Waiter, None] = field(default_factory=dict)  # these require a ready server only
    later_waiters: dict[Waiter, None] = field(default_factory=dict)  # these require a slot, too
    backoff: Backoff = field(default_factory=Backoff)
    output: Output = field(default_factory=Output)
    error: StartFailed | None = None
    request_s: float | None = None  # how long its requests occupy a slot; the recent ones count most
    keep_alive_s: float | None = None  # how long its process stays when idle, if a request set that
    evicted_at: float = -math.inf
    load_began_s: float = -math.inf  # its last start, in seconds of `time.monotonic()`
    load_ended_s: float = -math.inf  # infinity while it lasts
    crashed: bool = False
    starts: int = 0
    restarts: int = 0
    evictions: int = 0
    removed: bool = False  # from the configuration: it serves those that have come before, and is not kept

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def shown(self) -> str:
        """Its name for people."""
        return self.model.title or self.model.name

    @property
    def helper(self) -> bool:
        """Whether it is for a place beside those of other models."""
        return self.model.helper

    @property
    def length(self) -> int:
        """How many requests wait for it."""
        return len(self.slot_waiters) + len(self.question_waiters) + len(self.later_waiters)

    @property
    def urgent(self) -> bool:
        """Whether any other request than `later_waiters` waits for it."""
        return bool(self.slot_waiters or self.question_waiters)

    @property
    def cold(self) -> bool:
        """Whether it has no process that is, or is becoming, ready."""
        return self.place is None or self.place.state in (State.STOPPING, State.STOPPED)

    @property
    def ending(self) -> bool:
        """Whether it has a process, though a `cold` one."""
        return self.place is not None

    def waiters(self, request: UpstreamRequest) -> dict[Waiter, None]:
        """Those among which `request` waits at first."""
        if not request.slot:
            return self.question_waiters
        return self.slot_waiters if request.priority is Priority.PERSON else self.later_waiters

    def waiting(self) -> Iterator[Waiter]:
        """All that wait for it."""
        return chain(self.question_waiters, self.slot_waiters, self.later_waiters)

    def forget(self, waiter: Waiter) -> bool:
        """Remove `waiter`; returns whether it was waiting."""
        for waiters in (self.slot_waiters, self.question_waiters, self.later_waiters):
            if waiter in waiters:
                del waiters[waiter]
                return True
        return False

    def promote(self, waiter: Waiter) -> None:
        """Let a request that has waited for long take its turn like all others."""
        if waiter in self.later_waiters:
            del self.later_waiters[waiter]
            self.slot_waiters[waiter] = None

    def ahead(self, waiter: Waiter) -> int:
        """How many requests that require a slot are served before `waiter`."""
        waiters = [*self.slot_waiters, *self.later_waiters]
        return waiters.index(waiter) if waiter in waiters else len(self.slot_waiters)

    @property
    def starved_since(self) -> float:
        """Since when it has been without a process although requests wait. An eviction starts the count anew, so that
        the model it made room for comes first."""
        all_waiters = (self.slot_waiters, self.question_waiters) if self.urgent else (self.later_waiters,)
        first = min(next(iter(waiters)).since for waiters in all_waiters if waiters)
        return max(first, self.evicted_at)

    def fail_all(self, error: Callable[[], ProxyError]) -> None:
        """Fail all requests that wait for it, each with an error object of its own."""
        for waiter in self.waiting():
            waiter.fail(error())
        for waiters in (self.question_waiters, self.slot_waiters, self.later_waiters):
            waiters.clear()

    def refuse(self, error: StartFailed, status: int, wait_s: float) -> None:
        """Fail all that wait with the reason of the last failure; with status 503, they may be repeated later."""

        def again() -> StartFailed:
            copy = StartFailed(error.message, status=status, code=error.code, log=error.log)
            if status == 503:
                copy.retry_after_s = max(1, math.ceil(wait_s))
            return copy

        self.fail_all(again)


@dataclass(eq=False, slots=True)
class Slot:
    """One of the requests that a server processes in parallel, `since` when; `task` is the background prompt that it
    processes, if it does, and `priority` that of its request. `last` is the last request it served: its prompt is what
    the server's cache may hold.

    `since` is 0 for a request that was granted it and is not served yet."""

    busy: bool = False
    since: float = 0.0
    task: Task | None = None
    priority: Priority = Priority.PERSON
    last: UpstreamRequest | None = None


@dataclass(eq=False, slots=True)
class Place:
    """One of the pool's places, and the instance that has it until it is STOPPED. Only the pool writes here.

    `slots` are there once it is READY.
    """

    queue: ModelQueue
    instance: Instance
    leases: int = 0
    slots: list[Slot] = field(default_factory=list)
    ready_at: float = math.inf
    released_at: float = math.inf
    draining: bool = False  # accepts no requests, to make room for another model
    unloading: bool = False  # accepts no requests, and is stopped when it is idle
    closed_since: float = math.inf
    served: bool = False
    idle_timer: asyncio.TimerHandle | None = None

    @property
    def state(self) -> State:
        return self.instance.state

    @property
    def pinned(self) -> bool:
        return self.queue.model.pinned and not self.queue.removed

    @property
    def helper(self) -> bool:
        return self.queue.helper

    @property
    def awaited(self) -> bool:
        return self.queue.length > 0

    @property
    def awaited_urgently(self) -> bool:
        return self.queue.urgent

    @property
    def open(self) -> bool:
        """Whether it accepts requests."""
        return self.instance.state is State.READY and not self.draining and not self.unloading

    @property
    def in_use(self) -> bool:
        """Whether a request holds it, or waits for it and will get it."""
        return self.leases > 0 or (self.open and self.awaited)

    @property
    def generating(self) -> int:
        """How many slots are in use."""
        return sum([slot.busy for slot in self.slots])

    @property
    def keep_alive_s(self) -> float | None:
        """Seconds it stays when idle, if that is set: by a request, else by its model; pinned is for ever."""
        if self.queue.removed:
            return 0.0
        if self.pinned:
            return math.inf
        return self.queue.model.keep_alive_s if self.queue.keep_alive_s is None else self.queue.keep_alive_s

    @property
    def free(self) -> int:
        """How many slots are not in use."""
        return len(self.slots) - self.generating

    @property
    def broken(self) -> list[Task]:
        """The background prompts that were broken off, and are about to release their slots."""
        return [slot.task for slot in self.slots if slot.task is not None and slot.task.broken]

    def breakable(self, since: float) -> list[Task]:
        """The background prompts that have arrived after `since` and may be broken off, the best one first."""
        tasks = [slot.task for slot in self.slots if slot.task is not None and slot.task.breakable]
        return sorted((task for task in tasks if task.since > since), key=lambda task: (task.breaks, -task.since))

    def can_be_cleared(self, since: float) -> bool:
        """Whether it is idle once its background prompts that have arrived after `since` are broken off."""
        if self.state is not State.READY or self.pinned or self.unloading or self.queue.urgent:
            return False
        return 0 < self.leases == len(self.broken) + len(self.breakable(since))

    def has_room(self, slot: bool) -> bool:
        """Whether it can accept one more request now, one that requires a `slot` or one that does not."""
        return self.open and (not slot or not all([slot.busy for slot in self.slots]))

    def take(self, request: UpstreamRequest) -> Lease:
        """Lease it for `request`, with the free slot of the lowest index if that requires one. Requires room."""
        self.leases += 1
        if request.task is not None:
            request.task.begins()
        if not request.slot:
            return Lease(self, None)
        index = next(index for index, slot in enumerate(self.slots) if not slot.busy)
        slot = self.slots[index]
        slot.busy, slot.task, slot.priority, slot.since = True, request.task, request.priority, 0.0
        return Lease(self, index)

    def release(self, lease: Lease, now: float) -> None:
        self.leases -= 1
        if lease.slot is not None:
            slot, known_s = self.slots[lease.slot], self.queue.request_s
            spent_s = now - slot.since
            if slot.since and (slot.task is None or not slot.task.broken):
                self.queue.request_s = spent_s if known_s is None else known_s + RECENT * (spent_s - known_s)
            slot.busy, slot.task = False, None
        self.released_at = now
        if self.instance.worked and not self.served:
            self.served = True
            self.queue.backoff.worked()

    def retire(self, now: float) -> None:
        """Accept no more requests; it is to be stopped when it is idle."""
        self.unloading, self.closed_since = True, now
        self.queue.changed(self.queue)

    def stop(self, cause: str) -> None:
        self.draining = False
        self.queue.keep_alive_s = None
        self.cancel_idle_timer()
        self.instance.stop(cause)
        self.queue.changed(self.queue)

    def cancel_idle_timer(self) -> None:
        if self.idle_timer is not None:
            self.idle_timer.cancel()
            self.idle_timer = None


@dataclass(eq=False, slots=True)
class Lease:
    """The use of an instance by one request. `slot` is the index of the slot that it occupies, None for a question."""

    place: Place
    slot: int | None

    @property
    def instance(self) -> Instance:
        return self.place.instance

    def serves(self, request: UpstreamRequest, now: float) -> None:
        """Remember what the slot is used for, and since when."""
        if self.slot is not None:
            slot = self.place.slots[self.slot]
            slot.last, slot.since = request, now
