"""Bytes in, whole frames out. No I/O.

Frames are cut on bytes: `str.splitlines` would also cut at U+2028, which is legal inside JSON.
"""

from __future__ import annotations

import re
from typing import Protocol

MAX_FRAME = 8 * 1024 * 1024
"""Longest frame that is passed on. Ollama's own Go client gives up at 8 MB a line; no real answer comes near."""


class FrameTooLong(Exception):
    """A frame grew past `MAX_FRAME` without ending."""


class Splitter(Protocol):
    """Cuts a stream of bytes where frames end. What `push` returned, joined with `rest`, is what went in."""

    @property
    def rest(self) -> bytes: ...
    def push(self, data: bytes) -> bytes: ...
    def says_something(self, whole: bytes) -> bool: ...
    def frames(self, whole: bytes) -> list[bytes]: ...
    def cut(self, whole: bytes) -> list[bytes]: ...
    def take(self, data: bytes) -> list[bytes]: ...


class LineSplitter:
    """Passes on whole lines (NDJSON) and holds back the one that is still incomplete."""

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held = bytearray()

    @property
    def rest(self) -> bytes:
        """The bytes of the line that has not ended yet."""
        return bytes(self._held)

    def push(self, data: bytes) -> bytes:
        """All lines that are complete once `data` has arrived (empty: none).

        Raises: FrameTooLong.
        """
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

    def says_something(self, whole: bytes) -> bool:
        """Whether what `push` returned holds more than blank lines."""
        return not whole.isspace()

    def frames(self, whole: bytes) -> list[bytes]:
        """What `push` returned, line by line, without line ends and blank lines."""
        return [line for line in whole.split(b"\n") if line.strip()]

    def cut(self, whole: bytes) -> list[bytes]:
        """What `push` returned, line by line, with every byte it had."""
        if whole.find(b"\n") == len(whole) - 1:
            return [whole] if whole else []
        return whole.splitlines(keepends=True) if b"\r" not in whole else _LINE.findall(whole)

    def take(self, data: bytes) -> list[bytes]:
        """What `push` returns, cut."""
        return self.cut(self.push(data))


class EventSplitter:
    """Passes on whole server-sent events and holds back the one that is still incomplete.

    Lines end in LF, CRLF or CR, an event ends with a blank line (WHATWG HTML, "Event stream interpretation"). The bytes
    themselves are never changed: what `push` returned, joined with `rest`, is what went in.
    """

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held = bytearray()

    @property
    def rest(self) -> bytes:
        """The bytes of the event that has not ended yet."""
        return bytes(self._held)

    def push(self, data: bytes) -> bytes:
        """All events that are complete once `data` has arrived (empty: none).

        Raises: FrameTooLong.
        """
        if not self._held and data.endswith((b"\n\n", b"\n\r\n")):
            return data  # the way servers send: each write is whole events
        start = max(0, len(self._held) - 2)  # a blank line may straddle two pieces
        self._held += data
        end = _after_last_blank_line(self._held, start)
        if len(self._held) - end > MAX_FRAME:
            raise FrameTooLong
        if not end:
            return b""
        whole = bytes(self._held[:end])
        del self._held[:end]
        return whole

    def says_something(self, whole: bytes) -> bool:
        """Whether what `push` returned holds more than comments and blank lines."""
        return b"data:" in whole

    def frames(self, whole: bytes) -> list[bytes]:
        """What `push` returned, event by event, without the blank lines between them."""
        events = _BLANK_LINE.split(whole) if b"\r" in whole else whole.split(b"\n\n")
        return [event for event in events if event.strip()]

    def cut(self, whole: bytes) -> list[bytes]:
        """What `push` returned, event by event, with every byte it had."""
        if b"\r" not in whole and whole.find(b"\n\n") == len(whole) - 2:
            return [whole] if whole else []
        if b"\r" not in whole and b"\n\n\n" not in whole and whole.endswith(b"\n\n"):
            return [event + b"\n\n" for event in whole[:-2].split(b"\n\n")]
        ends = [found.end() for found in _BLANK_LINE.finditer(whole)]
        pieces = [whole[start:end] for start, end in zip([0, *ends], [*ends, len(whole)], strict=True)]
        return [piece for piece in pieces if piece]

    def take(self, data: bytes) -> list[bytes]:
        """What `push` returns, cut."""
        if not self._held and 0 <= data.find(b"\n\n") == len(data) - 2 and b"\r" not in data:
            return [data]  # the way servers send a token
        return self.cut(self.push(data))


_LINE = re.compile(rb"[^\n]*\n|[^\n]+")
_LINE_END = re.compile(rb"\r\n|\n|\r")
_BLANK_LINE = re.compile(rb"(?:\r\n|\n|\r(?!\n))(?:\r\n|\n|\r)+")


def event_data(event: bytes) -> bytes | None:
    """The data of one event, several `data:` lines joined by LF; None for a comment and the like."""
    if event.startswith(b"data: ") and b"\n" not in event and b"\r" not in event:
        return event[6:]
    lines = _LINE_END.split(event)
    data = [line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:") or line == b"data"]
    return b"\n".join(data) if data else None


def _after_last_blank_line(data: bytearray, start: int) -> int:
    """The index behind the last blank line that ends at or after `start`; 0 if there is none.

    A CR at the very end is not taken for a line of its own: the LF that makes it a CRLF may be on its way.
    """
    end = 0
    for blank, stop in ((b"\n\n", len(data)), (b"\n\r\n", len(data)), (b"\r\r", len(data) - 1)):
        found = data.rfind(blank, start, stop)
        if found >= 0:
            end = max(end, found + len(blank))
    return end
