"""Work that takes long, beside the event loop: in one thread, one piece after the other, with pauses.

What takes long here is C code that holds the interpreter's lock: so several threads would be no faster, and the loop
would wait for each of them. And it would wait in each of its callbacks, of which a token takes several, if the thread
was always about to go on. So the thread rests after each piece of work for as long as that took.

The garbage collector is off until the end of the rest. It would look through the half a million lists of a body while
they are made, and once more behind that; by then they are gone, as a body is let go when it was sent.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable
from itertools import count
from queue import PriorityQueue
from typing import Any, TypeVar

from llama_smart_proxy.backends.threads import settle

A = TypeVar("A")
R = TypeVar("R")

LONGEST_REST_S = 0.1


async def in_thread(work: Callable[[A], R], value: A, *, urgent: bool, worker: Worker | None = None) -> R:
    """`work(value)`, done in the thread (of `worker`): before all that is not urgent, or behind all that waits. What
    ends a request's use of its memory is urgent: otherwise all that was begun would pile up."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[R] = loop.create_future()
    # not a `concurrent.futures.Future`, which refers to itself once it is awaited: its result would stay in the memory
    # until the next round of the garbage collector
    (worker or _worker).put(urgent, loop, result, work, value)
    return await result


class Worker:
    """The thread, which is started when it is first needed."""

    def __init__(self) -> None:
        self._jobs: PriorityQueue[tuple[Any, ...]] = PriorityQueue()
        self._serial = count()
        self._thread: threading.Thread | None = None

    def put(self, urgent: bool, *job: Any) -> None:
        """Have `_do(*job)` called."""
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="aside", daemon=True)
            thread.start()  # kept only then: the system may have no more threads now
            self._thread = thread
        self._jobs.put((not urgent, next(self._serial), *job))

    def _run(self) -> None:
        while True:
            _, _, *job = self._jobs.get()
            collects = gc.isenabled()
            gc.disable()
            began = time.monotonic()
            _do(*job)
            del job, _  # what was made is not ours to keep
            time.sleep(min(time.monotonic() - began, LONGEST_REST_S))
            if collects:
                gc.enable()


def _do(loop: asyncio.AbstractEventLoop, result: asyncio.Future[R], work: Callable[[A], R], value: A) -> None:
    if result.cancelled():
        return
    made: tuple[R | None, BaseException | None]
    try:
        made = work(value), None
    except BaseException as exc:  # raised where the result is awaited
        made = None, exc
    settle(loop, result, *made)
    # or a failure would refer to itself by the frame of this call, which cannot be cleared while it is running
    del result, made


_worker = Worker()
