"""Logging to stderr: the journal or the terminal takes it from there.

Every record is written at once. Only the lines of requests, of which there may be thousands a second, wait for others
to share a write with: for 50 ms at most, and no longer than until the next record, which follows them.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from llama_smart_proxy.proxy.log import content
from llama_smart_proxy.proxy.log.access import AccessLog
from llama_smart_proxy.proxy.log.formats import FORMATS, MOST_TRACED, Form, form_for, is_coloured
from llama_smart_proxy.proxy.log.redaction import hide, redacted
from llama_smart_proxy.proxy.log.streams import (
    MOST_CHARACTERS,
    fd_of,
    open_standard_streams,
    shortened,
    shown,
    shown_output,
)
from llama_smart_proxy.proxy.log.writer import FLUSH_S, MOST_LINES, Writer

__all__ = [
    "EXIT_S",
    "FLUSH_S",
    "FORMATS",
    "LEVELS",
    "MOST_CHARACTERS",
    "MOST_LINES",
    "MOST_TRACED",
    "Writer",
    "access",
    "configure",
    "hide",
    "is_coloured",
    "open_standard_streams",
    "set_level",
    "shown",
    "shown_output",
]

LEVELS = ("debug", "info", "warning", "error")
PACKAGE = "llama_smart_proxy."
"""Left out of the names of loggers."""
MOST_READ = 200_000
"""Characters of a message or a traceback that are looked through; what is cut out is in the middle, as later again."""
EXIT_S = 2.0
"""How long the process waits at its end for a stderr that takes nothing."""

beside = logging.getLogger(f"{__name__}.beside")
"""For what happens beside all that catches it; it may quote a chat."""
access = AccessLog()
"""The one of this process."""


def configure(level: str, wanted: str = "auto", *, with_content: bool = True) -> None:
    """Send the program's log to stderr at `level`, one of `LEVELS`, in the format `wanted`, one of `FORMATS`.
    Without `with_content`, nothing of a chat is in it.

    What was logged is written before the process ends, unless that is by a signal that Python does not see: then the
    lines of requests of the last `FLUSH_S` seconds may be missing.
    """
    fd = fd_of(sys.stderr)
    form = form_for(wanted, os.environ, fd)
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    handler = _Handler(Writer(fd, encoding, lambda lost: _lost(form, lost)), form, with_content)
    logging.basicConfig(handlers=[handler], force=True)
    logging.getLogger("asyncio").setLevel("WARNING")
    logging.getLogger("gguf").setLevel("WARNING")
    logging.raiseExceptions = False  # a log that cannot be written must not disturb the stream being served
    access.with_content = with_content
    set_level(level)
    sys.excepthook = _behind(handler, sys.excepthook)
    threading.excepthook = _thread_failed
    sys.unraisablehook = _ignored
    logging.captureWarnings(True)


def set_level(level: str) -> None:
    """Let another level apply from now on, to the lines of requests, too."""
    root = logging.getLogger()
    root.setLevel(level.upper())
    for handler in root.handlers:
        if isinstance(handler, _Handler):
            access.connect(handler.writer if root.isEnabledFor(logging.INFO) else None, handler.form)


def _lost(form: Form, lost: int) -> str:
    return form.record(time.time(), logging.WARNING, "proxy.log", f"{lost} lines could not be written", ())


class _Handler(logging.Handler):
    """Writes each record of `logging` at once, behind all lines that still wait."""

    def __init__(self, writer: Writer, form: Form, with_content: bool) -> None:
        super().__init__()
        self.writer = writer
        self.form = form
        self.setFormatter(_Formatter(form, with_content))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception:
            self.handleError(record)
        else:
            self.writer.hold(line)
            self.writer.write()

    def flush(self) -> None:
        """`logging` calls this when the process ends."""
        self.writer.write(EXIT_S)


class _Formatter(logging.Formatter):
    """The lines of a record in a form. What a client, a model server or a file has put into them cannot look like
    another record, or steer a terminal."""

    def __init__(self, form: Form, with_content: bool) -> None:
        super().__init__()
        self._form = form
        self._with_content = with_content

    def format(self, record: logging.LogRecord) -> str:
        name, args, trace = record.name.removeprefix(PACKAGE), record.args, record.stack_info or ""
        quoting = not self._with_content and content.may_quote(name)
        if quoting and args:
            args = content.without_quotes(args)
        message = str(record.msg) % args if args else str(record.msg)
        message = redacted(shortened(message, MOST_READ))
        if record.exc_info:
            trace = content.frames_of(record.exc_info[1]) if quoting else self.formatException(record.exc_info)
        return self._form.record(record.created, record.levelno, name, message, _traced(trace))


def _traced(trace: str) -> list[str]:
    """The lines of a traceback, those in the middle left out of a long one."""
    lines = redacted(shortened(trace, MOST_READ)).split("\n") if trace else []
    if len(lines) > MOST_TRACED:
        left_out = f"[{len(lines) - MOST_TRACED} lines]"
        lines[MOST_TRACED // 2 : -MOST_TRACED // 2] = [left_out]
    return [shown(line) for line in lines]


def _thread_failed(args: threading.ExceptHookArgs) -> None:
    """What a thread does not catch is a record like all others."""
    if args.exc_type is not SystemExit and args.exc_value is not None:
        name = args.thread.name if args.thread is not None else "?"
        beside.error("the thread %s failed", name, exc_info=args.exc_value)


def _ignored(args: Any) -> None:
    """And so is what a destructor does not catch."""
    beside.error("an exception was ignored: %s", args.err_msg or args.object, exc_info=args.exc_value)


_Hook = Callable[[type[BaseException], BaseException, TracebackType | None], Any]


def _behind(handler: _Handler, hook: _Hook) -> _Hook:
    """`hook`, which writes to stderr itself, behind what was logged before."""

    def called(kind: type[BaseException], exc: BaseException, traceback: TracebackType | None) -> object:
        handler.flush()
        with shown_output(redacted):
            return hook(kind, exc, traceback)

    return called
