"""The server processes of the proxy, as requests and operators see them. `pool.scheduler` decides."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from itertools import zip_longest
from pathlib import Path

from llama_smart_proxy.backends.base import UpstreamRequest
from llama_smart_proxy.backends.journal import StepKind, noted
from llama_smart_proxy.backends.pool import status
from llama_smart_proxy.backends.pool.ending import LOST_S
from llama_smart_proxy.backends.pool.instance import State
from llama_smart_proxy.backends.pool.launcher import PoolModel, Source
from llama_smart_proxy.backends.pool.load_times import LoadTimes
from llama_smart_proxy.backends.pool.news import News
from llama_smart_proxy.backends.pool.orphans import kill_orphans
from llama_smart_proxy.backends.pool.output import Output
from llama_smart_proxy.backends.pool.queue import Lease, ModelQueue
from llama_smart_proxy.backends.pool.readiness import read_within
from llama_smart_proxy.backends.pool.scheduler import Scheduler
from llama_smart_proxy.backends.pool.sockets import SocketFolder, remove_stale
from llama_smart_proxy.backends.pool.waited import journaled
from llama_smart_proxy.backends.pool.waits import Wait
from llama_smart_proxy.backends.progress import described
from llama_smart_proxy.backends.threads import begin_in_thread, log_failure, run_in_thread
from llama_smart_proxy.backends.weights.downloads import Download, Downloads, Progress
from llama_smart_proxy.proxy.config import PoolConfig
from llama_smart_proxy.proxy.errors import BadRequest, Overloaded, ProxyError, StartFailed

logger = logging.getLogger(__name__)

LOAD = UpstreamRequest("GET", "/", slot=False)
"""Stands in the queue for a load, which sends nothing."""


class Pool:
    """At most `size` server processes, and `helpers` beside them, one for a model, started on demand and evicted when
    idle.

    Requests for a model are served in the order of their arrival, background prompts after all others; a model that is
    loading or busy delays no other. One that is not on this machine is fetched, once for all requests that wait, before
    it takes a place. Use it from the event loop of the main thread.
    """

    def __init__(self, config: PoolConfig, downloads: Downloads | None = None, times: LoadTimes | None = None) -> None:
        self.downloads = downloads or Downloads()
        self.times = times or LoadTimes(self.downloads.feed)
        self._news = News(self.downloads.feed, self.times, lambda queue: self._download(queue) is not None)
        self._scheduler = Scheduler(config, self._news)
        self._fetching: Counter[str] = Counter()  # how many requests wait for a download, by model
        self._files: dict[str, Path] = {}  # where they were found last, by download
        self._looks: dict[str, asyncio.Future[bool]] = {}  # whether they still are there
        self._tasks: set[asyncio.Task[None]] = set()
        self._closer: asyncio.Task[None] | None = None
        self.sockets = SocketFolder()
        """For the processes that are reached by unix sockets."""

    def configure(self, config: PoolConfig, models: Iterable[PoolModel] | None = None) -> list[str]:
        """Replace the size, the limits and the models. See `Scheduler.configure`."""
        before = {queue.name: queue.model.source for queue in self._scheduler.queues.values()}
        replaced = self._scheduler.configure(config, models)
        for queue in self._scheduler.queues.values():
            source = before[queue.name]
            if source is None or source.is_of(queue.model) or not self._fetching[queue.name]:
                continue
            if (download := self.downloads.get(source.download)) is not None:
                download.stop(Overloaded(f"Model '{queue.name}' has another source now.", code="unloaded"))
        return replaced

    # -- for requests ----------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def lease(self, model: PoolModel, request: UpstreamRequest) -> AsyncIterator[Lease]:
        """Hold the instance of `model`, which is not stopped while held. Waits until it is loaded and has room.

        A request with `slot` occupies one of the server's parallel slots, which the lease names. Leaving, also by
        cancellation, releases everything at once; a load that was begun goes on. Without `wait` the lease is available
        now or not at all: a request that holds one model and waits for another may wait for itself.

        Raises: `Overloaded` (codes `overloaded`, `queue_timeout`, `shutting_down`, `unloaded`, `no_slot_now`),
        `StartFailed`, `ModelNotFound` when its source does not have it, `BadRequest` when it is not loaded and the
        configuration disables `autoload`.
        """
        if self._scheduler.closing:
            raise _shutting_down()
        if request.task is not None:
            request.task.arrives()
        queue = self._scheduler.queue(model)
        place = queue.place
        if place is not None and self._scheduler.admits(queue, place, request):
            lease = place.take(request)
        elif not request.wait:
            message = f"Model '{model.name}' has no free slot now, and this call must not wait."
            raise Overloaded(message, code="no_slot_now")
        else:
            again = request.task is not None and request.task.breaks > 0
            if not again and self._scheduler.queued + self._fetching.total() >= self._scheduler.config.queue_limit:
                raise Overloaded("Too many requests are waiting for a model; try again later.")
            if not self._scheduler.config.autoload and (place is None or queue.cold or place.unloading):
                message = f"model '{model.name}' is not loaded, and server_pool.autoload is false"
                raise BadRequest(f"{message}; POST /models/load loads it", code="model_not_loaded", param="model")
            if place is None:
                await self._fetch(queue, request)
            lease = await self._wait(queue, request)
        lease.serves(request, asyncio.get_running_loop().time())
        try:
            yield lease
        finally:
            self._scheduler.release(lease)

    async def _wait(self, queue: ModelQueue, request: UpstreamRequest) -> Lease:
        """Wait in the queue; return with the lease taken."""
        with journaled(queue, self._scheduler.rivals(queue), request):
            waiter = self._scheduler.enqueue(queue, request)
            try:
                with described(request.progress, lambda: Wait(waiter, queue, self._scheduler, self.times)):
                    return await waiter.future
            except asyncio.CancelledError:
                if waiter.granted:  # in the very moment it was cancelled
                    self._scheduler.release(waiter.future.result())
                raise
            finally:
                self._scheduler.leave(queue, waiter)

    def retire(self, lease: Lease, reason: str) -> None:
        """The server of `lease` accepts no connections any more: it gets no further requests, and is replaced once the
        answers under way are complete."""
        if lease.place.open:
            logger.error("%s: is replaced: %s", lease.place.queue.name, reason)
            lease.place.retire(asyncio.get_running_loop().time())

    # -- for operators ---------------------------------------------------------------------------------------------

    async def load(self, model: PoolModel) -> int:
        """Return once `model` is loaded, with its number of slots; `queue_limit` does not apply.

        Raises: as `lease`.
        """
        if self._scheduler.closing:
            raise _shutting_down()
        queue = self._scheduler.queue(model)
        if queue.place is None:
            await self._fetch(queue, LOAD)
        if queue.place is not None and queue.place.open:
            lease = queue.place.take(LOAD)  # that is a use, too: its time to live begins anew
        else:
            lease = await self._wait(queue, LOAD)
        slots = lease.instance.slots
        self._scheduler.release(lease)
        return slots

    def begin_load(self, model: PoolModel) -> None:
        """Load `model` in the background. What goes wrong is logged, and returned by `failed()`."""
        task = asyncio.get_running_loop().create_task(self._load_quietly(model), name=f"load {model.name}")
        self._tasks.add(task)
        task.add_done_callback(self._forget)

    async def begin_download(self, model: PoolModel) -> Download | None:
        """The download of the files of `model`: the one under way, or a new one. None when they are on this machine, or
        have no source.
        """
        if model.source is None or await run_in_thread(model.source.find) is not None:
            return None
        return self._join(self._scheduler.queue(model), model.source, counts=True)

    async def unload(self, name: str) -> None:
        """Free the place of `name`; nothing if it has none.

        One in use accepts no more requests and is stopped after its last answer, which this does not wait for; an idle
        one has stopped when this returns. A load under way is broken off, also a download for it, and the requests that
        wait for it fail (`Overloaded`, code `unloaded`).
        """
        queue = self._scheduler.queues.get(name)
        place = queue.place if queue is not None else None
        if queue is not None and (download := self._download(queue)) is not None and download.persistent:
            download.stop(Overloaded(f"Model '{name}' was unloaded while it was fetched.", code="unloaded"))
        if queue is None or place is None:
            return
        if place.state is State.STARTING:
            message = f"Model '{name}' was unloaded while it was loading."
            queue.fail_all(lambda: Overloaded(message, code="unloaded"))
        place.retire(asyncio.get_running_loop().time())
        self._scheduler.idling.check(place)
        if place.leases == 0:
            await place.instance.wait_stopped()

    def set_keep_alive(self, model: PoolModel, seconds: float) -> None:
        """Keep the process of `model` for `seconds` when idle; infinity is for ever. See `Idling.set_keep_alive`."""
        self._scheduler.idling.set_keep_alive(self._scheduler.queue(model), seconds)

    def expires_at(self, name: str) -> float | None:
        """When `name` will be unloaded if no request arrives, in seconds since 1970; infinity is never, None not
        loaded."""
        queue = self._scheduler.queues.get(name)
        left_s = self._left_s(queue) if queue is not None else None
        return time.time() + left_s if left_s is not None else None

    def _left_s(self, queue: ModelQueue) -> float | None:
        at = self._scheduler.idling.expires_at(queue.place) if queue.place is not None else None
        return at - asyncio.get_running_loop().time() if at is not None else None

    def state(self, name: str) -> str:
        """As of `News.state`."""
        queue = self._scheduler.queues.get(name)
        return self._news.state(queue) if queue is not None else "unloaded"

    def fitting(self, names: Collection[str]) -> list[list[str]]:
        """Models of the pool in groups that can be loaded at one time; first those that are loaded."""
        groups: list[list[str]] = []
        for area in self._scheduler.areas():
            own = [name for name in names if area.helpers in (None, self._scheduler.is_helper(name))]
            order = sorted(dict.fromkeys(own), key=lambda name: "" if self.state(name) == "loaded" else name)
            others = [place for place in area.of(self._scheduler.places) if place.queue.name not in names]
            room = max(1, area.size - sum(place.pinned for place in others))
            parts = [order[start : start + room] for start in range(0, len(order), room)]
            groups = [[*(one or ()), *(other or ())] for one, other in zip_longest(groups, parts)]
        return groups

    def first(self, models: Sequence[PoolModel]) -> list[PoolModel]:
        """The first of them, as many as there are places."""
        return [model for area in self._scheduler.areas() for model in area.of(models)[: area.size]]

    def failed(self, name: str) -> str | None:
        """Why the last process of `name` could not start or crashed; None when it did not."""
        queue = self._scheduler.queues.get(name)
        return queue.error.message if queue is not None and queue.error is not None else None

    def output(self, model: PoolModel) -> Output:
        """What the processes of `model` print."""
        return self._scheduler.queue(model).output

    def status(self) -> list[dict[str, object]]:
        """One entry for each model that has a process, is fetched, has waiters, or failed last time. A loaded one has
        `expires_in_s`, null if it stays."""
        entries = [(queue, self._download(queue)) for queue in self._scheduler.queues.values()]
        return [
            self._describe(queue, download)
            for queue, download in entries
            if queue.place is not None or queue.length or queue.error is not None or download is not None
        ]

    def totals(self) -> list[dict[str, object]]:
        """As `status.totals`, for all models."""
        return status.totals(self._scheduler.queues.values())

    def _describe(self, queue: ModelQueue, download: Download | None) -> dict[str, object]:
        entry = status.described(queue)
        if (left_s := self._left_s(queue)) is not None:
            entry["expires_in_s"] = round(left_s, 1) if left_s < math.inf else None
        if download is not None:
            waiting = queue.length + self._fetching[queue.name]
            entry |= {"state": "downloading", "queue": waiting, "download": download.progress}
        return entry

    # -- files that are downloaded ---------------------------------------------------------------------------------

    async def _fetch(self, queue: ModelQueue, request: UpstreamRequest) -> None:
        """Return once the files of a model that has a source are on this machine. A request that leaves does not
        stop the download.

        After a failure nothing is fetched for a while; the queue is refused meanwhile, as after a failed start.

        Raises: as the source's `fetch`; `Overloaded` (codes `shutting_down`, `unloaded`).
        """
        source = queue.model.source
        if source is None or self._backs_off(queue) or await self._is_here(queue.name, source):
            return
        download = self._join(queue, source, counts=False)
        self._fetching[queue.name] += 1
        try:
            with described(request.progress, download.described), noted(request.journal, StepKind.DOWNLOAD, queue.name):
                await download.wait()
        except ProxyError:
            if source.is_of(queue.model):
                raise
        finally:
            self._fetching[queue.name] -= 1
        if self._scheduler.closing:
            raise _shutting_down()
        if not source.is_of(queue.model):  # a new configuration names another one
            await self._fetch(queue, request)

    async def _is_here(self, name: str, source: Source) -> bool:
        """Whether it still is where it was found last; one look at the disk, and only when a process is to start. All
        that wait share it, as each takes a thread, for ever if the disk does not answer."""
        path = self._files.get(source.download)
        if path is None:
            return False
        look = self._looks.get(source.download)
        if look is None:
            look = self._looks[source.download] = begin_in_thread(partial(_exists, path))
            look.add_done_callback(lambda _: self._looks.pop(source.download))
        return await read_within(self._scheduler.config, name, asyncio.shield(look))

    def _backs_off(self, queue: ModelQueue) -> bool:
        return queue.error is not None and queue.backoff.wait_s(asyncio.get_running_loop().time()) > 0

    def _download(self, queue: ModelQueue) -> Download | None:
        """The download under way for this model, which any request may have caused."""
        source = queue.model.source
        return self.downloads.get(source.download) if source is not None else None

    def _join(self, queue: ModelQueue, source: Source, *, counts: bool) -> Download:
        async def work(report: Callable[[Progress], None]) -> None:
            path = await read_within(self._scheduler.config, queue.name, run_in_thread(source.find))
            if path is None:
                self.downloads.admit(source.download)
            try:
                if path is None:
                    await source.fetch(report)
                    path = await run_in_thread(source.find)
            except ProxyError as exc:
                if source.is_of(queue.model):
                    self._note_failure(queue, exc)
                raise
            if path is not None:
                self._files[source.download] = path

        before = self.downloads.get(source.download)
        download = self.downloads.join(source.download, work, counts=counts)
        if download is not before:
            download.on_end(lambda: self._news.changed(queue))
            self._news.changed(queue)
        return download

    def _note_failure(self, queue: ModelQueue, error: ProxyError) -> None:
        """What the operator has to correct (no such file, no access) is cheap to repeat; the rest may cost
        gigabytes."""
        queue.error = StartFailed(error.message, status=error.status, code=error.code)
        if error.status >= 500:
            queue.backoff.failed(asyncio.get_running_loop().time())

    # -- life ------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Clear away what an earlier run left behind."""
        await run_in_thread(kill_orphans)
        await run_in_thread(remove_stale)

    async def close(self, *, drain_s: float) -> None:
        """Accept no requests, let those under way finish for up to `drain_s` seconds, then stop every process and wait
        for that.

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
        for queue in self._scheduler.queues.values():
            queue.fail_all(_shutting_down)
        for task in self._tasks:
            task.cancel()
        places = list(self._scheduler.places)
        for place in places:
            place.stop("the proxy is shutting down")
        limits_s = [place.instance.stop_timeout_s + 2 * LOST_S for place in places]  # then each is known to have ended
        waits = [place.instance.wait_stopped(limit_s) for place, limit_s in zip(places, limits_s, strict=True)]
        await asyncio.gather(*waits)
        if self._tasks:
            await asyncio.wait(self._tasks)
        self.sockets.close()

    async def _load_quietly(self, model: PoolModel) -> None:
        try:
            await self.load(model)
        except ProxyError as exc:
            logger.warning("%s was not loaded: %s", model.name, exc.message.partition("\n")[0])

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        log_failure(logger, task)


def _shutting_down() -> Overloaded:
    return Overloaded("The proxy is shutting down.", code="shutting_down")


def _exists(path: Path) -> bool:
    with suppress(OSError):
        return path.exists()
    return False
