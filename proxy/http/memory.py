"""Gives memory back to the system that requests do not use any more.

glibc keeps what is freed between smaller pieces still in use: after hundreds of large requests at once, more than a
gigabyte. musl and macOS have no such call, and do nothing here.
"""

from __future__ import annotations

import asyncio
import ctypes
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from mmap import PAGESIZE
from pathlib import Path

from llama_smart_proxy.backends.threads import begin_in_thread
from llama_smart_proxy.proxy.errors import StartFailed

GROWTH_BYTES = 32 * 2**20
"""Less than that is not worth it, as it will be used again."""
BUSY_S = 60.0
"""How often it is done while requests are answered: allocations wait for it, 50 µs for each megabyte."""
_STATM = Path("/proc/self/statm")


class Memory:
    """Calls `trim`, in a thread, when the process has grown since the last time."""

    def __init__(self, trim: Callable[[], object] | None) -> None:
        self._trim = trim
        self._least = resident_bytes()
        self._trimmed_at = time.monotonic()
        self._trimming: asyncio.Future[None] | None = None

    def check(self, *, idle: bool) -> None:
        """To be called every second or so; `idle` if no request is being answered."""
        resident, now = resident_bytes(), time.monotonic()
        self._least = min(self._least, resident) or resident
        if self._trim is None or (self._trimming is not None and not self._trimming.done()):
            return
        if resident - self._least > GROWTH_BYTES and (idle or now - self._trimmed_at > BUSY_S):
            self._trimmed_at = now
            with suppress(StartFailed):  # there may be a thread the next time
                self._trimming = begin_in_thread(partial(self._run, self._trim))

    def _run(self, trim: Callable[[], object]) -> None:
        trim()  # without the interpreter's lock
        self._least = resident_bytes()


def allocator_trim() -> Callable[[], object] | None:
    """The allocator's call for that; None if it has none."""
    with suppress(OSError, AttributeError, TypeError):
        trim = ctypes.CDLL(None).malloc_trim
        trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
        return lambda: trim(0)
    return None


def resident_bytes() -> int:
    """Bytes of memory that the process takes; 0 if that is not known."""
    with suppress(OSError, ValueError, IndexError):
        return int(_STATM.read_bytes().split()[1]) * PAGESIZE
    return 0
