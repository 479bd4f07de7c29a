"""Which model gets a process, and which process makes room for it: decisions only, computed from what there is.

Times are seconds on any one clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from llama_smart_proxy.backends.pool.instance import State


class Target(Protocol):
    """A model that requests wait for and that has no process which is, or is becoming, ready."""

    @property
    def ending(self) -> bool:
        """Whether its last process still exists; the next one is started after that."""


class Helping(Protocol):
    """A model that is a `helper`, or not; or its process."""

    @property
    def helper(self) -> bool: ...


class Running(Helping, Protocol):
    """A process of the pool. `awaited`: requests wait for its model, `awaited_urgently`: not only background prompts.
    `draining`: it accepts no requests, to make room for another model; `unloading`: neither, as it was requested to
    stop; `closed_since`: when that began."""

    @property
    def state(self) -> State: ...
    @property
    def pinned(self) -> bool: ...
    @property
    def leases(self) -> int: ...
    @property
    def awaited(self) -> bool: ...
    @property
    def awaited_urgently(self) -> bool: ...
    @property
    def draining(self) -> bool: ...
    @property
    def unloading(self) -> bool: ...
    @property
    def ready_at(self) -> float: ...
    @property
    def released_at(self) -> float: ...
    @property
    def closed_since(self) -> float: ...


R = TypeVar("R", bound=Running)
H = TypeVar("H", bound=Helping)


@dataclass(frozen=True, slots=True)
class Area:
    """Places that models of one kind compete for, and no other: helpers, or the rest; all models if `helpers` is None.
    There are `size` of them, by the `setting` of the pool."""

    size: int
    setting: str
    helpers: bool | None = None

    def has(self, model: Helping) -> bool:
        """Whether it is for this one."""
        return self.helpers is None or model.helper is self.helpers

    def of(self, models: Iterable[H]) -> list[H]:
        """Those that it is for."""
        return [model for model in models if self.has(model)]


def areas_of(size: int, helpers: int) -> Sequence[Area]:
    """The areas of a pool with `size` places, and beside them `helpers` for those; with 0 they have none."""
    if not helpers:
        return [Area(size, "size")]
    return [Area(size, "size", False), Area(helpers, "helpers", True)]


@dataclass(frozen=True, slots=True)
class Limits:
    """`size`: most processes at one time. `promised`: how many of those that are stopping make room for other targets,
    which come first. `urgent`: the target is, so that models which only background prompts wait for make room."""

    size: int
    promised: int = 0
    urgent: bool = False


@dataclass(frozen=True, slots=True)
class Start:
    """There is room: start it."""


@dataclass(frozen=True, slots=True)
class Evict(Generic[R]):
    """Stop `victims` to make room."""

    victims: Sequence[R]


@dataclass(frozen=True, slots=True)
class Wait:
    """Until there is room. `promised`: a process that is stopping makes it; otherwise all are in use."""

    promised: bool


@dataclass(frozen=True, slots=True)
class Never:
    """No process will ever make room: all are pinned."""


def decide(target: Target, running: Sequence[R], limits: Limits) -> Start | Evict[R] | Wait | Never:
    """What to do for `target` now, with these processes, those that are stopping included."""
    if not target.ending and len(running) < limits.size:
        return Start()
    if sum(process.state is State.STOPPING for process in running) > limits.promised:
        return Wait(promised=True)
    if (victim := choose_victim(running, urgent=limits.urgent)) is not None:
        return Evict([victim])
    if all(process.pinned and not process.unloading and _is_live(process) for process in running):
        return Never()
    return Wait(promised=False)


def choose_victim(running: Iterable[R], *, urgent: bool = False) -> R | None:
    """The one to evict now, or None: never a pinned one, never one in use.

    First those drained for this purpose, then the least recently released among those whose model no request waits for,
    last those that are still loading such a model. If it is `urgent`, background prompts do not count.
    """
    idle = (process for process in running if not process.pinned and process.leases == 0)
    evictable = [process for process in idle if _is_live(process) and _is_forsaken(process, urgent)]
    return min(evictable, key=lambda p: (not p.draining, p.state is State.STARTING, p.released_at), default=None)


def surplus(running: Iterable[R], size: int) -> list[R]:
    """Those to stop if there may be only `size`: the least recently used ones, pinned ones last."""
    live = [process for process in running if _is_live(process) and not process.unloading]
    ranked = sorted(live, key=lambda p: (p.pinned, p.leases > 0 or p.awaited, p.released_at))
    return ranked[: max(0, len(live) - size)]


@dataclass(frozen=True, slots=True)
class Drains(Generic[R]):
    """Which processes are to accept no more requests from now on, which are to accept them again, and when to decide
    anew."""

    begin: Sequence[R]
    end: Sequence[R]
    again_at: float


def plan_drains(starved_since: Iterable[float], running: Sequence[R], swap_after_s: float, now: float) -> Drains[R]:
    """Drain as many busy processes as there are models that had no room for `swap_after_s` seconds; `starved_since`
    has a time for each model without room.

    A process serves its own queue for as long after it was loaded, so that a load serves more than one request.
    """
    due = sorted(since + swap_after_s for since in starved_since)
    needed = sum(at <= now for at in due)
    again = [at for at in due if at > now]
    drained = [process for process in running if process.state is State.READY and _is_closed(process)]
    # One whose last answer takes longer than that is no help any more: the next one is drained as well, and the one
    # that is idle first makes room.
    helpful = [process for process in drained if now < process.closed_since + swap_after_s]
    again += [process.closed_since + swap_after_s for process in helpful]
    surplus = len(drained) if not needed else max(0, len(helpful) - needed)
    end = [process for process in reversed(drained) if process.draining][:surplus]
    missing = max(0, needed - len(helpful))
    begin = _to_drain(process for process in running if now >= process.ready_at + swap_after_s)[:missing]
    if begin:
        again.append(now + swap_after_s)
    if len(begin) < missing:
        again += [p.ready_at + swap_after_s for p in running if now < p.ready_at + swap_after_s and not p.pinned]
    return Drains(begin, end, min(again, default=math.inf))


def _to_drain(running: Iterable[R]) -> list[R]:
    """Those that may be drained, the least recently released first."""
    open_ = [process for process in running if process.state is State.READY and not _is_closed(process)]
    return sorted((process for process in open_ if not process.pinned), key=lambda process: process.released_at)


def _is_closed(process: Running) -> bool:
    return process.draining or process.unloading


def _is_forsaken(process: Running, urgent: bool) -> bool:
    awaited = process.awaited_urgently if urgent else process.awaited
    return not awaited or (process.draining and process.state is State.READY)


def _is_live(process: Running) -> bool:
    return process.state in (State.STARTING, State.READY)
