"""Which model has a process, who may use it, and who has to go: all decisions of the pool.

Single writer: everything is decided in synchronous code in the event loop, by `schedule`, which runs after every event
(somebody asks, leaves or is done; a process is ready, failed or has ended; a timer). Nothing is read before an await
and acted on after it, so there are no locks and no order of locks.
"""

from __future__ import annotations

import asyncio
import logging
import math

from llama_smart_proxy.backends.pool.instance import Instance, State
from llama_smart_proxy.backends.pool.placement import Line, Seat, Waiter, choose_to_drain, choose_victim
from llama_smart_proxy.backends.pool.ports import Ports
from llama_smart_proxy.proxy.config import Config, ModelConfig
from llama_smart_proxy.proxy.errors import Overloaded, StartFailed

logger = logging.getLogger(__name__)

EARLY_S = 10.0
"""A crash within so many seconds of being ready, before any request was served, counts as a failed start."""
NOT_THE_MODELS_FAULT = ("spawn_failed", "no_free_port")
"""Codes of start failures that need no back-off: no process was made, and the next try may well succeed."""


class Scheduler:
    """The lines before the models, and the seats: the places of the pool that are taken, at most `size` at any time.

    `quiet` is set when, after `closing` was set, nobody waits and nobody holds an instance any more. `halt()` ends all
    deciding.
    """

    def __init__(self, config: Config) -> None:
        self.lines: dict[str, Line] = {}
        self.seats: list[Seat] = []
        self.closing = False
        self.quiet = asyncio.Event()
        self._config = config
        self._pool = config.server_pool
        self._ports = Ports(self._pool.host, self._pool.ports)
        self._swap_timer: asyncio.TimerHandle | None = None
        self._halted = False

    def line(self, name: str, model: ModelConfig) -> Line:
        line = self.lines.get(name)
        if line is None:
            line = self.lines[name] = Line(name, model)
        return line

    @property
    def queued(self) -> int:
        """How many wait, for whatever model."""
        return sum(line.queued for line in self.lines.values())

    # -- what happens ----------------------------------------------------------------------------------------------

    def enqueue(self, line: Line, slot: bool) -> Waiter:
        """Somebody asks: put them in line. The future of the waiter brings a seat with the lease taken."""
        loop = asyncio.get_running_loop()
        waiter = Waiter(loop.create_future(), slot, loop.time())
        waiter.timer = loop.call_later(self._pool.queue_timeout_s, self._expire, line, waiter)
        line.queue(waiter)[waiter] = None
        self.schedule()
        return waiter

    def leave(self, line: Line, waiter: Waiter) -> None:
        """The waiter has gone on, with or without a seat."""
        if waiter.timer is not None:
            waiter.timer.cancel()
        queue = line.queue(waiter)
        if waiter in queue:
            del queue[waiter]
            self.schedule()

    def release(self, seat: Seat, slot: bool) -> None:
        """A lease is given back."""
        seat.give_back(slot, asyncio.get_running_loop().time())
        if self.closing or self.queued:
            self.schedule()
        self.rest(seat)

    def _expire(self, line: Line, waiter: Waiter) -> None:
        """`queue_timeout_s` is over. While the model loads, only `load_timeout_s` counts."""
        if line.seat is not None and line.seat.state is State.STARTING:
            loop = asyncio.get_running_loop()
            waiter.timer = loop.call_later(self._pool.queue_timeout_s, self._expire, line, waiter)
            return
        waited = f"{self._pool.queue_timeout_s:g} s"
        waiter.fail(Overloaded(f"Model '{line.name}' was not free within {waited}.", code="queue_timeout"))

    def _changed(self, instance: Instance) -> None:
        """An instance is ready, has failed, or has stopped."""
        line = self.lines[instance.name]
        seat = line.seat
        assert seat is not None and seat.instance is instance
        now = asyncio.get_running_loop().time()
        if instance.state is State.READY:
            seat.ready_at = seat.released_at = now
            line.error = None
        elif instance.state is State.STOPPED:
            self.seats.remove(seat)
            line.seat = None
            seat.cancel_idle_timer()
        if instance.error is not None and line.error is not instance.error:
            self._note_failure(line, seat, instance.error, now)
        self.schedule()
        self.rest(seat)

    def _note_failure(self, line: Line, seat: Seat, error: StartFailed, now: float) -> None:
        line.error = error
        line.keep_alive = None
        if seat.ready_at == math.inf:
            if error.code not in NOT_THE_MODELS_FAULT:
                line.backoff.failed(now)
            _refuse(line, error, error.status, line.backoff.wait_s(now))
            return
        line.crashed = True
        if not seat.served and now - seat.ready_at < EARLY_S:
            line.backoff.crashed(now)

    # -- deciding --------------------------------------------------------------------------------------------------

    def schedule(self) -> None:
        """Bring everything to where the rules want it now. Cheap when there is nothing to do."""
        if self._halted:
            return
        for line in self.lines.values():
            self._admit(line)
        self._place()
        if self.closing and not self.queued and not any(seat.leases for seat in self.seats):
            self.quiet.set()

    def halt(self) -> None:
        self._halted = True
        self._set_swap_timer(math.inf)

    def _admit(self, line: Line) -> None:
        """Let in who waits, as far as there is room."""
        seat = line.seat
        if seat is None or not seat.admits:
            return
        for queue, slot in ((line.asking, False), (line.waiting, True)):
            while queue and seat.has_room(slot):
                waiter = next(iter(queue))
                del queue[waiter]
                if not waiter.future.done():
                    seat.take(slot)
                    waiter.future.set_result(seat)

    def _place(self) -> None:
        """Find a place for every model that is waited for and has no process, the one longest without first."""
        now = asyncio.get_running_loop().time()
        cold = [line for line in self.lines.values() if line.queued and line.cold]
        coming = sum(seat.state is State.STOPPING for seat in self.seats)
        starved: list[Line] = []
        for line in sorted(cold, key=lambda line: line.wants_since):
            if line.error is not None and (wait_s := line.backoff.wait_s(now)) > 0:
                _refuse(line, line.error, 503, wait_s)
            elif line.seat is None and len(self.seats) < self._pool.size:
                self._launch(line)
            elif coming > 0:
                coming -= 1
            elif (victim := choose_victim(self.seats)) is not None:
                victim.line.evicted_at = now
                victim.stop(f"making room for {line.name}")
            elif self._all_pinned():
                line.fail_all(self._no_place)
            else:
                starved.append(line)
        self._drain(starved, now)

    def _launch(self, line: Line) -> None:
        instance = Instance(line.name, line.model, self._config, self._ports, self._changed)
        line.seat = Seat(line, instance)
        line.restarts += line.crashed
        line.crashed = False
        self.seats.append(line.seat)
        instance.start(f"{line.queued} waiting")

    def _drain(self, starved: list[Line], now: float) -> None:
        """Have as many busy instances admit nobody as there are models that lacked a place for `swap_after_s`.

        An instance is left to its own queue for as long after it was loaded, so that a load serves more than one
        request. What is not due yet is looked at again when it is.
        """
        due = sorted(line.wants_since + self._pool.swap_after_s for line in starved)
        needed = sum(at <= now for at in due)
        later = next((at for at in due if at > now), math.inf)
        drained = [seat for seat in self.seats if seat.state is State.READY and (seat.draining or seat.leaving)]
        # One whose last answer takes longer than that is no help any more: the next one is drained as well, and
        # whichever is empty first makes room.
        helpful = [seat for seat in drained if now < seat.admits_nobody_since + self._pool.swap_after_s]
        later = min([later, *(seat.admits_nobody_since + self._pool.swap_after_s for seat in helpful)])
        surplus = len(drained) if not needed else max(0, len(helpful) - needed)
        for seat in [seat for seat in reversed(drained) if seat.draining][:surplus]:
            seat.draining = False
            logger.info("%s: admits requests again: nobody waits for its place any more", seat.line.name)
            self._admit(seat.line)
        for _ in range(needed - len(helpful)):
            rested = [seat for seat in self.seats if now >= seat.ready_at + self._pool.swap_after_s]
            chosen = choose_to_drain(seat for seat in rested if not seat.leaving)
            if chosen is None:
                resting = (seat.ready_at for seat in self.seats if seat not in rested and not seat.pinned)
                later = min(later, min(resting, default=math.inf) + self._pool.swap_after_s)
                break
            chosen.draining = True
            chosen.admits_nobody_since = now
            later = min(later, now + self._pool.swap_after_s)
            logger.info("%s: admits no more requests: another model waits for its place", chosen.line.name)
        self._set_swap_timer(later)

    def _set_swap_timer(self, due: float) -> None:
        if self._swap_timer is not None:
            self._swap_timer.cancel()
            self._swap_timer = None
        if due < math.inf:
            self._swap_timer = asyncio.get_running_loop().call_at(due, self.schedule)

    def _all_pinned(self) -> bool:
        """Whether no place can become free by eviction, ever."""
        settled = (State.STARTING, State.READY)
        return all(seat.pinned and not seat.leaving and seat.state in settled for seat in self.seats)

    def _no_place(self) -> Overloaded:
        names = ", ".join(seat.line.name for seat in self.seats)
        return Overloaded(f"All {self._pool.size} places are held by pinned models: {names}.", retry_after_s=60)

    # -- idle instances --------------------------------------------------------------------------------------------

    def set_keep_alive(self, line: Line, seconds: float) -> None:
        """A request for this model wants it to stay `seconds` once it is idle again: 0 not at all, infinity for ever.
        To be told before that request is served, or after; to an idle one the count starts now.

        The last one wins, until the process is stopped or fails: the next one begins with the configured time again. A
        pinned model stays whatever requests say.
        """
        line.keep_alive = seconds
        seat = line.seat
        if seconds > 0 and seat is not None and seat.state is State.READY and not seat.leases:
            seat.released_at = asyncio.get_running_loop().time()
            self.rest(seat)

    def expires_at(self, seat: Seat) -> float | None:
        """When it will be stopped if nobody asks for it from now on, in loop time: infinity for never, None when it is
        not ready. One in use counts as given back now; one that was told to unload is overdue."""
        if seat.state is not State.READY:
            return None
        now = asyncio.get_running_loop().time()
        if seat.leaving:
            return now
        return (now if seat.leases else seat.released_at) + self._keep_alive_s(seat)

    def rest(self, seat: Seat) -> None:
        """If nobody holds it: stop it if it was told to unload, or have that done after its time to live."""
        if seat.leases or seat.state not in (State.READY, State.STARTING):
            return
        keep_alive_s = self._keep_alive_s(seat)
        if seat.leaving:
            seat.stop("unloaded")
        elif seat.state is State.READY and keep_alive_s <= 0:
            seat.stop("not kept alive")
        elif seat.state is State.READY and keep_alive_s < math.inf:
            due = seat.released_at + keep_alive_s
            if seat.idle_timer is None or seat.idle_timer.when() > due:
                seat.cancel_idle_timer()
                seat.idle_timer = asyncio.get_running_loop().call_at(due, self._check_idle, seat)

    def _check_idle(self, seat: Seat) -> None:
        """The timer is not touched by every request: it looks, when it fires, whether its time has really come."""
        seat.idle_timer = None
        idle_s = asyncio.get_running_loop().time() - seat.released_at
        if not seat.leases and seat.state is State.READY and idle_s >= self._keep_alive_s(seat) - 0.001:
            seat.stop(f"idle for {idle_s:.1f} s")
        else:
            self.rest(seat)

    def _keep_alive_s(self, seat: Seat) -> float:
        own = seat.keep_alive_s
        return self._pool.keep_alive if own is None else own


def _refuse(line: Line, error: StartFailed, status: int, wait_s: float) -> None:
    """Fail all who wait for `line` with what its process died of; with status 503, tell when to try again."""

    def again() -> StartFailed:
        copy = StartFailed(error.message, status=status, code=error.code)
        if status == 503:
            copy.retry_after_s = max(1, math.ceil(wait_s))
        return copy

    line.fail_all(again)
