"""The last lines a child printed, in bounded memory however much it prints."""

from __future__ import annotations

from collections import deque

LINES = 200
LINE_BYTES = 2048
LOOKED_AT = 64 * 1024


class LogRing:
    """Keeps the last `LINES` lines, of each its last `LINE_BYTES` bytes: at most 400 KiB.

    Of a piece longer than `LOOKED_AT` only the end is looked at, and never more line ends in it than lines are kept, so
    that a child that floods its output costs little.
    """

    def __init__(self) -> None:
        self._lines: deque[bytes] = deque(maxlen=LINES)
        self._partial = b""

    def feed(self, data: bytes) -> None:
        """Take output as it comes, cut anywhere."""
        first, *rest = data[-LOOKED_AT:].rsplit(b"\n", LINES)
        if not rest:
            self._partial = (self._partial + first[-LINE_BYTES:])[-LINE_BYTES:]
            return
        *_, last_of_first = first.rsplit(b"\n", 1)
        whole = last_of_first is first and len(data) <= LOOKED_AT
        self._add((self._partial if whole else b"") + last_of_first[-LINE_BYTES:])
        for line in rest[:-1]:
            self._add(line)
        self._partial = rest[-1][-LINE_BYTES:]

    def tail(self, lines: int = LINES) -> list[str]:
        """The last `lines` lines that are not blank, oldest first, without control characters."""
        found = [text for line in (*self._lines, self._partial) if (text := _clean(line))]
        return found[-lines:] if lines > 0 else []

    def _add(self, line: bytes) -> None:
        self._lines.append(line[-LINE_BYTES:])


def _clean(line: bytes) -> str:
    text = line.decode("utf-8", "replace").rstrip().expandtabs(4)
    return "".join(char for char in text if char.isprintable())
