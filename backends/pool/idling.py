"""When a process that is not in use is stopped: after its time to live, or at once if it is to be unloaded."""

from __future__ import annotations

import asyncio
import math

from llama_smart_proxy.backends.pool.instance import State
from llama_smart_proxy.backends.pool.queue import ModelQueue, Place


class Idling:
    """Stops idle processes. `keep_alive_s`: seconds that one stays if neither its model nor a request has set that."""

    def __init__(self, keep_alive_s: float) -> None:
        self.keep_alive_s = keep_alive_s

    def set_keep_alive(self, queue: ModelQueue, seconds: float) -> None:
        """A request sets how long this model stays once it is idle again: 0 not at all, infinity for ever. To be called
        before that request is served, or after; for an idle one the count starts now.

        The last one wins, until the process is stopped or fails: the next one begins with the configured time again. A
        pinned model stays in any case.
        """
        queue.keep_alive_s = seconds
        place = queue.place
        if seconds > 0 and place is not None and place.state is State.READY and not place.leases:
            place.released_at = asyncio.get_running_loop().time()
            self.check(place)

    def expires_at(self, place: Place) -> float | None:
        """When it will be stopped if no request arrives from now on, in loop time: infinity for never, None when it is
        not ready. One in use counts as released now; one that is to be unloaded is overdue."""
        if place.state is not State.READY:
            return None
        now = asyncio.get_running_loop().time()
        if place.unloading:
            return now
        return (now if place.leases else place.released_at) + self._kept_s(place)

    def check(self, place: Place) -> None:
        """Stop it if it is not in use and to be unloaded, or set the timer that does so after its time to live."""
        if place.in_use or place.state not in (State.READY, State.STARTING):
            return
        keep_alive_s = self._kept_s(place)
        if place.unloading:
            place.stop("unloaded")
        elif place.state is State.READY and keep_alive_s <= 0:
            place.stop("not kept alive")
        elif place.state is State.READY and keep_alive_s < math.inf:
            due = place.released_at + keep_alive_s
            if place.idle_timer is None or place.idle_timer.when() > due:
                place.cancel_idle_timer()
                place.idle_timer = asyncio.get_running_loop().call_at(due, self._idle_timer_fired, place)

    def _idle_timer_fired(self, place: Place) -> None:
        """Requests do not set the timer anew, as that would cost each of them: so its time may not have come yet."""
        place.idle_timer = None
        idle_s = asyncio.get_running_loop().time() - place.released_at
        if not place.in_use and place.state is State.READY and idle_s >= self._kept_s(place) - 0.001:
            place.stop(f"idle for {idle_s:.1f} s")
        else:
            self.check(place)

    def _kept_s(self, place: Place) -> float:
        own = place.keep_alive_s
        return self.keep_alive_s if own is None else own
