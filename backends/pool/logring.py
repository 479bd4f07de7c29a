"""The last lines a child printed, in bounded memory however much it prints."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

LINES = 200
LINE_BYTES = 2048
LOOKED_AT = 64 * 1024


class LogRing:
    """Keeps the last `LINES` lines, of each its last `LINE_BYTES` bytes: at most 400 KiB. `added` is how many lines
    have come so far; `on_lines` is called when there are more. Texts are returned without secrets, by `blanked`.

    Of a piece longer than `LOOKED_AT` only the end is looked at, and never more line ends in it than lines are kept, so
    that a child that floods its output costs little.
    """

    def __init__(self, blanked: Callable[[str], str] = str) -> None:
        self.added = 0
        self.on_lines: Callable[[], None] | None = None
        self._blanked = blanked
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
        self.added += data.count(b"\n")
        if self.on_lines is not None:
            self.on_lines()

    def tail(self, lines: int = LINES) -> list[str]:
        """The last `lines` lines that are not blank, oldest first, without control characters."""
        return self._shown((*self._lines, self._partial))[-lines:] if lines > 0 else []

    def since(self, position: int, *, over: bool = False) -> tuple[int, list[str]]:
        """How many lines have been lost that came after the first `position` ones, and those that were not; if the
        output is `over`, with the last one, which may have no end."""
        new = max(0, self.added - position)
        found = list(self._lines)[-new:] if new else []
        return new - len(found), self._shown([*found, self._partial] if over else found)

    def _add(self, line: bytes) -> None:
        self._lines.append(line[-LINE_BYTES:])

    def _shown(self, lines: Iterable[bytes]) -> list[str]:
        text = self._blanked("\n".join([text for line in lines if (text := _clean(line))]))
        return text.split("\n") if text else []


def _clean(line: bytes) -> str:
    text = line.decode("utf-8", "replace").rstrip().expandtabs(4)
    return "".join(char for char in text if char.isprintable())
