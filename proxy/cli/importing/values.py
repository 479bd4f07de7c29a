"""Values of the other program's configuration, by their types. Each raises ValueError for another one."""

from __future__ import annotations

from typing import Any


def text(value: object) -> str:
    """A text, or a number as one; nothing is the empty text."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(": must be a text")
    return str(value)


def texts(value: object) -> list[str]:
    """A list of texts; nothing is the empty list."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise ValueError(": must be a list of texts")
    return [text(item) for item in value]


def number(value: object, least: int) -> int:
    """An integer that is not below `least`."""
    if isinstance(value, str) and value.strip().lstrip("-").isdecimal():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f": must be an integer of at least {least}")
    return value


def mapping(value: object) -> dict[str, Any]:
    """A mapping; nothing is the empty one."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(": must be a mapping")
    return value
