"""The forms of a line in the log: for people, as logfmt, as JSON; each with or without a time and a priority in front.

Each form has the same two methods: `record` for the records of `logging`, `access` for requests. All of a line that
others have written is escaped, so that no line can look like two, or steer a terminal.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from json.encoder import encode_basestring_ascii
from typing import Protocol

from llama_smart_proxy.proxy.log.streams import escaped, shortened, shown

FORMATS = ("auto", "text", "logfmt", "json")
MOST_TRACED = 400
"""Lines of a traceback."""
MOST_JOINED = 32_000
"""Characters of a traceback that is one field."""
_PRIORITIES = ((logging.ERROR, "<3>"), (logging.WARNING, "<4>"), (logging.INFO, "<6>"))
"""Of syslog; the journal reads them. Source: sd-daemon(3)."""
_COLOURS = {"DEBUG": "2", "INFO": "32", "WARNING": "33", "ERROR": "31", "CRITICAL": "31;1"}

Fields = Sequence[tuple[str, str | int]]
"""What is known of a request, in the order of the line; texts are printable, of limited length."""
Numbers = Sequence[tuple[str, int]]


class Form(Protocol):
    """One form of lines. Both methods return whole lines, with their ends."""

    def record(self, created: float, level: int, logger: str, message: str, traceback: Sequence[str]) -> str:
        """`traceback` has its lines; a `message` is of any length, and not escaped yet."""

    def fields(self, fields: Fields) -> str:
        """These fields as a part of a line."""

    def access(self, now: float, begins: str, numbers: Numbers, outcome: str, request_id: str) -> str:
        """The line of a request, which `begins` with fields. `outcome` and `request_id` are of safe characters."""


class Text:
    """For people: the time, the level, the logger, the message; a line of a traceback is indented."""

    def __init__(self, *, timed: bool = True, prioritised: bool = False, coloured: bool = False) -> None:
        self._timed = timed
        self._prioritised = prioritised
        self._coloured = coloured

    def record(self, created: float, level: int, logger: str, message: str, traceback: Sequence[str]) -> str:
        name = logging.getLevelName(level)
        level_name = f"{name:<7}"
        if self._coloured:
            level_name = f"\x1b[{_COLOURS.get(name, '0')}m{level_name}\x1b[0m"
        first = f"{self._front(created, level)}{level_name} {logger}: {shown(message)}\n"
        if not traceback:
            return first
        front = priority(level) if self._prioritised else ""
        return first + "".join([f"{front}  {shown(line)}\n" for line in traceback])

    def fields(self, fields: Fields) -> str:
        words = []
        for name, value in fields:
            if name in _BARE:
                words.append(self._status(value) if name == "status" else str(value))
            else:
                words.append(f'{name}="{value}"' if " " in str(value) else f"{name}={value}")
        return " ".join(words)

    def access(self, now: float, begins: str, numbers: Numbers, outcome: str, request_id: str) -> str:
        words = [_SHORT[name] % value for name, value in numbers]
        if outcome != "ok":
            words.append(outcome)
        level = f"\x1b[{_COLOURS['INFO']}mINFO   \x1b[0m" if self._coloured else "INFO   "
        front = self._front(now, logging.INFO)
        return f"{front}{level} proxy.access: {begins} {' '.join(words)} {request_id}\n"

    def _status(self, status: str | int) -> str:
        if not self._coloured:
            return str(status)
        colour = "32" if int(status) < 400 else "33" if int(status) < 500 else "31"
        return f"\x1b[{colour}m{status}\x1b[0m"

    def _front(self, now: float, level: int) -> str:
        return (priority(level) if self._prioritised else "") + (f"{local_time(now)} " if self._timed else "")


_BARE = frozenset({"method", "path", "status"})
_SHORT = {
    "queue_ms": "queue=%dms",
    "load_ms": "load=%dms",
    "ttft_ms": "first=%dms",
    "total_ms": "total=%dms",
    "tokens_in": "in=%d",
    "tokens_out": "out=%d",
}


class Logfmt:
    """`key=value` with values in quotes where they require it. A traceback is the field `exc`."""

    def __init__(self, *, timed: bool = True, prioritised: bool = False) -> None:
        self._timed = timed
        self._prioritised = prioritised

    def record(self, created: float, level: int, logger: str, message: str, traceback: Sequence[str]) -> str:
        front = self._front(created, level)
        line = f"{front}level={level_of(level)} logger={in_logfmt(logger)} msg={in_logfmt(shown(message), True)}"
        return f"{line} exc={in_logfmt(joined(traceback), True)}\n" if traceback else f"{line}\n"

    def fields(self, fields: Fields) -> str:
        return " ".join([f"{name}={in_logfmt(str(value))}" for name, value in fields])

    def access(self, now: float, begins: str, numbers: Numbers, outcome: str, request_id: str) -> str:
        pairs = "".join([f"{name}={value} " for name, value in numbers])
        front = self._front(now, logging.INFO)
        ends = f"outcome={outcome} id={in_logfmt(request_id)}"
        return f"{front}level=info logger=proxy.access msg=request {begins} {pairs}{ends}\n"

    def _front(self, now: float, level: int) -> str:
        return (priority(level) if self._prioritised else "") + (f"ts={utc_time(now)} " if self._timed else "")


class Json:
    """An object per line, in ASCII. A traceback is the field `exc`, with its line breaks."""

    def __init__(self, *, timed: bool = True, prioritised: bool = False) -> None:
        self._timed = timed
        self._prioritised = prioritised

    def record(self, created: float, level: int, logger: str, message: str, traceback: Sequence[str]) -> str:
        text = in_json(shown(message))
        line = f'{self._front(created, level)}"level":"{level_of(level)}","logger":{in_json(logger)},"msg":{text}'
        return f'{line},"exc":{in_json(joined(traceback))}}}\n' if traceback else f"{line}}}\n"

    def fields(self, fields: Fields) -> str:
        return ",".join([f'"{name}":{_json_value(value)}' for name, value in fields])

    def access(self, now: float, begins: str, numbers: Numbers, outcome: str, request_id: str) -> str:
        pairs = "".join([f'"{name}":{value},' for name, value in numbers])
        front = self._front(now, logging.INFO)
        ends = f'"outcome":{in_json(outcome)},"id":{in_json(request_id)}'
        return f'{front}"level":"info","logger":"proxy.access","msg":"request",{begins},{pairs}{ends}}}\n'

    def _front(self, now: float, level: int) -> str:
        return (priority(level) if self._prioritised else "") + (f'{{"ts":"{utc_time(now)}",' if self._timed else "{")


def form_for(wanted: str, environ: Mapping[str, str], fd: int | None) -> Form:
    """The form `wanted`, one of `FORMATS`, for what the descriptor of stderr is: `auto` is text on a terminal and
    logfmt elsewhere; a journal adds the time itself, and reads priorities."""
    journal = is_journal(environ.get("JOURNAL_STREAM", ""), fd)
    terminal = fd is not None and os.isatty(fd)
    if wanted == "auto":
        wanted = "text" if terminal else "logfmt"
    if wanted == "text":
        return Text(timed=not journal, prioritised=journal, coloured=is_coloured(environ, terminal) and not journal)
    form: Callable[..., Form] = Json if wanted == "json" else Logfmt
    return form(timed=not journal, prioritised=journal)


def is_journal(stream: str, fd: int | None) -> bool:
    """Whether `fd` is the journal's stream, whose device and inode systemd has put into `JOURNAL_STREAM`. Source:
    systemd.exec(5)."""
    try:
        status = os.fstat(fd) if fd is not None else None
    except OSError:
        return False
    return status is not None and stream == f"{status.st_dev}:{status.st_ino}"


def is_coloured(environ: Mapping[str, str], terminal: bool) -> bool:
    """Whether colours are shown, by what is customary: `NO_COLOR`, `FORCE_COLOR`, and no colours for `TERM=dumb`.
    Source: no-color.org, force-color.org."""
    if environ.get("NO_COLOR"):
        return False
    if environ.get("FORCE_COLOR"):
        return environ["FORCE_COLOR"] not in ("0", "false")
    return terminal and environ.get("TERM", "") not in ("", "dumb")


def priority(level: int) -> str:
    """What the journal reads in front of a line of this level."""
    return next((mark for least, mark in _PRIORITIES if level >= least), "<7>")


def level_of(level: int) -> str:
    """The name of a level as it is in the configuration."""
    return logging.getLevelName(level).lower()


def joined(lines: Sequence[str]) -> str:
    """A traceback as one text."""
    return shortened("\n".join(lines), MOST_JOINED)


def in_logfmt(text: str, quoted: bool = False) -> str:
    """A value of logfmt, in quotes if it must be, or is to be."""
    if not quoted and text.isprintable() and text and not _SPECIAL.intersection(text):
        return text
    text = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped(text)}"'


_SPECIAL = frozenset(' "=\\')


def in_json(text: str) -> str:
    """A string of JSON."""
    return encode_basestring_ascii(text)


def _json_value(value: str | int) -> str:
    return str(value) if isinstance(value, int) else in_json(value)


_local: tuple[int, str] = (0, "")
_utc: tuple[int, str] = (0, "")


def local_time(now: float) -> str:
    """Local time in milliseconds. All but these is the same for a second, and takes the longest."""
    global _local
    second, text = _local
    if second != int(now):
        second = int(now)
        text = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))
        _local = second, text
    return f"{text},{int((now - second) * 1000):03d}"


def utc_time(now: float) -> str:
    """ISO 8601 in milliseconds."""
    global _utc
    second, text = _utc
    if second != int(now):
        second = int(now)
        text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        _utc = second, text
    return f"{text}.{int((now - second) * 1000):03d}Z"
