"""Downloads of models, each made once however many wait for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from proxy.errors import Overloaded

logger = logging.getLogger(__name__)

Progress = dict[str, Any]
"""What is under way: `status`, and for a file `digest`, `total` and `completed` in bytes (Ollama's `/api/pull`)."""
Work = Callable[[Callable[[Progress], None]], Awaitable[None]]
"""Does the download. Tells its progress to what it is called with, in the event loop; raises ProxyError; on
cancellation it stops at once and leaves behind what a later try can go on from."""


class Download:
    """One download under way. `progress` is the newest; `error` says why it failed once it has ended."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.progress: Progress = {"status": "pulling manifest"}
        self.error: BaseException | None = None
        self.ended = False
        self.wanted = False
        self._watchers = 0
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None]

    async def wait(self) -> None:
        """Return once it has succeeded. It goes on even when all who wait leave.

        Raises: what the work raised.
        """
        self.wanted = True
        async for _ in self.watch():
            pass

    async def watch(self) -> AsyncIterator[Progress]:
        """Its progress from now on, the newest only for a slow reader; ends when it has succeeded.

        When the last watcher leaves, and nobody ever waited, it is broken off.

        Raises: what the work raised.
        """
        self._watchers += 1
        try:
            while not self.ended:
                changed = self._changed
                yield self.progress
                await changed.wait()
            if self.error is not None:
                raise self.error
        finally:
            self._watchers -= 1
            if not self._watchers and not self.wanted and not self.ended:
                self._task.cancel()

    def _tell(self, progress: Progress) -> None:
        self.progress = progress
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _end(self, task: asyncio.Task[None]) -> None:
        """The work is over, whichever way; also if it was cancelled before its first step."""
        if task.cancelled():
            self.error = Overloaded(f"The download of '{self.name}' was broken off.", code="download_cancelled")
        elif (error := task.exception()) is not None:
            self.error = error
        else:
            self.progress = {"status": "success"}
        self.ended = True
        self._wake()


class Downloads:
    """All downloads under way, by name. Use it from the event loop."""

    def __init__(self) -> None:
        self._running: dict[str, Download] = {}

    def join(self, name: str, work: Work) -> Download:
        """The download called `name`: the one under way, else a new one that does `work`."""
        download = self._running.get(name)
        if download is None:
            download = self._running[name] = Download(name)
            download._task = asyncio.get_running_loop().create_task(_do(work, download), name=f"download {name}")
            download._task.add_done_callback(lambda task: self._ended(name, task))
            logger.info("%s: download begins", name)
        return download

    def get(self, name: str) -> Download | None:
        """The download under way of that name."""
        return self._running.get(name)

    def status(self) -> list[dict[str, Any]]:
        """Those under way, for operators."""
        return [{"model": name, **download.progress} for name, download in self._running.items()]

    async def close(self) -> None:
        """Break off all of them; returns when they have ended."""
        tasks = [download._task for download in self._running.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _ended(self, name: str, task: asyncio.Task[None]) -> None:
        download = self._running.pop(name)
        download._end(task)
        if download.error is not None:
            logger.warning("%s: download failed: %s", name, download.error)
        else:
            logger.info("%s: download complete", name)


async def _do(work: Work, download: Download) -> None:
    await work(download._tell)
