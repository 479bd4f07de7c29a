"""A proxy killed with SIGKILL leaves no server behind; what it could not take along, the next one ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from llama_smart_proxy.backends.pool import orphans
from llama_smart_proxy.backends.pool.orphans import kill_orphans, owner_mark
from tests.fakes.llama_server import install
from tests.support.harness import PATIENCE_S, ROOT

OWNER = "LSP_OWNER_IN_A_TEST"
"""The mark of these tests: those with the real one are ended by any proxy that starts, also by one of another test."""

# A stand-in for the proxy: makes children, says so, and waits to be killed.
PARENT = (
    f"""
from llama_smart_proxy.backends.pool import orphans
orphans.OWNER = {OWNER!r}
"""
    + """
import asyncio, os, sys
from llama_smart_proxy.backends.pool.spawn import spawn
async def main():
    env = {name: value for name, value in os.environ.items() if name.startswith("FAKE_")}
    heard = asyncio.Event()
    children = [spawn(sys.argv[2:], env, lambda data: heard.set(), lambda code: None) for _ in range(int(sys.argv[1]))]
    await heard.wait()
    print(*[child.pid for child in children], flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""
)


@pytest.fixture(autouse=True)
def own_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orphans, "OWNER", OWNER)


def wait_for(condition: Callable[[], object]) -> None:
    ends = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < ends
        threading.Event().wait(0.005)


def marked(mark_of: int) -> list[int]:
    """Living processes that carry the mark of the process `mark_of`."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(OWNER, "").startswith(f"{mark_of}:") and process.status() != "zombie":
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


class Parent:
    def __init__(self, count: int, program: Path, **manners: str) -> None:
        env = {**os.environ, "PYTHONPATH": str(ROOT)} | {f"FAKE_{name}": value for name, value in manners.items()}
        command = [sys.executable, "-c", PARENT, str(count), str(program), "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, env=env, text=True)
        assert self.process.stdout is not None
        self.children = [int(pid) for pid in self.process.stdout.readline().split()]
        assert len(self.children) == count

    @property
    def descendants(self) -> list[int]:
        return marked(self.process.pid)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        for pid in self.descendants:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def parents() -> Iterator[list[Parent]]:
    made: list[Parent] = []
    yield made
    for parent in made:
        parent.end()


@pytest.mark.parametrize("times", [3, pytest.param(20, marks=pytest.mark.full)])
def test_children_die_with_a_proxy_that_is_killed(parents: list[Parent], tmp_path: Path, times: int) -> None:
    for _ in range(times):
        parent = Parent(3, install(tmp_path))
        parents.append(parent)
        wait_for(lambda: sorted(parent.descendants) == sorted(parent.children))  # noqa: B023
        parent.kill()
        wait_for(lambda: not parent.descendants)  # noqa: B023


def test_a_proxy_killed_in_the_middle_of_a_spawn_leaves_nothing(parents: list[Parent], tmp_path: Path) -> None:
    code = PARENT.replace("await heard.wait()", "print(flush=True)")
    for _ in range(10):
        command = [sys.executable, "-c", code, "4", str(install(tmp_path)), "--port", "0"]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=env) as process:
            assert process.stdout is not None
            process.stdout.readline()
            process.kill()
        wait_for(lambda: not marked(process.pid))


def test_a_grandchild_that_survived_is_ended_by_the_next_start(parents: list[Parent], tmp_path: Path) -> None:
    parents.append(Parent(1, install(tmp_path), FORK="setsid"))
    parents.append(Parent(1, install(tmp_path)))
    dead, living = parents
    dead.kill()
    wait_for(lambda: dead.children[0] not in dead.descendants)
    [survivor] = dead.descendants
    foreign = subprocess.Popen(["sleep", "100"], env={"PATH": os.environ["PATH"]})
    elsewhere = subprocess.Popen(["sleep", "100"], env={"PATH": os.environ["PATH"], OWNER: "1:1:pid:[1]"})
    try:
        assert survivor in kill_orphans()
        wait_for(lambda: not dead.descendants)
        assert foreign.poll() is None
        assert elsewhere.poll() is None  # marked in another pid namespace: its proxy may well live
        assert living.children == living.descendants
        assert survivor not in kill_orphans()
    finally:
        for process in (foreign, elsewhere):
            process.kill()
            process.wait()


def test_a_pid_that_is_used_again_does_not_shield_an_orphan() -> None:
    pid, ticks, namespace = owner_mark().split(":", 2)
    later = f"{pid}:{int(ticks) - 1}:{namespace}"  # our pid, but a process that started before us
    orphan = subprocess.Popen(["sleep", "100"], env={"PATH": os.environ["PATH"], OWNER: later})
    ours = subprocess.Popen(["sleep", "100"], env={"PATH": os.environ["PATH"], OWNER: owner_mark()})
    try:
        wait_for(lambda: Path(f"/proc/{orphan.pid}/comm").read_text() == "sleep\n")
        assert orphan.pid in kill_orphans()
        assert orphan.wait() == -signal.SIGKILL
        assert ours.poll() is None
    finally:
        for process in (orphan, ours):
            process.kill()
            process.wait()
