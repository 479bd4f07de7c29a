"""Lines on their way to stderr.

Nothing here waits for a reader of it: what it does not take now is kept for a while, and then given up.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable

FLUSH_S = 0.05
"""Longest time that the line of a request waits to be written."""
MOST_LINES = 10_000
"""Lines that are kept for a stderr that takes none. Later ones are counted, and lost."""
_PIECE = 4096
"""Bytes that a pipe, a socket or a terminal takes without blocking once `poll` says that it is writable."""
_BATCH = 512


class Writer:
    """Whole lines on their way to a file descriptor, or to nowhere, in the order in which they came. `lost_line` makes
    the line, with its end, about so many that were lost.

    Any thread may call any method, also while another call of its own is interrupted, as by a destructor that logs.
    """

    def __init__(self, fd: int | None, encoding: str, lost_line: Callable[[int], str]) -> None:
        self._fd = fd
        self._encoding = encoding
        self._lost_line = lost_line
        self._lines: list[str] = []
        self._lost = 0
        self._unwritten = b""
        self._writing = threading.Lock()
        self._due = threading.Event()
        """Set while there is something that the thread is to write."""
        if fd is not None:
            self._ready = select.poll()
            self._ready.register(fd, select.POLLOUT)
            # a thread, as an event loop that is kept busy would keep the lines too
            threading.Thread(target=self._write_what_is_due, name="log", daemon=True).start()

    def hold(self, line: str) -> None:
        """Write this line within `FLUSH_S` seconds."""
        lines = self._lines
        if len(lines) >= MOST_LINES or self._fd is None:
            self._lost += 1
            return
        lines.append(line)
        if not self._due.is_set():
            self._due.set()

    def write(self, patience_s: float = 0.0) -> None:
        """Write all lines now. Where stderr takes nothing for `patience_s` seconds, the rest is left to the thread."""
        if self._fd is None or not self._writing.acquire(timeout=patience_s):
            return  # who writes just now, or else the thread, does it: `_due` is still set
        try:
            while self._take() and self._ready.poll(patience_s * 1000) and self._put(self._fd):
                pass
        finally:
            self._writing.release()

    def _write_what_is_due(self) -> None:
        while True:
            self._due.wait()
            time.sleep(FLUSH_S)
            self._due.clear()
            self.write()
            if self._lines or self._unwritten:
                self._due.set()

    def _take(self) -> bool:
        """Whether there is something to write: the bytes of some lines, in `_unwritten`."""
        if not self._unwritten:
            batch = self._lines[:_BATCH]
            del self._lines[: len(batch)]
            if self._lost and not self._lines:
                batch.append(self._lost_line(self._lost))
                self._lost = 0
            self._unwritten = "".join(batch).encode(self._encoding, "backslashreplace")
        return bool(self._unwritten)

    def _put(self, fd: int) -> bool:
        """Write one piece; whether more may follow."""
        try:
            written = os.write(fd, self._unwritten[:_PIECE])
        except BlockingIOError:
            return False
        except OSError:
            written = len(self._unwritten)  # the reader is gone, or the disk is full
        self._unwritten = self._unwritten[written:]
        return True
