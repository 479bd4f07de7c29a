"""Runs blocking calls outside of the event loop."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Generic, TypeVar

from llama_smart_proxy.proxy.errors import StartFailed

logger = logging.getLogger(__name__)

T = TypeVar("T")
LATE_S = 0.01
"""How much later than its limit a look is given up by those who wait: it is known to be late then."""


async def run_in_thread(call: Callable[[], T]) -> T:
    """The result of `call()`, run as by `begin_in_thread`. If the caller is cancelled, the call continues, and its
    result is dropped.

    Raises: what `call` raises; as `begin_in_thread`.
    """
    return await begin_in_thread(call)


def begin_in_thread(call: Callable[[], T]) -> asyncio.Future[T]:
    """The future of `call()`, which runs in a new daemon thread.

    Not in an executor: its threads are joined at exit, which a large download or a disk that does not answer would
    delay, and long calls would block others in its queue. Cancelling the future does not end the call.

    Raises: `StartFailed` (code `spawn_failed`) if no thread can be started.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def run() -> None:
        result: T | None = None
        error: BaseException | None = None
        try:
            result = call()
        except StopIteration as exc:  # which no future takes
            error = RuntimeError("StopIteration was raised in a thread")
            error.__cause__ = exc
        except BaseException as exc:  # re-raised in the caller
            error = exc
        settle(loop, future, result, error)

    try:
        threading.Thread(target=run, daemon=True).start()
    except RuntimeError as exc:
        raise StartFailed("The system refused to start another thread.", code="spawn_failed") from exc
    return future


def settle(
    loop: asyncio.AbstractEventLoop, future: asyncio.Future[Any], result: object, error: BaseException | None
) -> None:
    """From a thread: let `future` of `loop` have this result, or this error. Nothing if it is done or cancelled, or if
    the loop is closed."""
    with suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(_settle, future, result, error)


def _settle(future: asyncio.Future[Any], result: object, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def log_failure(logger: logging.Logger, task: asyncio.Task[Any]) -> None:
    """Log if a task has ended by an exception that nothing awaits: that is a bug."""
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("%s failed", task.get_name(), exc_info=error)


def within(limit_s: float, call: Callable[[], T]) -> T:
    """The result of `call()`, run in a new daemon thread; for use without an event loop.

    Raises: what `call` raises; `TimeoutError` if it does not return within `limit_s`.
    """
    results: Future[T] = Future()

    def run() -> None:
        try:
            results.set_result(call())
        except BaseException as exc:  # re-raised in the caller
            results.set_exception(exc)

    threading.Thread(target=run, daemon=True).start()
    return results.result(limit_s)


class Looks(Generic[T]):
    """Repeated looks at a disk that may stop answering: in a thread, one at a time, shared by all who wait for one.

    `report` gets the result of each look, in the event loop. One that takes longer than `limit_s` is waited for no
    more, and no other is begun before it has ended; that is logged once. `what` names the disk's part in the log.
    """

    def __init__(self, what: str, look: Callable[[], T], report: Callable[[T], None], limit_s: float) -> None:
        self.stalled = False
        """Whether a look takes longer than `limit_s` now."""
        self._what = what
        self._look = look
        self._report = report
        self._limit_s = limit_s
        self._running: asyncio.Future[T] | None = None
        self._begun = 0
        self._ended = 0
        self._begun_s = float("-inf")

    async def look(self, fresh_s: float = 0.0) -> None:
        """Return when a look has ended that began after this call, or up to `fresh_s` seconds before; or once one takes
        longer than `limit_s`."""
        loop = asyncio.get_running_loop()
        number = self._begun if loop.time() - self._begun_s < fresh_s else self._begun + 1
        while self._ended < number and not self.stalled:
            running = self._running or self._begin(loop)
            if running is None:
                return
            until_s = self._begun_s + self._limit_s + LATE_S
            await asyncio.wait({running}, timeout=max(LATE_S, until_s - loop.time()))

    def _begin(self, loop: asyncio.AbstractEventLoop) -> asyncio.Future[T] | None:
        try:
            running = begin_in_thread(self._look)
        except StartFailed as error:
            logger.warning("%s cannot be looked at: %s", self._what, error)
            return None
        self._running = running
        self._begun, self._begun_s = self._begun + 1, loop.time()
        timer = loop.call_later(self._limit_s, self._late)
        running.add_done_callback(lambda _: self._end(running, timer))
        return running

    def _late(self) -> None:
        self.stalled = True
        logger.warning("%s does not answer; what was known of it last is served", self._what)

    def _end(self, running: asyncio.Future[T], timer: asyncio.TimerHandle) -> None:
        timer.cancel()
        self._running, self._ended = None, self._begun
        if self.stalled:
            logger.info("%s answers again", self._what)
        self.stalled = False
        if running.cancelled():
            return
        if (error := running.exception()) is not None:
            logger.error("%s: unforeseen failure", self._what, exc_info=error)
        else:
            self._report(running.result())
