"""The standard streams of the process, and text of others as people may see it there."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

MOST_CHARACTERS = 4000
"""Characters of a line, as far as they need no escape. What is cut out is in the middle."""


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


def fd_of(stream: object) -> int | None:
    """None for a stream that was closed before the program started, or is not the system's."""
    try:
        return stream.fileno()  # type: ignore[attr-defined, no-any-return]
    except (AttributeError, OSError, ValueError):
        return None


def shown(text: str) -> str:
    """`text` as one line for people, of `MOST_CHARACTERS` or little more. Control characters, such as line breaks and
    the beginning of what terminals obey, characters that change the direction of others, and half characters are
    escaped."""
    return escaped(shortened(text, MOST_CHARACTERS))


def shortened(text: str, most: int) -> str:
    """`text`, or its beginning and its end, of `most` characters together."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]} [{len(text) - 2 * half} characters] {text[-half:]}"


def escaped(text: str) -> str:
    """`text` with every character escaped that is not printable."""
    return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()


@contextmanager
def shown_output(redact: Callable[[str], str] = str) -> Iterator[None]:
    """Within the context, what is printed to standard output and error is changed by `redact`, and escaped, but for
    line breaks and tabs, and what a progress bar begins with."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (
        cast(TextIO, _Shown(stream, redact)) if stream is not None else stream for stream in streams
    )
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams


class _Shown:
    """A text stream whose `write` escapes."""

    def __init__(self, stream: TextIO, redact: Callable[[str], str]) -> None:
        self._stream = stream
        self._redact = redact

    def write(self, text: str) -> int:
        text = self._redact(text)
        if not text.isprintable():
            kept = "\r" if text.startswith("\r") else ""
            text = kept + "".join(c if c in "\n\t" else _escaped(c) for c in text[len(kept) :])
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
