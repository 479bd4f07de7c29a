"""Docstrings, comments and messages use standard technical terms; the words of a narrator are not among them."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("proxy", "backends", "agents", "src/llama_smart_proxy")
"""Files and folders that are checked."""
BANNED = re.compile(r"\b(told|tells|wants|whatever|whoever|nobody|somebody|stands\s+behind)\b", re.IGNORECASE)
QUOTED = re.compile(r"`[^`]*`")
"""Identifiers and texts of other programs, which may contain any word."""
WIRE_TEXTS: tuple[str, ...] = ()
"""String literals that are another program's own text and contain a banned word."""


def texts(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of each string literal, docstrings included, and of each comment."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value not in WIRE_TEXTS:
            yield node.lineno, node.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def banned(source: str) -> list[str]:
    return [f"{line}: {found[0]}" for line, text in texts(source) for found in BANNED.finditer(QUOTED.sub("", text))]


@pytest.mark.parametrize("room", ROOMS)
def test_no_text_contains_a_banned_word(room: str) -> None:
    files = [ROOT / room] if room.endswith(".py") else sorted((ROOT / room).rglob("*.py"))
    assert files, f"{room} does not exist"
    wrong = [f"{file.relative_to(ROOT)}:{place}" for file in files for place in banned(file.read_text("utf-8"))]
    assert wrong == []


def test_docstrings_comments_and_messages_are_searched_but_not_quotations() -> None:
    source = '"""Whoever calls."""\nx = f"{1} is told"  # nobody\ny = "`whatever` is a field"\nwants = 1\n'
    assert banned(source) == ["1: Whoever", "2: told", "2: nobody"]
