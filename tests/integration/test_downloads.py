"""Downloads: one for all who want the same, which live as long as somebody wants them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field

import pytest

from llama_smart_proxy.backends.weights.downloads import MOST, Download, Downloads, Progress
from llama_smart_proxy.proxy.errors import AgentError, ModelNotFound, Overloaded, StartFailed, UpstreamRefused, let_go
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


FAILURES = [
    StartFailed("gone", status=504, code="x", log=["a"]),
    UpstreamRefused("gone", status=418, details={"a": 1}),
    ModelNotFound("gone", hint="there are others"),
    AgentError("a", "gone"),
    OSError(2, "gone"),
]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
async def test_letting_go_of_a_failure_ends_no_other_that_waited_for_the_same(failure: Exception) -> None:
    """A waiter may do something about it before it passes it on, as an agent does that has another model."""
    downloads, job = Downloads(), Job()
    download, goes_on = await begun(downloads, job), [asyncio.Event(), asyncio.Event()]

    async def agent(event: asyncio.Event) -> None:
        try:
            await download.wait()
        except Exception:
            await event.wait()
            raise

    async def request(event: asyncio.Event) -> Exception:
        try:
            await agent(event)
        except Exception as exc:
            let_go(exc)
            return exc
        raise AssertionError("it has failed")

    requests = [asyncio.ensure_future(request(event)) for event in goes_on]
    await asyncio.sleep(0)  # until both wait
    job.over.set_exception(failure)
    await until(lambda: download.ended)
    for event, waiting in zip(goes_on, requests, strict=True):
        event.set()
        raised = await asyncio.wait_for(waiting, 10)
        assert (type(raised), raised.args, raised.__dict__) == (type(failure), failure.args, failure.__dict__)


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


async def ended(download: Download) -> bool:
    with pytest.raises(Overloaded):
        await download.wait()
    return download.ended


async def test_downloads_have_a_limit_and_each_end_makes_room() -> None:
    downloads, jobs = Downloads(), [Job() for _ in range(MOST)]
    running = [downloads.join(str(number), job.work) for number, job in enumerate(jobs)]
    for _ in range(3):
        with pytest.raises(Overloaded) as refused:
            downloads.join("more", Job().work)
        assert (refused.value.status, refused.value.code) == (429, "too_many_downloads")
    assert downloads.join("3", Job().work) is running[3]
    await until(lambda: all(job.begun for job in jobs))
    jobs[0].over.set_result(None)
    jobs[1].over.set_exception(StartFailed("no space"))
    jobs[2].over.set_exception(RuntimeError("a bug"))
    running[3].stop(Overloaded("stopped"))
    for download in running[:4]:
        await asyncio.wait({download._task})
    await asyncio.sleep(0)
    again = [downloads.join(f"again {number}", Job().work) for number in range(4)]
    with pytest.raises(Overloaded):
        downloads.join("more", Job().work)
    again[0].stop(Overloaded("before its first step"))
    assert await ended(again[0])
    downloads.join("more", Job().work)
    await downloads.close()


async def test_a_download_that_only_looks_counts_once_it_has_found_that_it_has_to_download() -> None:
    downloads = Downloads()
    looking = [downloads.join(f"looking {number}", Job().work, counts=False) for number in range(MOST)]
    for number in range(MOST):
        downloads.join(str(number), Job().work)
    with pytest.raises(Overloaded):
        downloads.admit("looking 0")
    with pytest.raises(Overloaded):
        downloads.join("looking 0", Job().work)
    counted = downloads.join("0", Job().work)
    for download in (looking[0], counted):
        download.stop(Overloaded("stopped"))
        assert await ended(download)
    await asyncio.sleep(0)
    downloads.admit("looking 1")
    downloads.admit("looking 1")
    with pytest.raises(Overloaded):
        downloads.admit("looking 2")
    await downloads.close()
