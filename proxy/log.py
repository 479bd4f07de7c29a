"""Logging to stderr: the journal or the terminal takes it from there.

Every record is written at once. Only the lines of requests, of which there may be thousands a second, wait for others
to share a write with: for 50 ms at most, and no longer than until the next record, which follows them.

Nothing here waits for a reader of stderr. What it does not take now is kept for a while, and then given up.
"""

from __future__ import annotations

import io
import logging
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TextIO, cast

from llama_smart_proxy.proxy.chat import RequestRecord

LEVELS = ("debug", "info", "warning", "error")
PACKAGE = "llama_smart_proxy."
"""Left out of the names of loggers."""
FLUSH_S = 0.05
"""Longest time that the line of a request waits to be written."""
MOST_LINES = 10_000
"""Lines that are kept for a stderr that takes none. Later ones are counted, and lost."""
MOST_CHARACTERS = 4000
"""Characters of a line, as far as they need no escape. What is cut out is in the middle."""
MOST_TRACED = 400
"""Lines of a traceback."""
EXIT_S = 2.0
"""How long the process waits at its end for a stderr that takes nothing."""
_PIECE = 4096
"""Bytes that a pipe, a socket or a terminal takes without blocking once `poll` says that it is writable."""
_BATCH = 512


def open_standard_streams() -> None:
    """Open the null device in place of standard streams that were closed before the program started.

    To be called before anything else is opened: files and sockets would get these numbers, which other libraries write
    to, and which libuv aborts the process for.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is: a name or an answer may hold any character
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def configure(level: str) -> None:
    """Send the program's log to stderr at `level`, one of `LEVELS`.

    What was logged is written before the process ends, unless that is by a signal that Python does not see: then the
    lines of requests of the last `FLUSH_S` seconds may be missing.
    """
    handler = _Handler(_Writer(_fd_of(sys.stderr), getattr(sys.stderr, "encoding", None) or "utf-8"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("asyncio").setLevel("WARNING")
    logging.raiseExceptions = False  # a log that cannot be written must not disturb the stream being served
    access.connect(handler.writer if logging.getLogger().isEnabledFor(logging.INFO) else None)
    sys.excepthook = _behind(handler, sys.excepthook)


class AccessLog:
    """One line for each request that was answered, at level info; nothing while `enabled` is False."""

    def __init__(self) -> None:
        self.enabled = False
        self._writer: _Writer | None = None

    def connect(self, writer: _Writer | None) -> None:
        """Write there from now on, or nowhere."""
        self._writer = writer
        self.enabled = writer is not None

    def line(self, method: str, path: str, status: int, model: str, spent_s: float, request_id: str) -> None:
        """A request to `path` was answered with `status`, `spent_s` seconds after its head had come. Path and model
        are written as they are: the caller has made them printable."""
        if self._writer is not None:
            self._writer.hold(
                f"{_stamp(time.time())} INFO    proxy.access: {method} {path} {status} model={model} "
                f"{spent_s * 1000:.0f} ms {request_id}\n"
            )


access = AccessLog()
"""The one of this process."""


class _Writer:
    """Whole lines on their way to a file descriptor, or to nowhere, in the order in which they came.

    Any thread may call any method, also while another call of its own is interrupted, as by a destructor that logs.
    """

    def __init__(self, fd: int | None, encoding: str) -> None:
        self._fd = fd
        self._encoding = encoding
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
                batch.append(f"{_stamp(time.time())} WARNING proxy.log: {self._lost} lines could not be written\n")
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


class _Handler(logging.Handler):
    """Writes each record of `logging` at once, behind all lines that still wait."""

    def __init__(self, writer: _Writer) -> None:
        super().__init__()
        self.writer = writer
        self.setFormatter(_Formatter())

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception:
            self.handleError(record)
        else:
            self.writer.hold(f"{line}\n")
            self.writer.write()

    def flush(self) -> None:
        """`logging` calls this when the process ends."""
        self.writer.write(EXIT_S)


class _Formatter(logging.Formatter):
    """One line for each record, and for each line of a traceback one that is indented. What a client, a model server
    or a file has put into them cannot look like another record, or steer a terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        name = record.name.removeprefix(PACKAGE)
        return shown(f"{_stamp(record.created)} {record.levelname:<7} {name}: {record.message}")

    def formatException(self, ei: Any) -> str:
        return self.formatStack(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:
        lines = stack_info.split("\n")
        if len(lines) > MOST_TRACED:
            left_out = f"[{len(lines) - MOST_TRACED} lines]"
            lines[MOST_TRACED // 2 : -MOST_TRACED // 2] = [left_out]
        return "\n".join(f"  {shown(line)}" for line in lines)


_seconds: tuple[int, str] = (0, "")


def _stamp(now: float) -> str:
    """Local time in milliseconds. All but these is the same for a second, and takes the longest."""
    global _seconds
    second, shown = _seconds
    if second != int(now):
        second = int(now)
        shown = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))
        _seconds = second, shown
    return f"{shown},{int((now - second) * 1000):03d}"


def _fd_of(stream: object) -> int | None:
    """None for a stream that was closed before the program started, or is not the system's."""
    try:
        return stream.fileno()  # type: ignore[attr-defined, no-any-return]
    except (AttributeError, OSError, ValueError):
        return None


_Hook = Callable[[type[BaseException], BaseException, TracebackType | None], object]


def _behind(handler: _Handler, hook: _Hook) -> _Hook:
    """`hook`, which writes to stderr itself, behind what was logged before."""

    def called(kind: type[BaseException], exc: BaseException, traceback: TracebackType | None) -> object:
        handler.flush()
        with shown_output():
            return hook(kind, exc, traceback)

    return called


def access_line(record: RequestRecord) -> None:
    """The access line of a request that has ended."""
    if access.enabled:
        spent_s = record.ended_s - record.arrived_s
        path, model = shown(record.path), shown(record.model)
        access.line(record.method, path, record.status, model, spent_s, record.request_id)


def shown(text: str) -> str:
    """`text` as one line for people, of `MOST_CHARACTERS` or little more. Control characters, such as line breaks and
    the beginning of what terminals obey, characters that change the direction of others, and half characters are
    escaped."""
    if len(text) > MOST_CHARACTERS:
        half = MOST_CHARACTERS // 2
        text = f"{text[:half]} [{len(text) - 2 * half} characters] {text[-half:]}"
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()


@contextmanager
def shown_output() -> Iterator[None]:
    """Within the context, what is printed to standard output and error is escaped, but for line breaks and tabs, and
    what a progress bar begins with."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, _Shown(stream)) if stream is not None else stream for stream in streams)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams


class _Shown:
    """A text stream whose `write` escapes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if not text.isprintable():
            kept = "\r" if text.startswith("\r") else ""
            text = kept + "".join(c if c in "\n\t" else _shown(c) for c in text[len(kept) :])
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
