"""Which model has a process, which request may use it, and which process is stopped: all events of the pool.

Single writer: everything is decided in synchronous code in the event loop, by `schedule`, which runs after every event
(a request arrives, leaves or is done; a process is ready, failed or has ended; a timer fires). Nothing is read before
an await and acted on after it, so there are no locks and no order of locks.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Iterable, Sequence
from functools import partial

from llama_smart_proxy.backends.base import Priority, UpstreamRequest
from llama_smart_proxy.backends.pool import batches
from llama_smart_proxy.backends.pool.idling import Idling
from llama_smart_proxy.backends.pool.instance import STALLED, Instance, State
from llama_smart_proxy.backends.pool.launcher import PoolModel
from llama_smart_proxy.backends.pool.models import Models, retire_surplus
from llama_smart_proxy.backends.pool.news import News
from llama_smart_proxy.backends.pool.placement import (
    Area,
    Evict,
    Limits,
    Never,
    Start,
    Wait,
    areas_of,
    decide,
    plan_drains,
)
from llama_smart_proxy.backends.pool.ports import Ports
from llama_smart_proxy.backends.pool.queue import Lease, ModelQueue, Place, Slot, Waiter
from llama_smart_proxy.backends.pool.waited import note_eviction, note_load_begin, note_load_end
from llama_smart_proxy.proxy.config import PoolConfig
from llama_smart_proxy.proxy.errors import Overloaded, StartFailed

logger = logging.getLogger(__name__)

EARLY_S = 10.0
"""A crash within so many seconds of being ready, before any request was served, counts as a failed start."""
GRACE_S = 0.03
"""So long an idle process is not yet stopped for another model: a request for its own model that was sent in the same
moment is served first, and saves two loads."""
CLOCK_S = 0.005
"""A timer may fire so much before its time."""
AGED_SHARE = 0.5
"""After this share of `queue_timeout_s` a background prompt takes its turn as a person's request does, to be served."""
NOT_THE_MODELS_FAULT = ("spawn_failed", "no_free_port")
"""Codes of start failures that require no back-off: no process was made, and the next try may well succeed."""


class Scheduler:
    """The queues of the models, and the places of the pool that are taken: at most `config.size` at any time, beside
    them at most `config.helpers` of helpers. No model makes room for one of the other kind.

    `quiet` is set when, after `closing` was set, no request waits and none holds a lease any more. `halt()` ends all
    scheduling.
    """

    def __init__(self, config: PoolConfig, news: News) -> None:
        self.queues: dict[str, ModelQueue] = {}
        self.places: list[Place] = []
        self.closing = False
        self.quiet = asyncio.Event()
        self.config = config
        self._news = news
        self._ports = Ports(config.host, config.ports)
        self._models = Models()
        self._swap_timer: asyncio.TimerHandle | None = None
        self._halted = False
        self._reserved: set[Area] = set()  # where a person waits for a place
        self.idling = Idling(config.keep_alive)

    def configure(self, config: PoolConfig, models: Iterable[PoolModel] | None = None) -> list[str]:
        """Replace the size and all limits for what comes next, and with `models` the models that there are. Returns the
        names of those whose processes are replaced.

        Processes that live keep their ports and time limits. Of those above the size, the least recently used ones
        accept no more requests, and are stopped when their answers are complete. So is one whose model is started in
        another way now: the requests that wait get the next one. A model that is not there any more serves those that
        have come before.
        """
        self._ports.move(config.host, config.ports)
        self.config = config
        self.idling.keep_alive_s = config.keep_alive
        replaced = []
        if models is not None:
            self._models = Models.of(models)
            replaced = [queue.name for queue in self.queues.values() if self._models.redefine(queue)]
        for area in self.areas():
            retire_surplus(self.places, area)
        self.schedule()
        for place in list(self.places):
            self.idling.check(place)
        return replaced

    def queue(self, model: PoolModel) -> ModelQueue:
        """The queue of a model; `model` applies to its next process, unless the configuration has replaced it."""
        queue = self.queues.get(model.name)
        if queue is None:
            queue = self.queues[model.name] = ModelQueue(model, self._news.changed)
        self._models.apply(queue, model)
        return queue

    @property
    def queued(self) -> int:
        """How many requests wait, for any model."""
        return sum([queue.length for queue in self.queues.values()])

    @property
    def aged_s(self) -> float:
        """Seconds after which a background prompt is treated like a person's request."""
        return AGED_SHARE * self.config.queue_timeout_s

    def rivals(self, queue: ModelQueue) -> list[Place]:
        """The places that a model gets one of: those of helpers, or of the others."""
        return [place for area in self.areas() if area.has(queue) for place in area.of(self.places)]

    def is_helper(self, name: str) -> bool:
        """Whether the model of that name is one, as far as it is known."""
        model = self.queues.get(name) or self._models.by_name.get(name)
        return model is not None and model.helper

    def areas(self) -> Sequence[Area]:
        """Where there are places."""
        return areas_of(self.config.size, self.config.helpers)

    # -- events ----------------------------------------------------------------------------------------------------

    def enqueue(self, queue: ModelQueue, request: UpstreamRequest) -> Waiter:
        """A request arrives that has to wait. The future of the waiter returns its lease."""
        loop = asyncio.get_running_loop()
        waiter = Waiter(request, loop.create_future(), loop.time())
        waiter.timers.append(loop.call_later(self.config.queue_timeout_s, self._expire, queue, waiter))
        queue.waiters(request)[waiter] = None
        if (task := request.task) is not None:
            waiter.timers.append(loop.call_at(task.since + self.aged_s, self._promote, queue, waiter))
            if task.hold_s:
                waiter.timers.append(loop.call_at(task.since + task.hold_s, self.schedule))
        elif request.priority is Priority.BATCH:
            waiter.timers.append(loop.call_later(self.aged_s, self._promote, queue, waiter))
            waiter.timers.append(loop.call_later(batches.PATIENCE_S + CLOCK_S, self.schedule))
        self._news.waiting(queue)
        self.schedule()
        return waiter

    def admits(self, queue: ModelQueue, place: Place, request: UpstreamRequest) -> bool:
        """Whether a request that arrives gets a lease of `place`, its model's, at once."""
        if not place.has_room(request.slot) or (request.slot and queue.slot_waiters):
            return False
        if request.priority is Priority.PERSON or not request.slot:
            return True
        return not queue.later_waiters and self._admits_later(place, request, 0.0)

    def leave(self, queue: ModelQueue, waiter: Waiter) -> None:
        """The request waits no more, with or without a lease."""
        for timer in waiter.timers:
            timer.cancel()
        waiter.timers.clear()
        if queue.forget(waiter):
            self.schedule()
            if queue.place is not None:
                self.idling.check(queue.place)
        self._news.waiting(queue)

    def release(self, lease: Lease) -> None:
        """A request is done."""
        lease.place.release(lease, asyncio.get_running_loop().time())
        if self.closing or self.queued:
            self.schedule()
        self.idling.check(lease.place)

    def _expire(self, queue: ModelQueue, waiter: Waiter) -> None:
        """`queue_timeout_s` is over. While the model loads, only `load_timeout_s` counts."""
        timeout_s = self.config.queue_timeout_s
        if queue.place is not None and queue.place.state is State.STARTING:
            waiter.timers.append(asyncio.get_running_loop().call_later(timeout_s, self._expire, queue, waiter))
            return
        waiter.fail(Overloaded(f"Model '{queue.name}' was not free within {timeout_s:g} s.", code="queue_timeout"))

    def _promote(self, queue: ModelQueue, waiter: Waiter) -> None:
        queue.promote(waiter)
        self.schedule()

    def _changed(self, instance: Instance) -> None:
        """An instance is ready, has failed, or has stopped."""
        queue = self.queues[instance.name]
        place = queue.place
        assert place is not None and place.instance is instance
        now = asyncio.get_running_loop().time()
        note_load_end(queue)
        if instance.state is State.READY:
            place.ready_at = place.released_at = now
            place.slots = [Slot() for _ in range(instance.model.at_once(instance.slots))]
            queue.error = None
            self._news.started(instance)
        elif instance.state is State.STOPPED:
            self.places.remove(place)
            queue.place = None
            place.cancel_idle_timer()
        if instance.error is not None and queue.error is not instance.error:
            self._note_failure(queue, place, instance.error, now)
        self._news.changed(queue)
        self.schedule()
        self.idling.check(place)

    def _note_failure(self, queue: ModelQueue, place: Place, error: StartFailed, now: float) -> None:
        queue.error = error
        queue.keep_alive_s = None
        if place.ready_at == math.inf:
            if error.code not in NOT_THE_MODELS_FAULT:
                queue.backoff.failed(now)
            queue.refuse(error, error.status, queue.backoff.wait_s(now))
            return
        queue.crashed = True
        if not place.served and (now - place.ready_at < EARLY_S or error.code == STALLED):
            queue.backoff.crashed(now)

    # -- scheduling ------------------------------------------------------------------------------------------------

    def schedule(self) -> None:
        """Bring everything to the state that the rules require now. Cheap when there is nothing to do."""
        if self._halted:
            return
        for queue in self.queues.values():
            self._admit(queue)
        self._place()
        for queue in self.queues.values():
            if queue.later_waiters:
                self._admit_later(queue)
            if queue.slot_waiters:
                self._break_off(queue)
        if self.closing and not self.queued and not any(place.leases for place in self.places):
            self.quiet.set()

    def halt(self) -> None:
        self._halted = True
        self._set_swap_timer(math.inf)

    def _admit(self, queue: ModelQueue) -> None:
        """Grant leases to the requests that wait, as far as there is room."""
        place = queue.place
        if place is None or not place.open:
            return
        for waiters, slot in ((queue.question_waiters, False), (queue.slot_waiters, True)):
            while waiters and place.has_room(slot):
                waiter = next(iter(waiters))
                del waiters[waiter]
                if not waiter.future.done():
                    waiter.future.set_result(place.take(waiter.request))

    def _admit_later(self, queue: ModelQueue) -> None:
        """Grant leases to background prompts and the like, as far as people leave room."""
        place = queue.place
        if place is None or queue.slot_waiters:
            return
        now = asyncio.get_running_loop().time()
        for waiter in sorted(queue.later_waiters, key=lambda waiter: waiter.request.priority):
            if place.has_room(True) and self._admits_later(place, waiter.request, now - waiter.since):
                del queue.later_waiters[waiter]
                if not waiter.future.done():
                    waiter.future.set_result(place.take(waiter.request))

    def _admits_later(self, place: Place, request: UpstreamRequest, waited_s: float) -> bool:
        """Whether nothing speaks against a background prompt in a free slot: a person who waits for a place that this
        one may have to make, or one whose request is to be expected; and against a batch, people who are served."""
        if not place.pinned and any([area.has(place) for area in self._reserved]):
            return False
        if request.priority is Priority.BATCH:
            return batches.may_begin(place, self.places, self.queues.values(), waited_s)
        task = request.task
        held = task is not None and asyncio.get_running_loop().time() < task.since + task.hold_s - CLOCK_S
        return not held  # also with slots to spare: its prompt would delay the one that is to be expected

    def _break_off(self, queue: ModelQueue) -> None:
        """Break off as many background prompts as people wait for their slots."""
        place = queue.place
        if place is None or not place.open or self.closing:
            return
        people = sum([waiter.request.task is None for waiter in queue.slot_waiters])
        missing = people - place.free - len(place.broken)
        for task in place.breakable(asyncio.get_running_loop().time() - self.aged_s)[: max(0, missing)]:
            task.break_off()

    def _clear(self, places: Sequence[Place], needed: int, now: float) -> None:
        """Break off the background prompts of as many processes as there are models that people wait for and that have
        no place."""
        if not needed or self.closing:
            return
        since = now - self.aged_s
        cleared = [place for place in places if place.can_be_cleared(since)]
        for place in sorted(cleared, key=lambda place: (not place.broken, place.released_at))[:needed]:
            for task in place.breakable(since):
                task.break_off()

    def _place(self) -> None:
        """Find a place for every model that requests wait for and that has no process."""
        cold = [queue for queue in self.queues.values() if queue.length and queue.cold]
        self._reserved.clear()
        self._set_swap_timer(min([self._place_in(area, area.of(cold)) for area in self.areas()]))

    def _place_in(self, area: Area, cold: Sequence[ModelQueue]) -> float:
        """The models of one area: those that people wait for first, then the longest starved. Returns when to decide
        anew."""
        now = asyncio.get_running_loop().time()
        promised = 0
        grace_ends = math.inf
        starved: list[ModelQueue] = []
        for queue in sorted(cold, key=lambda queue: (not queue.urgent, queue.starved_since)):
            if area in self._reserved and not queue.urgent:
                break
            if queue.error is not None and (wait_s := queue.backoff.wait_s(now)) > 0:
                queue.refuse(queue.error, 503, wait_s)
                continue
            match decide(queue, area.of(self.places), Limits(area.size, promised, queue.urgent)):
                case Start():
                    self._start(queue)
                    continue
                case Wait(promised=True):
                    promised += 1
                case Wait():
                    starved += [queue] if queue.urgent else []
                case Evict() if now < (due := queue.starved_since + self._grace_s(queue)):
                    grace_ends = min(grace_ends, due)
                case Evict(victims):
                    promised += len(victims)
                    for victim in victims:
                        self._evict(victim, queue, now)
                case Never():
                    queue.fail_all(partial(_all_pinned, area))
            if queue.urgent:
                self._reserved.add(area)
        places = area.of(self.places)
        self._clear(places, len(starved), now)
        return min(self._drain(places, starved, now), grace_ends)

    def _evict(self, victim: Place, queue: ModelQueue, now: float) -> None:
        victim.queue.evicted_at = now
        victim.queue.evictions += 1
        note_eviction(queue, victim, now)
        victim.stop(f"making room for {queue.name}")

    def _grace_s(self, queue: ModelQueue) -> float:
        """A background prompt evicts a model no sooner than it would be drained for a person."""
        return GRACE_S if queue.urgent else max(GRACE_S, self.config.swap_after_s)

    def _start(self, queue: ModelQueue) -> None:
        instance = Instance(queue.model, self.config, self._ports, self._changed, self._news.share)
        queue.place = Place(queue, instance)
        queue.starts += 1
        queue.restarts += queue.crashed
        queue.crashed = False
        self.places.append(queue.place)
        queue.output.renew(instance.log)
        note_load_begin(queue)
        instance.start(f"{queue.length} waiting")
        self._news.starting(queue)

    def _drain(self, places: Sequence[Place], starved: list[ModelQueue], now: float) -> float:
        plan = plan_drains([queue.starved_since for queue in starved], places, self.config.swap_after_s, now)
        for place in plan.end:
            place.draining = False
            place.queue.changed(place.queue)
            logger.info("%s: accepts requests again: no model waits for its place any more", place.queue.name)
            self._admit(place.queue)
        for place in plan.begin:
            place.draining = True
            place.closed_since = now
            place.queue.changed(place.queue)
            logger.info("%s: accepts no more requests: another model waits for its place", place.queue.name)
        return plan.again_at

    def _set_swap_timer(self, due: float) -> None:
        if self._swap_timer is not None:
            self._swap_timer.cancel()
            self._swap_timer = None
        if due < math.inf:
            self._swap_timer = asyncio.get_running_loop().call_at(due, self.schedule)


def _all_pinned(area: Area) -> Overloaded:
    places = f"all {area.size} places (server_pool.{area.setting})"
    return Overloaded(f"No model can be stopped: {places} are held by pinned models.", retry_after_s=60)
