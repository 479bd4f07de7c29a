"""What commands print: tables with aligned columns, durations and sizes for people, and colours on a terminal."""

from __future__ import annotations

import json
import os
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from llama_smart_proxy.proxy.log import is_coloured, shown

NONE = "-"
"""What stands for a value that there is not."""
GAP = "  "
COLOURS = {"red": 31, "green": 32, "yellow": 33, "dim": 2, "bold": 1}
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def print_json(value: Any) -> None:
    """Print `value` as JSON of several lines."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], *, colours: Mapping[str, str] | None = None, right: str = ""
) -> None:
    """Print `rows` below `heads`, each column as wide as its widest cell.

    The columns whose heads are among the words of `right` are aligned to the right. On a terminal the cells that are
    keys of `colours` are shown in that one of `COLOURS`, and the heads are bold.
    """
    cells = [[shown(cell) for cell in row] for row in (heads, *rows)]
    widths = [max(map(width, column)) for column in zip(*cells, strict=True)]
    is_right = [head in right.split() for head in heads]
    painted = is_coloured(os.environ, sys.stdout.isatty())
    for number, row in enumerate(cells):
        line = []
        for cell, columns, at_right in zip(row, widths, is_right, strict=True):
            space = " " * (columns - width(cell))
            colour = ("bold" if number == 0 else (colours or {}).get(cell, "")) if painted else ""
            text = paint(cell, colour) if colour else cell
            line.append(space + text if at_right else text + space)
        # `writelines` of a stream within `shown_output` does not escape, which would spoil colours; the cells are shown
        sys.stdout.writelines([GAP.join(line).rstrip() + "\n"])


def paint(text: str, colour: str) -> str:
    """`text` in one of `COLOURS`."""
    return f"\x1b[{COLOURS[colour]}m{text}\x1b[0m"


def width(text: str) -> int:
    """How many columns of a terminal `text` occupies: East Asian wide characters two, combining ones none."""
    if text.isascii():
        return len(text)
    return sum(map(_columns, text))


def _columns(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in ("W", "F") else 1


def duration(seconds: float | None) -> str:
    """Seconds for people, in at most two units: `340 ms`, `2.4 s`, `2 m 10 s`, `3 h 5 m`, `4 d 2 h`."""
    if seconds is None:
        return NONE
    if seconds == float("inf"):
        return "never"
    if seconds < 1:
        return f"{max(0.0, seconds) * 1000:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    for large, small, size in ((86400, 3600, "d h"), (3600, 60, "h m"), (60, 1, "m s")):
        if whole >= large:
            rest = whole % large // small
            first, second = size.split()
            return f"{whole // large} {first}{f' {rest} {second}' if rest else ''}"
    raise AssertionError("unreachable")


def size(count: float | None) -> str:
    """Bytes for people, with three digits or four: `512 B`, `1.5 KiB`, `812 MiB`, `4.2 GiB`."""
    if count is None:
        return NONE
    unit = 0
    while count >= 1023.5 and unit < len(_UNITS) - 1:
        count, unit = count / 1024, unit + 1
    return f"{count:.0f} {_UNITS[unit]}" if count >= 99.95 or unit == 0 else f"{count:.1f} {_UNITS[unit]}"


def number(value: float | None) -> str:
    """A number, or `NONE`."""
    return NONE if value is None else f"{value:g}"
