"""Downloads: one for all who want the same, which live as long as somebody wants them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field

import pytest

from llama_smart_proxy.backends.weights.downloads import Download, Downloads, Progress
from llama_smart_proxy.proxy.errors import Overloaded, StartFailed
from tests.support.harness import until


@dataclass
class Job:
    """A download that does what it is told. `tell` is there once it has begun."""

    begun: int = 0
    broken_off: int = 0
    tell: Callable[[Progress], None] = print
    over: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    async def work(self, tell: Callable[[Progress], None]) -> None:
        self.begun += 1
        self.tell = tell
        try:
            await self.over
        except asyncio.CancelledError:
            self.broken_off += 1
            raise


def far(completed: int) -> Progress:
    return {"status": "pulling x", "digest": "sha256:x", "total": 10, "completed": completed}


async def seen(download: Download) -> list[Progress]:
    return [progress async for progress in download.watch()]


async def begun(downloads: Downloads, job: Job) -> Download:
    download = downloads.join("m", job.work)
    await until(lambda: job.begun == 1)
    return download


async def test_fifty_watchers_share_one_download_and_each_sees_its_end() -> None:
    downloads, job = Downloads(), Job()
    watchers = [asyncio.ensure_future(seen(downloads.join("m", job.work))) for _ in range(50)]
    await until(lambda: job.begun == 1)
    assert downloads.status() == [{"model": "m", "status": "pulling manifest"}]
    job.tell(far(3))
    await asyncio.sleep(0)
    assert downloads.status() == [{"model": "m", **far(3)}]
    job.over.set_result(None)
    assert await asyncio.gather(*watchers) == [[{"status": "pulling manifest"}, far(3)]] * 50
    assert job.begun == 1 and downloads.status() == [] and downloads.get("m") is None


async def test_a_slow_reader_sees_the_newest_only() -> None:
    downloads, job = Downloads(), Job()
    download = await begun(downloads, job)
    async with aclosing(download.watch()) as progress:
        await anext(progress)
        for completed in range(5):
            job.tell(far(completed))
        assert await anext(progress) == far(4)
    await downloads.close()


async def test_what_goes_wrong_is_told_to_all() -> None:
    downloads, job = Downloads(), Job()
    download = await begun(downloads, job)
    waiting = [asyncio.ensure_future(download.wait()), asyncio.ensure_future(seen(download))]
    await asyncio.sleep(0)
    job.over.set_exception(StartFailed("no space", code="no_space"))
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [getattr(result, "code", None) for result in results] == ["no_space", "no_space"]
    with pytest.raises(StartFailed):
        await download.wait()
    assert download.error is not None and job.broken_off == 0


async def test_a_watcher_who_leaves_leaves_the_others_their_download() -> None:
    downloads, job = Downloads(), Job()
    download = await begun(downloads, job)
    one, other = asyncio.ensure_future(seen(download)), asyncio.ensure_future(seen(download))
    await asyncio.sleep(0)
    one.cancel()
    await asyncio.wait({one})
    assert downloads.get("m") is download
    job.over.set_result(None)
    assert await other == [{"status": "pulling manifest"}] and job.broken_off == 0


async def test_a_waiter_who_leaves_leaves_the_download() -> None:
    downloads, job = Downloads(), Job()
    download = await begun(downloads, job)
    waiter = asyncio.ensure_future(download.wait())
    await asyncio.sleep(0)
    waiter.cancel()
    await asyncio.wait({waiter})
    assert downloads.get("m") is download and job.broken_off == 0
    job.over.set_result(None)
    await download.wait()
    assert download.progress == {"status": "success"}


async def test_the_last_watcher_to_leave_ends_it_and_the_next_one_begins_another() -> None:
    downloads, job = Downloads(), Job()
    download = await begun(downloads, job)
    async with aclosing(download.watch()) as progress:
        await anext(progress)
    assert download.stopping and downloads.get("m") is None
    again = Job()
    other = await begun(downloads, again)
    assert other is not download
    await until(lambda: job.broken_off == 1)
    assert downloads.get("m") is other
    again.over.set_result(None)
    await other.wait()


async def test_stopping_tells_all_why() -> None:
    downloads, job = Downloads(), Job()
    download = await begun(downloads, job)
    waiting = [asyncio.ensure_future(download.wait()) for _ in range(3)]
    await asyncio.sleep(0)
    download.stop(Overloaded("unloaded", code="unloaded"))
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [getattr(result, "code", None) for result in results] == ["unloaded"] * 3


async def test_closing_ends_all_and_begins_no_more() -> None:
    downloads, job, early = Downloads(), Job(), Job()
    download = await begun(downloads, job)
    waiter = asyncio.ensure_future(download.wait())
    await asyncio.sleep(0)
    downloads.join("not begun yet", early.work)
    await downloads.close()
    with pytest.raises(Overloaded) as refused:
        await waiter
    assert refused.value.code == "shutting_down" and (job.broken_off, early.begun) == (1, 0)
    with pytest.raises(Overloaded):
        downloads.join("m", job.work)


async def test_the_log_tells_of_downloads_that_move_bytes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "llama_smart_proxy.backends.weights.downloads")
    for moves in (False, True):
        downloads, job = Downloads(), Job()
        download = await begun(downloads, job)
        if moves:
            job.tell(far(1))
        job.over.set_result(None)
        await download.wait()
    assert [record.getMessage() for record in caplog.records] == ["m: download begins", "m: download complete"]
