"""What llama-server reports to the router that started it: how much of its model it has loaded.

Source: llama.cpp tools/server/server-models.cpp, b11434. In the environment of a router, it writes lines about its
state to its standard output, and its log to the other one; it ends when its standard input does, and when it reads
`FAREWELL` there. Earlier versions notified by HTTP instead, and ended when nothing answered: only one that has `MARK`
in its program is started so.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import orjson

MARK = b"cmd_child_to_router:state:"
FAREWELL = b"cmd_router_to_child:exit\n"
ROUTER = "LLAMA_SERVER_ROUTER_PORT"
"""The variable that makes a server report; its value is not used."""
LONGEST = 256 * 1024
"""Bytes of the longest line that is read: it describes the model, once that is loaded."""
SEARCHED = 64 * 1024 * 1024
"""Bytes of the largest file that is searched for `MARK`."""


class Notices:
    """Takes the reports out of the output of a server; `on_share` gets the share that is loaded, from 0 to 1."""

    def __init__(self, on_share: Callable[[float], None]) -> None:
        self._on_share = on_share
        self._held = b""

    def __call__(self, data: bytes) -> bytes:
        """What is left of a piece of output, which may be cut anywhere but within a `MARK`."""
        if not self._held and MARK not in data:
            return data
        left, data = b"", self._held + data
        self._held = b""
        while (at := data.find(MARK)) >= 0:
            left += data[:at]
            line, end, rest = data[at:].partition(b"\n")
            if not end:
                self._held = line if len(line) <= LONGEST else b""
                return left
            self._report(line.removeprefix(MARK))
            data = rest
        return left + data

    def _report(self, line: bytes) -> None:
        with suppress(ValueError, TypeError, KeyError, AttributeError):
            report = orjson.loads(line)
            if report["state"] == "loading":
                self._on_share(_share(report["payload"]))


def _share(payload: dict[str, Any]) -> float:
    """The share of all stages, such as the model and its projector. Raises: ValueError, TypeError, KeyError,
    AttributeError."""
    stages = payload["stages"]
    value: float = (stages.index(payload["current"]) + float(payload["value"])) / len(stages)
    return min(1.0, max(0.0, value))


def reports(program: str) -> bool:
    """Whether this program reports what it loads if it is asked to. Blocks; the answer for a file is kept."""
    return any(_has_mark(file, *stamp) for file, stamp in _parts(program))


def _parts(program: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """The program and its own library, with size and time of change."""
    real = Path(os.path.realpath(program))
    for file in (real, *real.parent.glob("libllama-server-impl*"), *real.parent.glob("../lib/libllama-server-impl*")):
        with suppress(OSError):
            found = file.stat()
            if 0 < found.st_size <= SEARCHED:
                yield str(file), (found.st_size, found.st_mtime_ns)


@cache
def _has_mark(file: str, size: int, mtime_ns: int) -> bool:
    try:
        with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as data:
            return data.find(MARK) >= 0
    except (OSError, ValueError):
        return False
