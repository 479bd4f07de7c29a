"""Downloads of models, shared by all that wait for the same one."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from llama_smart_proxy.backends.feed import Feed, Kind
from llama_smart_proxy.backends.progress import timed
from llama_smart_proxy.proxy.errors import Overloaded, ProxyError, own

logger = logging.getLogger(__name__)

MOST = 8
"""Downloads that go on at one time."""
RETRY_S = 10
"""Seconds after which a client may try again that had to be refused for that."""
Progress = dict[str, Any]
"""The progress: `status`, and for a file `digest`, `total` and `completed` in bytes (Ollama's `/api/pull`)."""
Work = Callable[[Callable[[Progress], None]], Awaitable[None]]
"""Performs the download. Reports its progress to the callback, in the event loop; raises ProxyError. On cancellation it
stops at once and keeps the partial data for a later attempt."""


class Download:
    """One download. `progress` is the latest; `error` is set if it failed. A `persistent` one continues without
    watchers."""

    def __init__(self, name: str, work: Work, feed: Feed) -> None:
        self.name = name
        self._feed = feed
        self.progress: Progress = {"status": "pulling manifest"}
        self.error: BaseException | None = None
        self.ended = False
        self.persistent = False
        self._watchers = 0
        self._changed = asyncio.Event()
        self._begun = False
        self._cancel_error: ProxyError | None = None
        self._task = asyncio.get_running_loop().create_task(self._do(work), name=f"download {name}")
        self._task.add_done_callback(self._end)

    @property
    def stopping(self) -> bool:
        """Whether it is being cancelled."""
        return self._cancel_error is not None

    async def wait(self) -> None:
        """Return once it has succeeded. It continues even if all waiters are cancelled.

        Raises: what the work raised.
        """
        self.persistent = True
        async for _ in self.watch():
            pass

    async def watch(self) -> AsyncGenerator[Progress, None]:
        """The progress from now on, for a slow reader only the latest; ends when it has succeeded.

        The download is cancelled when the last watcher leaves, unless it is persistent. Close the iterator when leaving
        the loop early (`contextlib.aclosing`).

        Raises: what the work raised.
        """
        self._watchers += 1
        try:
            while not self.ended:
                changed = self._changed
                yield self.progress
                await changed.wait()
            if self.error is not None:
                raise own(self.error)
        finally:
            self._watchers -= 1
            if not self._watchers and not self.persistent:
                self.stop(Overloaded(f"The download of '{self.name}' was cancelled.", code="download_cancelled"))

    def described(self) -> Callable[[], str]:
        """A description of this download, for one who begins to wait for it now (see `backends.progress`)."""
        begun = time.monotonic()
        return lambda: _line(self.progress, time.monotonic() - begun)

    def on_end(self, callback: Callable[[], None]) -> None:
        """Call `callback` once it has ended, and is forgotten."""
        self._task.add_done_callback(lambda _: callback())

    def stop(self, error: ProxyError) -> None:
        """Cancel it; all waiters get `error`. No effect after its end."""
        if not self.ended and self._cancel_error is None:
            self._cancel_error = error
            self._task.cancel()

    async def _do(self, work: Work) -> None:
        await work(self._set_progress)

    def _set_progress(self, progress: Progress) -> None:
        if self.ended:
            return
        if not self._begun and "total" in progress:  # else there may be nothing to download
            self._begun = True
            logger.info("%s: download begins", self.name)
        self.progress = progress
        self._wake()
        self._publish()

    def _publish(self) -> None:
        failed = {"error": str(self.error)} if self.error is not None else {}
        data = {**self.progress, **failed, "ended": self.ended}
        self._feed.publish(Kind.DOWNLOAD, self.name, data, over=self.ended)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _end(self, task: asyncio.Task[None]) -> None:
        """Record the end of the work; called also if it was cancelled before its first step."""
        if task.cancelled():
            self.error = self._cancel_error or Overloaded(f"The download of '{self.name}' was cancelled.")
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
        self._publish()


class Downloads:
    """All downloads in progress, by name; what happens to them is published in `feed`. To be used in the event loop
    only."""

    def __init__(self, feed: Feed | None = None) -> None:
        self.feed = feed if feed is not None else Feed()
        self._running: dict[str, Download] = {}
        self._counted: set[Download] = set()
        self._closed = False

    def join(self, name: str, work: Work, *, counts: bool = True) -> Download:
        """The download called `name`: the one in progress, or a new one of `work`. Unless it `counts`, that may find
        that there is nothing to download, and calls `admit` otherwise.

        Raises: `Overloaded` (code `shutting_down`) after `close`; with status 429 if there are `MOST` downloads.
        """
        if self._closed:
            raise _shutting_down()
        download = self.get(name)
        if counts and download not in self._counted:
            self._check_room()
        if download is None:
            download = self._running[name] = Download(name, work, self.feed)
            download._task.add_done_callback(lambda _: self._forget(download))
        if counts:
            self._counted.add(download)
        return download

    def admit(self, name: str) -> None:
        """Count the download called `name`, which has begun without. Raises: `Overloaded`, as `join`."""
        download = self._running.get(name)
        if download is not None and download not in self._counted:
            self._check_room()
            self._counted.add(download)

    def _check_room(self) -> None:
        if len(self._counted) >= MOST:
            message = f"{MOST} downloads are under way, which is the most at one time; try again when one has ended"
            raise Overloaded(message, code="too_many_downloads", retry_after_s=RETRY_S, status=429)

    def get(self, name: str) -> Download | None:
        """The download of that name in progress, unless it is being cancelled."""
        download = self._running.get(name)
        return None if download is None or download.stopping else download

    def status(self) -> list[dict[str, Any]]:
        """The downloads in progress, for operators."""
        return [{"model": name, **download.progress} for name, download in self._running.items()]

    async def ended(self) -> None:
        """Return once all that run now have ended."""
        if self._running:
            await asyncio.wait([download._task for download in self._running.values()])

    async def close(self) -> None:
        """Cancel all downloads and accept no more; returns when they have ended."""
        self._closed = True
        running = list(self._running.values())
        for download in running:
            download.stop(_shutting_down())
        if running:
            await asyncio.wait([download._task for download in running])

    def _forget(self, download: Download) -> None:
        self._counted.discard(download)
        if self._running.get(download.name) is download:
            del self._running[download.name]


def _line(progress: Progress, spent_s: float) -> str:
    """A download with this progress, for the person who waits for it."""
    total, completed = progress.get("total"), progress.get("completed", 0)
    if total:
        return timed(f"Downloading {math.floor(100 * completed / total)} %", spent_s)
    checking = str(progress.get("status", "")).startswith("verifying")
    return timed("Checking the download" if checking else "Downloading", spent_s)


def _shutting_down() -> Overloaded:
    return Overloaded("The proxy is shutting down.", code="shutting_down")
