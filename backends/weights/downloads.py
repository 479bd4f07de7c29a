"""Downloads of models, each made once however many wait for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from llama_smart_proxy.proxy.errors import Overloaded, ProxyError

logger = logging.getLogger(__name__)

Progress = dict[str, Any]
"""What is under way: `status`, and for a file `digest`, `total` and `completed` in bytes (Ollama's `/api/pull`)."""
Work = Callable[[Callable[[Progress], None]], Awaitable[None]]
"""Does the download. Tells its progress to what it is called with, in the event loop; raises ProxyError; on
cancellation it stops at once and leaves behind what a later try can go on from."""


class Download:
    """One download under way. `progress` is the newest; `error` says why it failed once it has ended."""

    def __init__(self, name: str, work: Work) -> None:
        self.name = name
        self.progress: Progress = {"status": "pulling manifest"}
        self.error: BaseException | None = None
        self.ended = False
        self.wanted = False
        self._watchers = 0
        self._changed = asyncio.Event()
        self._begun = False
        self._stopped: ProxyError | None = None
        self._task = asyncio.get_running_loop().create_task(self._do(work), name=f"download {name}")
        self._task.add_done_callback(self._end)

    @property
    def stopping(self) -> bool:
        """Whether it is being broken off."""
        return self._stopped is not None

    async def wait(self) -> None:
        """Return once it has succeeded. It goes on even when all who wait leave.

        Raises: what the work raised.
        """
        self.wanted = True
        async for _ in self.watch():
            pass

    async def watch(self) -> AsyncGenerator[Progress, None]:
        """Its progress from now on, the newest only for a slow reader; ends when it has succeeded.

        When the last watcher leaves, and nobody ever waited, it is broken off. Who leaves the loop early closes the
        iterator (`contextlib.aclosing`).

        Raises: what the work raised.
        """
        self._watchers += 1
        try:
            while not self.ended:
                changed = self._changed
                yield self.progress
                await changed.wait()
            if self.error is not None:
                raise self.error.with_traceback(None)  # else it grows with each one it is raised to
        finally:
            self._watchers -= 1
            if not self._watchers and not self.wanted:
                self.stop(Overloaded(f"The download of '{self.name}' was broken off.", code="download_cancelled"))

    def stop(self, error: ProxyError) -> None:
        """Break it off; all who wait get `error`. Nothing when it has ended."""
        if not self.ended and self._stopped is None:
            self._stopped = error
            self._task.cancel()

    async def _do(self, work: Work) -> None:
        await work(self._tell)

    def _tell(self, progress: Progress) -> None:
        if self.ended:
            return
        if not self._begun and "total" in progress:  # else there may be nothing to fetch
            self._begun = True
            logger.info("%s: download begins", self.name)
        self.progress = progress
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _end(self, task: asyncio.Task[None]) -> None:
        """The work is over, whichever way; also if it was cancelled before its first step."""
        if task.cancelled():
            self.error = self._stopped or Overloaded(f"The download of '{self.name}' was broken off.")
        else:
            self.error = task.exception()
        if self.error is not None:
            bug = None if isinstance(self.error, ProxyError) else self.error
            logger.warning("%s: download failed: %s", self.name, self.error, exc_info=bug)
        elif self._begun:
            logger.info("%s: download complete", self.name)
        if self.error is None:
            self.progress = {"status": "success"}
        self.ended = True
        self._wake()


class Downloads:
    """All downloads under way, by name. Use it from the event loop."""

    def __init__(self) -> None:
        self._running: dict[str, Download] = {}
        self._closed = False

    def join(self, name: str, work: Work) -> Download:
        """The download called `name`: the one under way, else a new one that does `work`.

        Raises: `Overloaded` (code `shutting_down`) after `close`.
        """
        if self._closed:
            raise _shutting_down()
        download = self.get(name)
        if download is None:
            download = self._running[name] = Download(name, work)
            download._task.add_done_callback(lambda _: self._forget(download))
        return download

    def get(self, name: str) -> Download | None:
        """The download under way of that name, unless it is being broken off."""
        download = self._running.get(name)
        return None if download is None or download.stopping else download

    def status(self) -> list[dict[str, Any]]:
        """Those under way, for operators."""
        return [{"model": name, **download.progress} for name, download in self._running.items()]

    async def close(self) -> None:
        """Break off all of them, and begin no more; returns when they have ended."""
        self._closed = True
        running = list(self._running.values())
        for download in running:
            download.stop(_shutting_down())
        if running:
            await asyncio.wait([download._task for download in running])

    def _forget(self, download: Download) -> None:
        if self._running.get(download.name) is download:
            del self._running[download.name]


def _shutting_down() -> Overloaded:
    return Overloaded("The proxy is shutting down.", code="shutting_down")
