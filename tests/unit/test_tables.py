"""What commands print: tables, durations and sizes."""

from __future__ import annotations

import io
import sys

import pytest

from llama_smart_proxy.proxy.cli import tables
from llama_smart_proxy.proxy.log import shown


class Terminal(io.StringIO):
    """A terminal in memory."""

    def isatty(self) -> bool:
        return True


def printed(heads: list[str], *rows: list[str], right: str = "") -> list[str]:
    out = io.StringIO()
    before, sys.stdout = sys.stdout, out
    try:
        tables.print_table(heads, rows, right=right)
    finally:
        sys.stdout = before
    return out.getvalue().splitlines()


def test_columns_are_as_wide_as_their_widest_cell_and_numbers_are_at_the_right() -> None:
    assert printed(["NAME", "MEM", "X"], ["qwen", "1.5 GiB", "-"], ["a", "9 B", "yes"], right="MEM") == [
        "NAME      MEM  X",
        "qwen  1.5 GiB  -",
        "a         9 B  yes",
    ]


@pytest.mark.parametrize("name", ["模型", "e\u0301e\u0301e\u0301e\u0301", "\uff41\uff42", "한글", "a\u200bbcd"])
def test_wide_and_combining_characters_do_not_move_the_next_column(name: str) -> None:
    _, first, second = printed(["N", "S"], [name, "x"], ["abcd", "y"])
    cell = shown(name)  # an invisible character is shown as its escape
    assert tables.width(first.removesuffix("x")) == tables.width(second.removesuffix("y"))
    assert first == f"{cell}{' ' * (len(second) - 1 - tables.width(cell))}x"


def test_a_cell_cannot_command_the_terminal() -> None:
    assert printed(["N"], ["\x1b[2Ja\nb"])[1:] == ["\\x1b[2Ja\\nb"]


@pytest.mark.parametrize(
    ("variables", "coloured"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False), ({"TERM": "dumb", "FORCE_COLOR": "1"}, True)],
)
def test_colours_are_for_terminals_that_may_have_them(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], coloured: bool
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm", **variables}.items():
        monkeypatch.setenv(name, value)
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    tables.print_table(["N", "S"], [["m", "ready"]], colours={"ready": "green"})
    expected = ("\x1b[1mN\x1b[0m  \x1b[1mS\x1b[0m\nm  \x1b[32mready\x1b[0m\n", "N  S\nm  ready\n")
    assert out.getvalue() == expected[0 if coloured else 1]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (float("inf"), "never"),
        (-0.1, "0 ms"),
        (0.3404, "340 ms"),
        (2.44, "2.4 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 m"),
        (130, "2 m 10 s"),
        (3600, "1 h"),
        (11_100, "3 h 5 m"),
        (86_399, "23 h 59 m"),
        (353_000, "4 d 2 h"),
    ],
)
def test_durations_have_at_most_two_units(seconds: float | None, text: str) -> None:
    assert tables.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "-"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (1024 * 1023.6, "1.0 MiB"),
        (851_443_712, "812 MiB"),
        (4.2 * 2**30, "4.2 GiB"),
        (5000 * 2**40, "5000 TiB"),
    ],
)
def test_sizes_have_the_largest_unit_that_fits(count: float | None, text: str) -> None:
    assert tables.size(count) == text
