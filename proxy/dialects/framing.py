"""Splits streams of bytes into frames: lines or server-sent events. No I/O.

Bytes are split, not text: `str.splitlines` would also split at U+2028, which is legal inside JSON.
"""

from __future__ import annotations

import re
from typing import ClassVar, Protocol

MAX_FRAME = 8 * 1024 * 1024
"""Longest frame, in bytes. Ollama's own Go client gives up at 8 MB a line; no real answer comes near."""


class FrameTooLong(Exception):
    """A frame exceeded `MAX_FRAME` before it ended."""


class Splitter(Protocol):
    """Splits a stream of bytes at the ends of frames. No byte is changed or lost: the results of `push`, joined with
    `rest`, are its input.

    `push` returns the frames that `data` completes, in one piece, because a relay needs no more than that; `split`
    divides such a piece, or `rest`, into frames. `openings` are the bytes that frames begin with, `foreign` those of
    other formats: JSON, HTML.
    """

    openings: ClassVar[bytes]
    foreign: ClassVar[bytes]

    @property
    def rest(self) -> bytes: ...
    @property
    def held(self) -> int: ...
    def push(self, data: bytes) -> bytes: ...
    def split(self, whole: bytes) -> list[bytes]: ...
    def has_content(self, whole: bytes) -> bool: ...


class LineSplitter:
    """Splits newline-delimited JSON."""

    __slots__ = ("_held",)
    openings: ClassVar[bytes] = b"{"
    foreign: ClassVar[bytes] = b"<"

    def __init__(self) -> None:
        self._held = bytearray()

    @property
    def rest(self) -> bytes:
        """The bytes of the incomplete line."""
        return bytes(self._held)

    @property
    def held(self) -> int:
        """The length of `rest`."""
        return len(self._held)

    def push(self, data: bytes) -> bytes:
        """All lines that `data` completes; may be empty. Raises: FrameTooLong."""
        if not self._held and data.endswith(b"\n"):
            return data
        end = data.rfind(b"\n") + 1
        whole = bytes(self._held) + data[:end] if end else b""
        if end:
            self._held.clear()
        self._held += data[end:]
        if len(self._held) > MAX_FRAME:
            raise FrameTooLong
        return whole

    def split(self, whole: bytes) -> list[bytes]:
        """The lines of `whole`, with their line ends; blank lines included."""
        if whole.find(b"\n") == len(whole) - 1:
            return [whole] if whole else []
        return whole.splitlines(keepends=True) if b"\r" not in whole else _LINE.findall(whole)

    def has_content(self, whole: bytes) -> bool:
        """Whether `whole` contains more than blank lines."""
        return not whole.isspace()


class EventSplitter:
    """Splits server-sent events.

    Lines end in LF, CRLF or CR, an event ends with a blank line (WHATWG HTML, "Event stream interpretation").
    """

    __slots__ = ("_held",)
    openings: ClassVar[bytes] = b":deir"  # comments, data, event, id, retry
    foreign: ClassVar[bytes] = b'<{["'

    def __init__(self) -> None:
        self._held = bytearray()

    @property
    def rest(self) -> bytes:
        """The bytes of the incomplete event."""
        return bytes(self._held)

    @property
    def held(self) -> int:
        """The length of `rest`."""
        return len(self._held)

    def push(self, data: bytes) -> bytes:
        """All events that `data` completes; may be empty. Raises: FrameTooLong."""
        if not self._held and data.endswith((b"\n\n", b"\n\r\n")):
            return data  # the usual case: servers write whole events
        start = max(0, len(self._held) - 2)  # a blank line may span two calls
        self._held += data
        end = _after_last_blank_line(self._held, start)
        if len(self._held) - end > MAX_FRAME:
            raise FrameTooLong
        if not end:
            return b""
        whole = bytes(self._held[:end])
        del self._held[:end]
        return whole

    def split(self, whole: bytes) -> list[bytes]:
        """The events of `whole`, with the blank lines after them."""
        if b"\r" not in whole and whole.find(b"\n\n") == len(whole) - 2:  # the usual case: one event per token
            return [whole] if whole else []
        if b"\r" not in whole and b"\n\n\n" not in whole and whole.endswith(b"\n\n"):
            return [event + b"\n\n" for event in whole[:-2].split(b"\n\n")]
        ends = [found.end() for found in _BLANK_LINE.finditer(whole)]
        pieces = [whole[start:end] for start, end in zip([0, *ends], [*ends, len(whole)], strict=True)]
        return [piece for piece in pieces if piece]

    def has_content(self, whole: bytes) -> bool:
        """Whether `whole` contains more than comments and blank lines."""
        return b"data:" in whole


BOM = b"\xef\xbb\xbf"
"""UTF-8's byte order mark, which some servers send at the beginning of a stream."""


def opening(data: bytes) -> bytes | None:
    """The first byte of a stream that is neither blank nor of a byte order mark; None if `data` has none yet."""
    if BOM.startswith(data):
        return None
    return data.removeprefix(BOM).lstrip()[:1] or None


_LINE = re.compile(rb"[^\n]*\n|[^\n]+")
_LINE_END = re.compile(rb"\r\n|\n|\r")
_BLANK_LINE = re.compile(rb"(?:\r\n|\n|\r(?!\n))(?:\r\n|\n|\r)++")


def event_data(event: bytes) -> bytes | None:
    """The data of one event, with several `data:` lines joined by LF; None if it has none, like a comment."""
    if event.startswith(b"data: ") and b"\n" not in event and b"\r" not in event:
        return event[6:]
    lines = _LINE_END.split(event)
    data = [line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:") or line == b"data"]
    return b"\n".join(data) if data else None


def _after_last_blank_line(data: bytearray, start: int) -> int:
    """The index after the last blank line that ends at or after `start`; 0 if there is none.

    A CR as the last byte does not count as a line end: it may be the first half of a CRLF.
    """
    end = 0
    for blank, stop in ((b"\n\n", len(data)), (b"\n\r\n", len(data)), (b"\r\r", len(data) - 1)):
        found = data.rfind(blank, start, stop)
        if found >= 0:
            end = max(end, found + len(blank))
    return end
