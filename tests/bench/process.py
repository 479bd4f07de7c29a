"""What the operating system says about processes, and how the bench starts and ends its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
STOP_S = 5.0


@dataclass(frozen=True)
class Cores:
    """Which processor cores the target, and the stub with the load generator, may use; None where unsupported."""

    target: frozenset[int] | None
    load: frozenset[int] | None

    def __str__(self) -> str:
        if self.target is None or self.load is None:
            return "nothing pinned (this system cannot)"
        if self.target == self.load:
            return f"all on core {min(self.target)}: there is no second one, so wall times include the load generator"
        return f"target on core {min(self.target)}; stub and load generator on core {min(self.load)}"


def choose_cores() -> Cores:
    """The last core of those allowed for the target, the first for the rest (interrupts tend to land on the first)."""
    if not hasattr(os, "sched_getaffinity"):
        return Cores(None, None)
    allowed = sorted(os.sched_getaffinity(0))
    return Cores(frozenset(allowed[-1:]), frozenset(allowed[:1]))


@contextlib.contextmanager
def on_cores(cores: frozenset[int] | None) -> Iterator[None]:
    """Processes started inside inherit `cores`; this process has its own back afterwards."""
    if cores is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def environment(root: Path = ROOT) -> dict[str, str]:
    """This process's environment without settings that would reconfigure a proxy under measurement, for a program of
    the checkout at `root`."""
    ours = ("LSP_", "OLLAMA_PROXY_", "LLAMA_ARG_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(ours) and not k.lower().endswith("_proxy")}
    return kept | {"PYTHONPATH": str(root)}


def spawn(
    argv: Sequence[str], cores: frozenset[int] | None, log: Path, *, piped: bool = False, root: Path = ROOT
) -> subprocess.Popen[str]:
    """Start a program of the checkout at `root`; in a session of its own, so that Ctrl-C reaches the bench alone, which
    then ends it."""
    with on_cores(cores), log.open("a") as stderr:
        out = subprocess.PIPE if piped else stderr
        return subprocess.Popen(
            argv, cwd=root, env=environment(root), stdin=subprocess.DEVNULL, stdout=out, stderr=stderr, text=True,
            start_new_session=True,
        )  # fmt: skip


def stop(process: subprocess.Popen[str]) -> None:
    """End `process`: TERM, then KILL after `STOP_S`; whatever children it left are killed too."""
    children = tree(process.pid)[1:]
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout:
        process.stdout.close()
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def tree(pid: int) -> list[psutil.Process]:
    """The process and all its descendants; empty when it is gone."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def rss_mib(pids: Iterable[int]) -> float:
    """Resident memory of the processes and their descendants; pages they share are counted once for each."""
    return sum(int(p.memory_info().rss) for pid in pids for p in tree(pid)) / 2**20


def cpu_ns(pids: Iterable[int]) -> int:
    """CPU time, user and system, all threads, that the processes have used so far, in nanoseconds.

    Linux keeps a clock for each process, readable by anyone, in nanoseconds; its id is made from the pid as the C
    library's `clock_getcpuclockid` makes it. Elsewhere psutil's figure (often in steps of 10 ms) has to do.
    """
    if sys.platform == "linux":
        return sum(time.clock_gettime_ns((~pid << 3) | 2) for pid in pids)
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return int(sum(t.user + t.system for t in times) * 1e9)
