"""One database, used by one thread: what is read and written for requests never waits in the event loop.

All features share the database and the thread: each has tables of its own, made by an entry of `MIGRATIONS`, and calls
`Store.run` with what it does with the connection. The database is opened with the first call.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TypeVar

from llama_smart_proxy.backends.threads import settle
from llama_smart_proxy.proxy.store.postgres import Postgres
from llama_smart_proxy.proxy.store.schema import STATE, Database, Schema, Sql, Unavailable
from llama_smart_proxy.proxy.store.sqlite import SQLite

logger = logging.getLogger(__name__)

T = TypeVar("T")
Work = Callable[[Sql], T]

CLOSE_S = 5.0
"""Time limit in seconds for what is still to be written at the end."""
MAX_JOBS = 1000
"""Reads and writes that wait for the database; with more, `begin` does nothing."""


class Store:
    """The tables of `schema`: in the Postgres at `url`, or else the file in `folder`, or the memory if that is None
    too. `run` may be called from any event loop."""

    def __init__(self, folder: Path | None, url: str = "", schema: Schema = STATE) -> None:
        self.is_remote = bool(url)
        self._database: Database = Postgres(url, schema) if url else SQLite(folder, schema)
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._delayed: list[tuple[float, Callable[[], None]]] = []
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self.on_close: Callable[[], None] | None = None
        """Called in the thread before the database is closed."""

    async def run(self, work: Work[T]) -> T:
        """The result of `work`, which is one transaction, in the thread. Raises: what `work` raises; `Unavailable`."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def job() -> None:
            result: T | None = None
            error: BaseException | None = None
            try:
                result = self.do(work)
            except BaseException as exc:  # raised where it is awaited
                error = exc
            settle(loop, future, result, error)

        self.submit(job)
        return await future

    def begin(self, work: Work[T], on_result: Callable[[T], None] | None = None, *, writes: bool = True) -> None:
        """Do `work` in the thread later, and pass its result to `on_result` in the event loop. A failure is logged.
        What `writes` nothing does not create the file: it is left out if there is none."""
        loop = asyncio.get_running_loop()

        def job() -> None:
            if not writes and not self._database.exists():
                return
            try:
                result = self.do(work)
            except Unavailable:
                return  # the database has logged why
            except Exception as exc:
                logger.warning("the state could not be read or written: %s", exc)
                return
            if on_result is not None:
                with suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(on_result, result)

        if self._jobs.qsize() >= MAX_JOBS:
            return
        try:
            self.submit(job)
        except RuntimeError as exc:  # the system has no more threads now
            logger.warning("the state could not be read or written: %s", exc)

    def submit(self, job: Callable[[], None], delay_s: float = 0.0) -> None:
        """Do `job` in the thread, after so many seconds; what it raises is logged. Raises: RuntimeError if the system
        has no more threads now."""
        if self._thread is None:
            self._start_thread()
        if delay_s:
            due = time.monotonic() + delay_s
            self._jobs.put(lambda: self._delayed.append((due, job)))
        else:
            self._jobs.put(job)

    def _start_thread(self) -> None:
        with self._starting:  # agents may have event loops in other threads
            if self._thread is None:
                thread = threading.Thread(target=self._work_off, name="store", daemon=True)
                thread.start()  # kept only then: the system may have no more threads now
                self._thread = thread

    def close(self) -> None:
        """Write what is still to be written, for a limited time, and close the database."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(CLOSE_S)
            self._thread = None

    # -- in the thread -------------------------------------------------------------------------------------------------

    def do(self, work: Work[T], *, essential: bool = True) -> T:
        """As `run`, at once; to be called in the thread."""
        return self._database.transaction(work, essential=essential)

    def _work_off(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=self._pause_s())
            except Empty:
                job = _nothing
            if job is None:
                break
            _do(job)
            if self._delayed:
                now = time.monotonic()
                due = [job for due, job in self._delayed if due <= now]
                self._delayed = [pair for pair in self._delayed if pair[0] > now]
                for job in due:
                    _do(job)
        if self.on_close is not None:
            _do(self.on_close)
        self._database.close()

    def _pause_s(self) -> float | None:
        if not self._delayed:
            return None
        return max(0.0, min(due for due, _ in self._delayed) - time.monotonic())


def _nothing() -> None: ...


def _do(job: Callable[[], None]) -> None:
    try:
        job()
    except Exception as exc:  # without its thread, the store would answer nothing any more
        logger.error("the state could not be read or written", exc_info=exc)
