"""Documents are read in a process with limits, which no document outlives and which does not outlive the proxy."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvloop

from llama_smart_proxy.proxy.knowledge.base import Chunking, Piece, Unreadable
from llama_smart_proxy.proxy.knowledge.reading.limits import Limits
from llama_smart_proxy.proxy.knowledge.reading.reader import DocumentReader
from tests.support.formats import endless_page
from tests.support.harness import PATIENCE_S, ROOT, environment, until

MANUAL = "# Manual\n\nIntroduction.\n\n## Setup\n\n" + "Run the installer and restart. " * 10
SETUP = "Manual > Setup"
TEXT = [Piece("a\n\nText.", "a")]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture
async def reader() -> AsyncIterator[DocumentReader]:
    reader = DocumentReader(Limits(time_s=PATIENCE_S))
    yield reader
    await reader.close()


def is_worker(process: psutil.Process) -> bool:
    """Whether it is one, and lives."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE and "reading.worker" in str(process.cmdline())
    except psutil.NoSuchProcess:
        return False


def workers() -> list[psutil.Process]:
    """The workers that live."""
    return [*filter(is_worker, psutil.Process().children())]


def kill(worker: psutil.Process) -> None:
    """Returns once it has ended; the event loop need not know it yet."""
    worker.kill()
    with suppress(ChildProcessError):  # reaped already
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)


async def stopped(reader: DocumentReader) -> psutil.Process:
    """The worker for pages, which does not go on until it gets a signal."""
    assert await reader.page(b"Text.", "a") == TEXT
    [worker] = workers()
    worker.suspend()
    await until(lambda: worker.status() == psutil.STATUS_STOPPED)
    return worker


async def test_a_document_becomes_pieces_that_begin_with_their_headings(reader: DocumentReader, tmp_path: Path) -> None:
    file = tmp_path / "manual"
    file.write_text(MANUAL)
    pieces = await reader.read(file, "manual.md", chunking=Chunking(300))
    assert [piece.heading for piece in pieces] == ["Manual", SETUP, SETUP]
    assert all(piece.text.startswith(f"{piece.heading}\n\n") and len(piece.text) <= 300 for piece in pieces)
    assert isinstance(pieces[0], Piece)


async def test_relative_paths_start_where_the_proxy_is(
    reader: DocumentReader, tmp_path: Path, monkeypatch: Any
) -> None:
    (tmp_path / "a").write_text("Text.")
    monkeypatch.chdir(tmp_path)
    assert await reader.read(Path("a"), "a") == TEXT


async def test_many_documents_are_read_by_one_process(reader: DocumentReader) -> None:
    found = await asyncio.gather(*(reader.page(b"Text.", f"{number}.txt") for number in range(50)))
    assert [pieces[0].heading for pieces in found] == [f"{number}.txt" for number in range(50)]
    assert len(workers()) == 1


@LINUX
async def test_the_process_has_limits_and_nothing_of_ours(
    reader: DocumentReader, monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.setenv("SOME_SECRET", "x")
    with (tmp_path / "a").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        await reader.page(b"Text.", "a")
    [worker] = workers()
    assert set(worker.environ()) <= {"PATH", "LD_LIBRARY_PATH", "TZ", "LC_CTYPE"}
    assert sorted(os.listdir(f"/proc/{worker.pid}/fd")) == ["0", "1", "2", "3"]  # its output is 3
    limits = {"AS": 1024**3, "CORE": 0, "FSIZE": 0}
    assert {name: worker.rlimit(getattr(resource, f"RLIMIT_{name}"))[1] for name in limits} == limits
    assert worker.cwd() == "/"


async def test_a_process_that_was_killed_is_replaced(reader: DocumentReader) -> None:
    for _ in range(2):
        assert await reader.page(b"Text.", "a") == TEXT
        [worker] = workers()
        kill(worker)
    assert await reader.page(b"Text.", "a") == TEXT


async def test_a_document_during_which_the_process_ends_is_unreadable(reader: DocumentReader) -> None:
    worker = await stopped(reader)
    reading = asyncio.create_task(reader.page(b"Text.", "a"))
    waiting = asyncio.create_task(reader.page(b"Text.", "a"))
    await asyncio.sleep(0)
    worker.send_signal(signal.SIGSEGV)
    worker.resume()
    with pytest.raises(Unreadable, match="SIGSEGV"):
        await reading
    assert await waiting == TEXT


async def test_a_document_that_takes_too_long_is_given_up() -> None:
    reader = DocumentReader(Limits(time_s=1))
    await stopped(reader)
    with pytest.raises(Unreadable, match="takes more than 1 s to read"):
        await reader.page(b"Text.", "a")
    await until(lambda: not workers())
    await reader.close()


async def test_a_read_that_was_cancelled_leaves_the_next_one_alone(reader: DocumentReader) -> None:
    await stopped(reader)
    reading = asyncio.create_task(reader.page(b"Text.", "a"))
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert await reader.page(b"Text.", "a") == TEXT


async def test_a_page_does_not_wait_for_documents(reader: DocumentReader, tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("Text.")
    assert await reader.read(file, "a") == TEXT
    [worker] = workers()
    worker.suspend()
    reading = asyncio.create_task(reader.read(file, "a"))
    assert await reader.page(b"Text.", "a") == TEXT
    assert not reading.done()
    worker.resume()
    assert await reading == TEXT


@pytest.mark.parametrize(
    ("limits", "content", "name", "reason"),
    [
        (Limits(processor_s=1), endless_page(), "a.html", "takes more than 1 s of processor time"),
        (Limits(text_mib=1), b"word and more\n" * 100_000, "a.txt", "contains more than 1 MiB of text"),
    ],
)
async def test_a_document_that_uses_up_a_limit_is_unreadable(
    limits: Limits, content: bytes, name: str, reason: str
) -> None:
    reader = DocumentReader(limits)
    with pytest.raises(Unreadable, match=reason):
        await reader.page(content, name)
    assert await reader.page(b"Text.", "a") == TEXT
    await reader.close()


async def test_a_document_that_uses_up_the_memory_is_unreadable(reader: DocumentReader, tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.touch()
    os.truncate(file, 2 * 1024**3)
    with pytest.raises(Unreadable, match="requires more than 1024 MiB of memory"):
        await reader.read(file, "a")
    file.write_text("Text.")
    assert await reader.read(file, "a") == TEXT


async def test_the_process_ends_when_it_has_nothing_to_do() -> None:
    reader = DocumentReader(Limits(idle_s=0))
    for _ in range(2):
        assert await reader.page(b"Text.", "a") == TEXT
        await until(lambda: not workers())
    await reader.close()


async def _killed_again_and_again() -> tuple[int, int]:
    """How many file descriptors were open before and after some processes were killed."""
    reader = DocumentReader()
    counts = []
    for times in (1, 3):
        for _ in range(times):
            await reader.page(b"Text.", "a")
            [worker] = workers()
            kill(worker)
        await reader.page(b"Text.", "a")
        await reader.close()
        await until(lambda: not workers())
        counts.append(len(os.listdir("/proc/self/fd")))
    return counts[0], counts[1]


@LINUX
@pytest.mark.parametrize(
    "factory", [uvloop.new_event_loop, pytest.param(asyncio.new_event_loop, marks=pytest.mark.full)]
)
def test_no_descriptor_is_lost(factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
    with asyncio.Runner(loop_factory=factory) as runner:
        ask: Coroutine[Any, Any, tuple[int, int]] = _killed_again_and_again()
        before, after = runner.run(ask)
    assert after <= before


@LINUX
def test_the_process_ends_with_the_proxy() -> None:
    code = (
        "import asyncio\n"
        "from llama_smart_proxy.proxy.knowledge.reading.reader import DocumentReader\n"
        "async def main():\n"
        "    await DocumentReader().page(b'Text.', 'a')\n"
        "    print('ready', flush=True)\n"
        "    await asyncio.sleep(1000)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT, env=environment()) as proxy:
        assert proxy.stdout is not None and proxy.stdout.readline() == b"ready\n"
        [worker] = psutil.Process(proxy.pid).children()
        worker.suspend()  # so that it does not notice the end of its input
        proxy.kill()
    assert psutil.wait_procs([worker], timeout=PATIENCE_S)[1] == []
