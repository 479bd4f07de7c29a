"""Children: how they are made, watched and ended, one at a time and without a pool."""

from __future__ import annotations

import ast
import asyncio
import concurrent.futures
import inspect
import itertools
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvloop

from llama_smart_proxy.backends.pool.logring import LINE_BYTES, LINES, LogRing
from llama_smart_proxy.backends.pool.orphans import OWNER
from llama_smart_proxy.backends.pool.spawn import Child, spawn
from llama_smart_proxy.proxy.cli import simulate
from llama_smart_proxy.proxy.errors import StartFailed
from llama_smart_proxy.proxy.knowledge.reading import process
from tests.support.harness import PATIENCE_S, ROOT, until
from tests.support.pools import Fakes, children, open_fds

SLEEP = ["/bin/sh", "-c", "exec sleep 1000"]
ENV = {"PATH": os.environ["PATH"]}


class Watched:
    """A child, with what it printed and how it ended."""

    def __init__(self, argv: list[str], env: dict[str, str] | None = None) -> None:
        self.ring = LogRing()
        self.bytes = 0
        self.ended: list[int] = []
        self.child: Child = spawn(argv, ENV | (env or {}), self._output, self.ended.append)

    def _output(self, data: bytes) -> None:
        self.bytes += len(data)
        self.ring.feed(data)


@pytest.fixture
async def watch() -> AsyncIterator[Callable[..., Watched]]:
    """Makes children, and ends them after the test."""
    made: list[Watched] = []

    def make(argv: list[str], env: dict[str, str] | None = None) -> Watched:
        made.append(Watched(argv, env))
        return made[-1]

    yield make
    for watched in made:
        watched.child.kill()
        await watched.child.wait()


def alive(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


Watch = Callable[..., Watched]


async def test_output_and_exit_code_are_noticed(watch: Watch) -> None:
    watched = watch(["/bin/sh", "-c", "echo out; echo err >&2; printf last; exit 7"])
    assert await watched.child.wait() == 7
    assert watched.ended == [7]
    assert watched.ring.tail() == ["out", "err", "last"]


async def test_a_signal_is_a_negative_return_code(watch: Watch) -> None:
    watched = watch(SLEEP)
    watched.child.terminate()
    assert await watched.child.wait() == -signal.SIGTERM


async def test_a_missing_program_says_so_and_exits_127(watch: Watch) -> None:
    watched = watch(["/no/such/program", "--port", "1"])
    assert await watched.child.wait() == 127
    assert watched.ring.tail() == ["cannot run /no/such/program: No such file or directory"]


async def test_signals_after_the_end_are_harmless(watch: Watch) -> None:
    watched = watch(["/bin/true"])
    await watched.child.wait()
    watched.child.terminate()
    watched.child.kill()
    assert await watched.child.wait() == 0


async def test_end_is_noticed_without_pidfds(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(pid: int) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", unsupported)
    watched = watch(["/bin/sh", "-c", "echo here; exit 3"])
    async with asyncio.timeout(PATIENCE_S):
        assert await watched.child.wait() == 3
    assert watched.ring.tail() == ["here"]


def test_all_of_it_works_on_uvloop(tmp_path: Path) -> None:
    async def life() -> None:
        for how, code in (("exit 5", 5), ("kill -9 $$", -9)):
            watched = Watched(["/bin/sh", "-c", f"echo hello; {how}"])
            assert await watched.child.wait() == code
            assert watched.ring.tail() == ["hello"]

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(life())


async def test_a_grandchild_that_holds_the_pipe_delays_nothing(watch: Watch, tmp_path: Path) -> None:
    fakes = Fakes(tmp_path)
    env = {"FAKE_FORK": "setsid", "FAKE_EXIT": "3", "FAKE_LOG": str(fakes.log)}
    watched = watch([str(fakes.program)], env)
    async with asyncio.timeout(PATIENCE_S):
        assert await watched.child.wait() == 3
    await until(lambda: fakes.events("fork"), what="the grandchild")
    os.kill(fakes.events("fork")[0]["pid"], signal.SIGKILL)


async def test_what_is_left_of_the_group_ends_with_the_child(watch: Watch, tmp_path: Path) -> None:
    fakes = Fakes(tmp_path)
    watched = watch([str(fakes.program)], {"FAKE_FORK": "1", "FAKE_NEVER": "nobind", "FAKE_LOG": str(fakes.log)})
    await until(lambda: fakes.events("fork"), what="the grandchild")
    os.kill(watched.child.pid, signal.SIGKILL)  # the child alone, not its group
    async with asyncio.timeout(PATIENCE_S):
        await watched.child.wait()
    await until(lambda: not alive(fakes.events("fork")[0]["pid"]), what="the end of the grandchild")


async def test_children_outlive_the_threads_of_executors(watch: Watch) -> None:
    made = []
    for _ in range(50):
        with concurrent.futures.ThreadPoolExecutor(4) as executor:
            done = [executor.submit(time.monotonic) for _ in range(4)]
            made.append(watch(SLEEP))
            concurrent.futures.wait(done)
    await asyncio.to_thread(time.monotonic)
    assert [watched.ended for watched in made] == [[]] * 50
    assert all(alive(watched.child.pid) for watched in made)


async def test_other_threads_may_not_spawn() -> None:
    def attempt() -> None:
        with pytest.raises(RuntimeError, match="main thread"):
            spawn(SLEEP, ENV, lambda data: None, lambda code: None)

    await asyncio.to_thread(attempt)


def place(what: Callable[..., object]) -> str:
    """The file that defines `what`."""
    return Path(inspect.getfile(what)).resolve().relative_to(ROOT).as_posix()


def test_the_project_makes_processes_in_one_place() -> None:
    makers = {"Popen", "fork", "forkpty", "posix_spawn", "posix_spawnp", "system", "popen", "startfile"}
    makers |= {"create_subprocess_exec", "create_subprocess_shell", "subprocess_exec", "subprocess_shell"}
    found = set()
    for room in ("proxy", "backends", "agents"):
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                called = node.func if isinstance(node, ast.Call) else node  # a variable may be called `system`
                name = getattr(called, "attr", None) or (called is not node and getattr(called, "id", None))
                if name == "system" and ast.unparse(called) == "request.system":
                    continue  # a chat's system prompt
                if name in makers:
                    found.add(path.relative_to(ROOT).as_posix())
    starts_a_proxy = {place(simulate.run)}
    assert found - starts_a_proxy == {place(spawn), place(process.Worker)}, "models, and the reader of documents"


@contextmanager
def few_files(more: int) -> Iterator[None]:
    """Leave room for only so many `more` file descriptors."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = {int(name) for name in os.listdir("/proc/self/fd")}
    free = [number for number in range(len(used) + more + 1) if number not in used]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[more], limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


async def test_no_file_descriptors_left_is_a_clean_failure(watch: Watch) -> None:
    await watch(["/bin/true"]).child.wait()
    before, failures = open_fds(), 0
    for more in range(12):
        try:
            with few_files(more):
                watched = watch(["/bin/true"])
        except StartFailed as exc:
            assert exc.code == "spawn_failed"
            assert exc.status == 503
            failures += 1
            assert open_fds() <= before
            assert not children()
        else:
            assert await watched.child.wait() == 0
            assert open_fds() <= before
    assert 3 <= failures < 12


FORK_FAILS = """
import asyncio, os, subprocess, sys
subprocess._USE_VFORK = False  # what is made to fail is fork()
from llama_smart_proxy.backends.pool.spawn import spawn
from llama_smart_proxy.proxy.errors import StartFailed
async def main():
    before = os.listdir("/proc/self/fd")
    for _ in range(20):
        try:
            spawn(["/bin/true"], {}, lambda data: None, lambda code: None)
        except StartFailed as exc:
            assert exc.code == "spawn_failed"
    assert os.listdir("/proc/self/fd") == before
    print("clean")
asyncio.run(main())
"""


def test_a_failing_fork_is_a_clean_failure() -> None:
    fiu = shutil.which("fiu-run")
    if fiu is None:
        pytest.skip("fiu-run (Debian package fiu-utils) is not installed")
    python = os.path.realpath(sys.executable)
    command = [fiu, "-x", "-c", "enable name=posix/proc/fork", python, "-c", FORK_FAILS]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=env)
    assert done.stdout == "clean\n", done.stderr


async def turns_meanwhile(until_done: Coroutine[Any, Any, None]) -> int:
    """How often something else had its turn in the event loop, asking for one each 10 ms, while that ran."""
    task = asyncio.ensure_future(until_done)
    turns = 0
    while not task.done():
        await asyncio.wait({task}, timeout=0.01)
        turns += 1
    await task
    return turns


@pytest.mark.parametrize("seconds", [1.5, pytest.param(10, marks=pytest.mark.full)])
async def test_a_flood_of_output_blocks_neither_side(watch: Watch, tmp_path: Path, seconds: float) -> None:
    fakes = Fakes(tmp_path)
    rss = psutil.Process().memory_info().rss
    watched = watch([str(fakes.program)], {"FAKE_SPAM": "100", "FAKE_NEVER": "nobind"})
    wanted = int(seconds * 100e6)
    turns = await turns_meanwhile(until(lambda: watched.bytes >= wanted, 90, what="a flood of output"))
    assert turns > 10 * seconds  # of a hundred, if the flood came as quickly as it was meant to
    assert psutil.Process().memory_info().rss - rss < 32 * 2**20
    assert sum(map(len, watched.ring.tail())) <= LINE_BYTES


async def test_a_child_has_nothing_it_should_not_have(watch: Watch) -> None:
    held = os.dup(0)
    os.set_inheritable(held, True)
    watched = watch(SLEEP)
    os.close(held)
    folder = Path(f"/proc/{watched.child.pid}")
    await until(lambda: (folder / "comm").read_text() == "sleep\n", what="the program")
    # The dynamic loader of a program just executed opens libraries for a moment; what is inherited stays.
    await until(lambda: sorted(os.listdir(folder / "fd")) == ["0", "1", "2"], what="no more than the standard files")
    assert os.readlink(folder / "fd" / "0") == "/dev/null"
    status = dict(line.split(":\t", 1) for line in (folder / "status").read_text().splitlines() if ":\t" in line)
    assert status["NoNewPrivs"] == "1"
    ignored = int(status["SigIgn"], 16)
    assert not any(ignored >> (number - 1) & 1 for number in (signal.SIGPIPE, signal.SIGXFSZ))
    assert int((folder / "oom_score_adj").read_text()) >= 500
    assert "Max core file size        0                    0" in (folder / "limits").read_text()
    environment = (folder / "environ").read_bytes().split(b"\0")
    names = {pair.partition(b"=")[0].decode() for pair in environment if pair}
    by_shells_and_python = {"PWD", "OLDPWD", "SHLVL", "_", "LC_CTYPE"}  # the last in the C locale (PEP 538)
    assert names - by_shells_and_python == {"PATH", OWNER}
    assert os.getsid(watched.child.pid) == watched.child.pid


@pytest.mark.full
async def test_many_crashes_leave_nothing(watch: Watch) -> None:
    await watch(["/bin/true"]).child.wait()
    before, threads = open_fds(), threading.active_count()
    for number in range(200):
        watched = Watched(["/bin/sh", "-c", f"echo {number}; kill -SEGV $$"])
        assert await watched.child.wait() == -signal.SIGSEGV
    assert open_fds() <= before
    assert not children()
    assert threading.active_count() <= threads


def test_log_ring_keeps_the_last_lines_and_the_end_of_long_ones() -> None:
    ring = LogRing()
    for number in range(1000):
        ring.feed(f"line {number}\n".encode())
    assert ring.tail() == [f"line {number}" for number in range(1000 - LINES, 1000)]
    assert ring.tail(2) == ["line 998", "line 999"]
    ring.feed(b"a" * 5000 + b"END\nnext")
    assert ring.tail(2) == [("a" * LINE_BYTES + "END")[-LINE_BYTES:], "next"]


def test_log_ring_does_not_care_how_output_is_cut() -> None:
    text = "".join(f"line {number} \u00e9\u2028\n" for number in range(300)).encode()
    whole = LogRing()
    whole.feed(text)
    for size in (1, 2, 3, 7, 100, 1000):
        ring = LogRing()
        for start in range(0, len(text), size):
            ring.feed(text[start : start + size])
        assert ring.tail() == whole.tail()


def test_log_ring_shows_no_control_characters() -> None:
    ring = LogRing()
    ring.feed(b"\x1b[31mred\x1b[0m\tx\x00\r\n\n   \nbad \xff utf8\n")
    assert ring.tail() == ["[31mred[0m    x", "bad \ufffd utf8"]


def test_log_ring_is_bounded_on_anything() -> None:
    for piece in (b"\n" * 2**20, b"x" * 2**20, b"ab\n" * 2**19):
        ring = LogRing()
        for _ in range(100):
            ring.feed(piece)
        assert sum(map(len, ring.tail())) <= LINES * LINE_BYTES


TRACER = """
import ctypes, sys, time
libc, pid = ctypes.CDLL(None), int(sys.argv[1])
attached = libc.ptrace(0x4206, pid, 0, 0) == 0  # PTRACE_SEIZE
print("attached" if attached else "refused", flush=True)
sys.stdin.read()
"""


@contextmanager
def traced(pid: int) -> Iterator[subprocess.Popen[str]]:
    """A debugger of that process, until its input is closed."""
    argv = [sys.executable, "-c", TRACER, str(pid)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as tracer:
        yield tracer


async def test_a_child_that_ends_under_a_debugger_does_not_block_the_event_loop(watch: Callable[..., Watched]) -> None:
    """It has ended, and cannot be reaped before the debugger lets it go."""
    watched = watch(SLEEP)
    with traced(watched.child.pid) as tracer:
        assert tracer.stdout is not None and tracer.stdin is not None
        if tracer.stdout.readline() != "attached\n":
            tracer.stdin.close()
            pytest.skip("processes cannot be traced here")
        watched.child.kill()
        await until(lambda: psutil.Process(watched.child.pid).status() == psutil.STATUS_ZOMBIE, what="the end")
        turns = itertools.count()
        await until(lambda: next(turns) > 10, what="so many turns of the loop")
        assert watched.ended == []
        tracer.stdin.close()
    await until(lambda: watched.ended == [-signal.SIGKILL], what="the report")
