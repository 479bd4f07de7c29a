"""The llama-server processes of the proxy, as requests and operators see them. `backends.scheduler` decides."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import psutil

from llama_smart_proxy.backends.pool.instance import Instance, State
from llama_smart_proxy.backends.pool.orphans import kill_orphans
from llama_smart_proxy.backends.pool.placement import Line, Seat
from llama_smart_proxy.backends.pool.scheduler import Scheduler
from llama_smart_proxy.backends.threads import in_thread
from llama_smart_proxy.backends.weights import hub
from llama_smart_proxy.backends.weights.downloads import Download, Downloads, Progress
from llama_smart_proxy.backends.weights.files import locate
from llama_smart_proxy.proxy.config import Config, ModelConfig
from llama_smart_proxy.proxy.errors import Overloaded, ProxyError, StartFailed

logger = logging.getLogger(__name__)

LOST_S = 5.0
"""Seconds after its SIGKILL in which a process must be gone; then the kernel cannot end it, and we go without it."""


class Pool:
    """At most `server_pool.size` llama-server processes, one for a model, started on demand and evicted when idle.

    Requests for a model are served in the order they came; a model that is loading or busy delays no other. One that is
    not on this machine is fetched, once for all who wait, before it takes a place. Use it from the event loop of the
    main thread.
    """

    def __init__(self, config: Config, downloads: Downloads | None = None) -> None:
        self.downloads = downloads or Downloads()
        self._config = config
        self._scheduler = Scheduler(config)
        self._fetching: Counter[str] = Counter()  # requests that wait for a download, by model
        self._files: dict[str, Path] = {}  # where those that come from the hub were found last
        self._tasks: set[asyncio.Task[None]] = set()
        self._closer: asyncio.Task[None] | None = None

    # -- for requests ----------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def lease(
        self, name: str, model: ModelConfig, *, slot: bool = True, wait: bool = True
    ) -> AsyncIterator[Instance]:
        """Hold the instance that serves `name`, which is not stopped while held. Waits until it is loaded and has room.

        With `slot` the holder occupies one of the server's parallel slots; without, it only asks a question. Leaving,
        also by cancellation, gives all back at once; a load that was begun goes on. Without `wait` it is to be had now
        or not at all: who holds one model and waits for another may wait for itself.

        Raises: `Overloaded` (codes `overloaded`, `queue_timeout`, `shutting_down`, `unloaded`, `no_slot_now`),
        `StartFailed`, `ModelNotFound` when the hub does not have it.
        """
        if self._scheduler.closing:
            raise _shutting_down()
        line = self._scheduler.line(name, model)
        seat = line.seat
        if seat is not None and seat.has_room(slot) and not (slot and line.waiting):
            seat.take(slot)
        elif not wait:
            raise Overloaded(f"Model '{name}' has no free slot now, and this call must not wait.", code="no_slot_now")
        else:
            if self._scheduler.queued + self._fetching.total() >= self._config.server_pool.queue_limit:
                raise Overloaded("Too many requests are waiting for a model; try again later.")
            if seat is None:
                await self._fetch(line)
            seat = await self._wait(line, slot)
        try:
            yield seat.instance
        finally:
            self._scheduler.release(seat, slot)

    async def _wait(self, line: Line, slot: bool) -> Seat:
        """Stand in line; return with the lease taken."""
        waiter = self._scheduler.enqueue(line, slot)
        try:
            return await waiter.future
        except asyncio.CancelledError:
            if waiter.granted:  # in the very moment it was cancelled
                self._scheduler.release(waiter.future.result(), slot)
            raise
        finally:
            self._scheduler.leave(line, waiter)

    # -- for operators ---------------------------------------------------------------------------------------------

    async def load(self, name: str, model: ModelConfig) -> None:
        """Return once `name` is loaded; `queue_limit` does not apply.

        Raises: as `lease`.
        """
        if self._scheduler.closing:
            raise _shutting_down()
        line = self._scheduler.line(name, model)
        if line.seat is None:
            await self._fetch(line)
        seat = line.seat
        if seat is not None and seat.admits:
            seat.take(False)  # that is a use, too: its time to live begins anew
        else:
            seat = await self._wait(line, False)
        self._scheduler.release(seat, False)

    def begin_load(self, name: str, model: ModelConfig) -> None:
        """Have `name` loaded in the background. What goes wrong is logged, and told by `failed()`."""
        task = asyncio.get_running_loop().create_task(self._load_quietly(name, model), name=f"load {name}")
        self._tasks.add(task)
        task.add_done_callback(self._forget)

    async def begin_download(self, name: str, model: ModelConfig) -> Download | None:
        """The download that brings `name` to this machine: the one under way, or a new one. None when it is there, or
        does not come from the hub.
        """
        if model.repo is None or await in_thread(partial(locate, name, model)) is not None:
            return None
        return self._join(self._scheduler.line(name, model))

    async def unload(self, name: str) -> None:
        """Free the place of `name`; nothing if it has none.

        One in use admits nobody from now on and is stopped after its last answer, which this does not wait for; an
        idle one has stopped when this returns. A load under way is broken off, also a download for it, and who waits
        for it is told so (`Overloaded`, code `unloaded`).
        """
        line = self._scheduler.lines.get(name)
        seat = line.seat if line is not None else None
        if line is not None and (download := self._download(line)) is not None and download.wanted:
            download.stop(Overloaded(f"Model '{name}' was unloaded while it was fetched.", code="unloaded"))
        if line is None or seat is None:
            return
        if seat.state is State.STARTING:
            message = f"Model '{name}' was unloaded while it was loading."
            line.fail_all(lambda: Overloaded(message, code="unloaded"))
        seat.leaving = True
        seat.admits_nobody_since = asyncio.get_running_loop().time()
        self._scheduler.rest(seat)
        if seat.leases == 0:
            await seat.instance.wait_stopped()

    def set_keep_alive(self, name: str, model: ModelConfig, seconds: float) -> None:
        """Have the process of `name` stay `seconds` when idle; infinity is for ever. See `Scheduler.set_keep_alive`."""
        self._scheduler.set_keep_alive(self._scheduler.line(name, model), seconds)

    def expires_at(self, name: str) -> float | None:
        """When `name` will be unloaded if nobody asks for it, in seconds since 1970; infinity is never, None not
        loaded."""
        line = self._scheduler.lines.get(name)
        left_s = self._left_s(line) if line is not None else None
        return time.time() + left_s if left_s is not None else None

    def _left_s(self, line: Line) -> float | None:
        at = self._scheduler.expires_at(line.seat) if line.seat is not None else None
        return at - asyncio.get_running_loop().time() if at is not None else None

    def state(self, name: str) -> str:
        """`loaded`, `loading` (or being fetched) or `unloaded`. One that is stopping counts as unloaded."""
        line = self._scheduler.lines.get(name)
        if line is None or line.seat is None:
            return "unloaded" if line is None or self._download(line) is None else "loading"
        return {State.READY: "loaded", State.STARTING: "loading"}.get(line.seat.state, "unloaded")

    def pinned_besides(self, names: Collection[str]) -> int:
        """How many places are held for good by models other than these."""
        return sum(seat.pinned and seat.line.name not in names for seat in self._scheduler.seats)

    def failed(self, name: str) -> str | None:
        """Why the last process of `name` could not start or crashed; None when it did not."""
        line = self._scheduler.lines.get(name)
        return line.error.message if line is not None and line.error is not None else None

    def status(self) -> list[dict[str, object]]:
        """One entry for each model that has a process, is fetched, has waiters, or failed last time. A loaded one has
        `expires_in_s`, null if it stays."""
        entries = [(line, self._download(line)) for line in self._scheduler.lines.values()]
        return [
            self._describe(line, download)
            for line, download in entries
            if line.seat is not None or line.queued or line.error is not None or download is not None
        ]

    def _describe(self, line: Line, download: Download | None) -> dict[str, object]:
        entry = _describe(line)
        if (left_s := self._left_s(line)) is not None:
            entry["expires_in_s"] = round(left_s, 1) if left_s < math.inf else None
        if download is not None:
            waiting = line.queued + self._fetching[line.name]
            entry |= {"state": "downloading", "queue": waiting, "download": download.progress}
        return entry

    # -- files from the hub ----------------------------------------------------------------------------------------

    async def _fetch(self, line: Line) -> None:
        """Return once the file of a model that comes from the hub is on this machine. Whoever leaves just leaves.

        After a failure nothing is fetched for a while; the line is refused meanwhile, as after a failed start.

        Raises: as `hub.pull`; `Overloaded` (codes `shutting_down`, `unloaded`).
        """
        if line.model.repo is None or self._is_here(line.name) or self._backs_off(line):
            return
        download = self._join(line)
        self._fetching[line.name] += 1
        try:
            await download.wait()
        finally:
            self._fetching[line.name] -= 1
        if self._scheduler.closing:
            raise _shutting_down()

    def _is_here(self, name: str) -> bool:
        """Whether it still is where it was found last; one look at the disk, and only when a process is to start."""
        path = self._files.get(name)
        return path is not None and path.exists()

    def _backs_off(self, line: Line) -> bool:
        return line.error is not None and line.backoff.wait_s(asyncio.get_running_loop().time()) > 0

    def _download(self, line: Line) -> Download | None:
        """The download under way for this model, whoever asked for it."""
        repo = line.model.repo
        return self.downloads.get(hub.download_name(repo, line.model.variant)) if repo is not None else None

    def _join(self, line: Line) -> Download:
        name, model = line.name, line.model
        assert model.repo is not None
        find, get = partial(locate, name, model), hub.work(model.repo, model.variant)

        async def work(tell: Callable[[Progress], None]) -> None:
            try:
                path = await in_thread(find)
                if path is None:
                    await get(tell)
                    path = await in_thread(find)
            except ProxyError as exc:
                self._note_failure(line, exc)
                raise
            if path is not None:
                self._files[name] = path

        return self.downloads.join(hub.download_name(model.repo, model.variant), work)

    def _note_failure(self, line: Line, error: ProxyError) -> None:
        """What the operator has to mend (no such file, no access) costs little to ask for again; the rest may cost
        gigabytes."""
        line.error = StartFailed(error.message, status=error.status, code=error.code)
        if error.status >= 500:
            line.backoff.failed(asyncio.get_running_loop().time())

    # -- life ------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Clear away what an earlier run left behind, and begin to load the models marked `preload`, pinned first."""
        await in_thread(kill_orphans)
        wanted = [(name, model) for name, model in self._config.models.items() if model.preload]
        for name, model in sorted(wanted, key=lambda item: not item[1].pinned)[: self._config.server_pool.size]:
            self.begin_load(name, model)

    async def close(self, *, drain_s: float) -> None:
        """Admit nobody, let those inside finish for up to `drain_s` seconds, then stop every process and wait for that.

        May be called again, with 0 to cut the drain short; every call returns when all is done.
        """
        self._scheduler.closing = True
        if drain_s <= 0:
            self._scheduler.quiet.set()
        if self._closer is None:
            self._closer = asyncio.get_running_loop().create_task(self._close(drain_s), name="close pool")
            self._scheduler.schedule()
        await asyncio.shield(self._closer)

    async def _close(self, drain_s: float) -> None:
        await self.downloads.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(drain_s):
                await self._scheduler.quiet.wait()
        self._scheduler.halt()
        for line in self._scheduler.lines.values():
            line.fail_all(_shutting_down)
        for task in self._tasks:
            task.cancel()
        seats = list(self._scheduler.seats)
        for seat in seats:
            seat.stop("the proxy is shutting down")
        patience_s = self._config.server_pool.stop_timeout_s + LOST_S
        stopped = await asyncio.gather(*(seat.instance.wait_stopped(patience_s) for seat in seats))
        for seat, gone in zip(seats, stopped, strict=True):
            if not gone:
                logger.error("%s: process %d does not end", seat.line.name, seat.instance.pid)
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _load_quietly(self, name: str, model: ModelConfig) -> None:
        try:
            await self.load(name, model)
        except ProxyError as exc:
            logger.warning("%s was not loaded: %s", name, exc.message.partition("\n")[0])

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("%s failed", task.get_name(), exc_info=error)


def _describe(line: Line) -> dict[str, object]:
    entry: dict[str, object] = {"model": line.name, "state": "unloaded", "queue": line.queued}
    entry["restarts"] = line.restarts
    if line.error is not None:
        entry["error"] = line.error.message
    seat = line.seat
    if seat is None:
        return entry
    instance = seat.instance
    idle_s = asyncio.get_running_loop().time() - seat.released_at
    return entry | {
        "state": str(instance.state),
        "pid": instance.pid or None,
        "port": instance.port or None,
        "leases": seat.leases,
        "last_used": round(time.time() - idle_s, 3) if math.isfinite(idle_s) else None,
        "rss_bytes": _rss_bytes(instance.pid),
        "ready_s": round(instance.load_s, 3) if instance.load_s is not None else None,
    }


def _shutting_down() -> Overloaded:
    return Overloaded("The proxy is shutting down.", code="shutting_down")


def _rss_bytes(pid: int) -> int | None:
    try:
        return int(psutil.Process(pid).memory_info().rss) if pid else None
    except psutil.Error:
        return None
