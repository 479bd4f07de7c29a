"""Children that outlived their proxy: how they are marked, found and ended.

The kernel kills a child together with its proxy (`pool.launch`), but not what that child has forked, and only on
Linux. So every child carries the mark of its proxy in its environment, where its own children inherit it, and the next
proxy to start ends every process that carries the mark of a dead one. Foreign processes, and those of a living proxy,
are left alone. Linux only; elsewhere nothing is found.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import time
from pathlib import Path

logger = logging.getLogger(__name__)

OWNER = "LSP_OWNER"
"""Environment variable of every child: `<pid of its proxy>:<start time of it>:<pid namespace>`. The start time, in
clock ticks since boot, distinguishes a proxy from a later process with the same pid; a pid of another namespace (a
container) means nothing here."""
KILL_WAIT_S = 2.0


def owner_mark() -> str:
    """The mark of this process."""
    return f"{os.getpid()}:{_start_ticks(os.getpid())}:{_pid_namespace()}"


def kill_orphans() -> list[int]:
    """Kill every process of our user whose proxy is dead; return their pids once they are gone (after at most 2 s).

    Blocks for some milliseconds on a usual machine: call it from a thread.
    """
    if sys.platform != "linux":
        return []
    killed: dict[int, int] = {}
    for pid in _pids():
        if pid == os.getpid() or not _orphaned(pid):
            continue
        try:
            handle = os.pidfd_open(pid)
        except OSError:
            continue
        if _orphaned(pid):  # once more: before the pidfd was open, another process may have got this pid
            killed[pid] = handle
            _kill(handle)
        else:
            os.close(handle)
    _wait_gone(list(killed.values()))
    if killed:
        logger.warning("killed processes left over by an earlier run: %s", ", ".join(map(str, killed)))
    return list(killed)


def _kill(handle: int) -> None:
    assert sys.platform == "linux"
    try:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
    except OSError as exc:
        logger.warning("cannot kill a process left over by an earlier run: %s", exc)


def _wait_gone(handles: list[int]) -> None:
    deadline = time.monotonic() + KILL_WAIT_S
    for handle in handles:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
        os.close(handle)


def _pids() -> list[int]:
    """The pids of our user's processes."""
    found = []
    for entry in os.scandir("/proc"):
        try:
            if entry.name.isdigit() and entry.stat().st_uid == os.geteuid():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def _orphaned(pid: int) -> bool:
    """Whether this process carries the mark of a proxy of this pid namespace that is dead."""
    try:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    prefix = f"{OWNER}=".encode()
    mark = next((pair[len(prefix) :].decode("latin-1") for pair in pairs if pair.startswith(prefix)), "")
    owner, _, rest = mark.partition(":")
    ticks, _, namespace = rest.partition(":")
    if not owner.isdigit() or not ticks.isdigit() or namespace != _pid_namespace():
        return False
    return _start_ticks(int(owner)) != int(ticks)


def _start_ticks(pid: int) -> int:
    """When a process started, in clock ticks since boot; -1 when there is no such process (or it is a zombie)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return -1
    return -1 if fields[0] in "ZX" else int(fields[19])


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return "none"
