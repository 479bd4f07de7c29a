"""What the system knows of a process and of all that it has started: who they are, and what they have done."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

STATE, PARENT, SESSION, FAULTS, TIMES = 0, 1, 3, slice(9, 11), slice(11, 15)
"""Fields of `/proc/PID/stat` behind the name: state, parent, session, page faults that read a disk (own, of reaped
children), and times in user and kernel mode (own, of reaped children). Source: proc(5)."""


@dataclass(frozen=True, slots=True)
class Vitals:
    """What a process and all its descendants have done since they were started: processor time in seconds, and page
    faults that had to read a disk. `states` are their states, a letter each (`T`: stopped, `D`: uninterruptible)."""

    cpu_s: float
    faults: int
    states: str


def family(pid: int) -> list[int]:
    """The pids of a process and of its descendants; on Linux also of those whose parents have ended, as long as they
    are in its session. Blocks for some milliseconds."""
    if sys.platform == "linux":
        return _members(pid, _stats())
    with suppress(psutil.Error):
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    return []


def vitals(pid: int) -> Vitals | None:
    """The vitals of the process that leads the session `pid`, None if there is none. Blocks for some milliseconds."""
    if sys.platform != "linux":
        return _portable(pid)
    stats = _stats()
    members = [stats[member] for member in _members(pid, stats)]
    if not members:
        return None
    ticks = sum(int(value) for fields in members for value in fields[TIMES])
    faults = sum(int(value) for fields in members for value in fields[FAULTS])
    return Vitals(ticks / os.sysconf("SC_CLK_TCK"), faults, "".join(sorted(fields[STATE] for fields in members)))


def _portable(pid: int) -> Vitals | None:
    cpu_s, states = 0.0, ""
    for member in family(pid):
        with suppress(psutil.Error):
            process = psutil.Process(member)
            cpu_s += sum(process.cpu_times()[:4])
            states += "T" if process.status() == psutil.STATUS_STOPPED else "S"
    return Vitals(cpu_s, 0, states) if states else None


def _stats() -> dict[int, list[str]]:
    """The fields of `/proc/PID/stat` behind the name, of every process."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(OSError):
                found[int(name)] = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
    return found


def _members(pid: int, stats: Mapping[int, list[str]]) -> list[int]:
    found = {other for other, fields in stats.items() if other == pid or fields[SESSION] == str(pid)}
    size = 0
    while len(found) > size:
        size = len(found)
        found |= {other for other, fields in stats.items() if int(fields[PARENT]) in found}
    return sorted(found)
