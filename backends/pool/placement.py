"""What the pool keeps of each model and each process, and who has to go when room is needed. No event happens here."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from llama_smart_proxy.backends.pool.backoff import Backoff
from llama_smart_proxy.backends.pool.instance import Instance, State
from llama_smart_proxy.proxy.config import ModelConfig
from llama_smart_proxy.proxy.errors import ProxyError, StartFailed


class Evictable(Protocol):
    """What decides whether, and before whom, a process has to go. `released_at` counts seconds on any clock."""

    @property
    def state(self) -> State: ...
    @property
    def pinned(self) -> bool: ...
    @property
    def leases(self) -> int: ...
    @property
    def wanted(self) -> bool: ...
    @property
    def draining(self) -> bool: ...
    @property
    def released_at(self) -> float: ...


E = TypeVar("E", bound=Evictable)


def choose_victim(seats: Iterable[E]) -> E | None:
    """The one to evict now, or None: never a pinned one, never one in use.

    First those drained for this purpose, then the least recently released among those that nobody waits for, last those
    that are still loading a model which nobody waits for any more.
    """
    free = [
        seat
        for seat in seats
        if not seat.pinned
        and seat.leases == 0
        and ((seat.state is State.READY and (seat.draining or not seat.wanted)) or _forsaken(seat))
    ]
    return min(free, key=lambda seat: (not seat.draining, _forsaken(seat), seat.released_at), default=None)


def choose_to_drain(seats: Iterable[E]) -> E | None:
    """The busy one that shall admit nobody any more: the least recently released that is not pinned."""
    busy = (seat for seat in seats if seat.state is State.READY and not seat.pinned and not seat.draining)
    return min(busy, key=lambda seat: seat.released_at, default=None)


def _forsaken(seat: Evictable) -> bool:
    return seat.state is State.STARTING and not seat.wanted


@dataclass(eq=False, slots=True)
class Waiter:
    """A request that waits for its model. `slot`: it will occupy one of the server's slots."""

    future: asyncio.Future[Seat]
    slot: bool
    since: float
    timer: asyncio.TimerHandle | None = None

    @property
    def granted(self) -> bool:
        return self.future.done() and not self.future.cancelled() and self.future.exception() is None

    def fail(self, error: ProxyError) -> None:
        if not self.future.done():
            self.future.set_exception(error)


@dataclass(eq=False, slots=True)
class Line:
    """One model: who waits for it, first come first served, its process if it has one, and how its starts went."""

    name: str
    model: ModelConfig
    seat: Seat | None = None
    waiting: dict[Waiter, None] = field(default_factory=dict)  # for a slot; a dict is an ordered set
    asking: dict[Waiter, None] = field(default_factory=dict)  # for a ready server only
    backoff: Backoff = field(default_factory=Backoff)
    error: StartFailed | None = None
    keep_alive: float | None = None  # seconds that its process stays when idle, if a request asked for that
    evicted_at: float = -math.inf
    crashed: bool = False
    restarts: int = 0

    @property
    def queued(self) -> int:
        """How many wait for it."""
        return len(self.waiting) + len(self.asking)

    @property
    def cold(self) -> bool:
        """Whether it has no process that is, or is becoming, ready."""
        return self.seat is None or self.seat.state in (State.STOPPING, State.STOPPED)

    def queue(self, waiter: Waiter) -> dict[Waiter, None]:
        return self.waiting if waiter.slot else self.asking

    @property
    def wants_since(self) -> float:
        """Since when it has been without a process although somebody waits. An eviction starts the count anew, so that
        the model it made room for comes first."""
        first = min(next(iter(queue)).since for queue in (self.waiting, self.asking) if queue)
        return max(first, self.evicted_at)

    def fail_all(self, error: Callable[[], ProxyError]) -> None:
        """Fail all who wait for it, each with an error object of its own."""
        for waiter in (*self.asking, *self.waiting):
            waiter.fail(error())
        self.asking.clear()
        self.waiting.clear()


@dataclass(eq=False, slots=True)
class Seat:
    """One of the pool's places, and the instance that has it until it is STOPPED. The pool alone writes here."""

    line: Line
    instance: Instance
    leases: int = 0
    generating: int = 0  # leases that occupy a slot
    ready_at: float = math.inf
    released_at: float = math.inf
    draining: bool = False  # admits nobody, to make room for another model
    leaving: bool = False  # admits nobody, because it was told to unload
    admits_nobody_since: float = math.inf
    served: bool = False
    idle_timer: asyncio.TimerHandle | None = None

    @property
    def state(self) -> State:
        return self.instance.state

    @property
    def pinned(self) -> bool:
        return self.instance.model.pinned

    @property
    def wanted(self) -> bool:
        return self.line.queued > 0

    @property
    def admits(self) -> bool:
        return self.instance.state is State.READY and not self.draining and not self.leaving

    @property
    def keep_alive_s(self) -> float | None:
        """Seconds it stays when idle, if anybody said so: a request before its model; pinned is for ever."""
        if self.pinned:
            return math.inf
        return self.line.model.keep_alive if self.line.keep_alive is None else self.line.keep_alive

    def has_room(self, slot: bool) -> bool:
        """Whether one more may come in now; `slot`: to generate."""
        return self.admits and (not slot or self.generating < self.instance.slots)

    def take(self, slot: bool) -> None:
        self.leases += 1
        self.generating += slot

    def give_back(self, slot: bool, now: float) -> None:
        self.leases -= 1
        self.generating -= slot
        self.released_at = now
        if self.instance.worked and not self.served:
            self.served = True
            self.line.backoff.worked()

    def stop(self, cause: str) -> None:
        self.draining = False
        self.line.keep_alive = None
        self.cancel_idle_timer()
        self.instance.stop(cause)

    def cancel_idle_timer(self) -> None:
        if self.idle_timer is not None:
            self.idle_timer.cancel()
            self.idle_timer = None
