"""Spans of time as people write them: `300`, `"5m"`, `"1h30m"`, `"500ms"`, `-1`."""

from __future__ import annotations

import math
import re
from typing import Annotated

from pydantic import BeforeValidator, WithJsonSchema

LONGEST_S = 366 * 86400.0
_UNITS_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")
_HOW = 'write seconds as a number, or a text such as "90s", "5m" or "1h30m"'


def parse_duration(value: object) -> float:
    """Seconds of `value`: a number of seconds or text with units, as Go and Ollama write it. Negative means never.

    Returns `math.inf` for never. Raises `ValueError` for anything else and for spans beyond a year, which the event
    loop's timers cannot all hold.
    """
    seconds = _parse_text(value.strip()) if isinstance(value, str) else _parse_number(value)
    if seconds < 0:
        return math.inf
    if seconds > LONGEST_S:
        raise ValueError("longer than a year; a negative number means never")
    return seconds


def parse_seconds(value: object) -> float:
    """Like `parse_duration`, for limits that always apply: never is not an answer."""
    seconds = parse_duration(value)
    if math.isinf(seconds):
        raise ValueError("must not be negative")
    return seconds


def _parse_number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"not a time; {_HOW}")
    return _checked(float(max(-LONGEST_S - 1, min(value, LONGEST_S + 1))))


def _parse_text(text: str) -> float:
    sign, digits = (-1.0, text[1:]) if text.startswith("-") else (1.0, text)
    parts = _PART.findall(digits)
    if parts and "".join(number + unit for number, unit in parts) == digits:
        return sign * math.fsum(float(number) * _UNITS_S[unit] for number, unit in parts)
    try:
        return _checked(float(text))
    except ValueError:
        raise ValueError(f"not a time; {_HOW}") from None


def _checked(seconds: float) -> float:
    if math.isnan(seconds):
        raise ValueError(f"not a time; {_HOW}")
    return seconds


_JSON_FORM = {"anyOf": [{"type": "number"}, {"type": "string", "pattern": r"^-?([0-9.]+(ns|us|µs|ms|s|m|h)?)+$"}]}

Duration = Annotated[float, BeforeValidator(parse_duration), WithJsonSchema(_JSON_FORM)]
"""Seconds, `math.inf` for never, 0 for at once."""

Seconds = Annotated[float, BeforeValidator(parse_seconds), WithJsonSchema(_JSON_FORM)]
"""Seconds, finite and not negative."""
