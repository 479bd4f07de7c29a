"""Parses durations: `300`, `"5m"`, `"1h30m"`, `"500ms"`, `-1`."""

from __future__ import annotations

import json
import math
import re
from typing import Annotated

from pydantic import BeforeValidator, WithJsonSchema

LONGEST_S = 366 * 86400.0
_NANOSECONDS = {
    "ns": 1,
    "us": 10**3,
    "µs": 10**3,
    "μs": 10**3,
    "ms": 10**6,
    "s": 10**9,
    "m": 60 * 10**9,
    "h": 3600 * 10**9,
}
_LONGEST_NS = 2**63 - 1
_LONGEST = 256
"""Characters of a text that is read: each part of it takes a step."""
_NUMBER = re.compile(r"[0-9]+\.?[0-9]*|\.[0-9]+")
_UNIT = re.compile(r"[^0-9.]+")
_EXPECTED = 'write seconds as a number, or a text such as "90s", "5m" or "1h30m"'


def parse_duration(value: object) -> float:
    """Seconds of `value`: a number of seconds, or a text with units as in Go; `math.inf` for a negative one (never).

    Raises: ValueError for anything else, and for durations over a year, for which the event loop has no timers.
    """
    seconds = _parse_text(value[: _LONGEST + 1].strip()) if isinstance(value, str) else _parse_number(value)
    if seconds < 0:
        return math.inf
    if seconds > LONGEST_S:
        raise ValueError("longer than a year; a negative number means never")
    return seconds


def parse_seconds(value: object) -> float:
    """Like `parse_duration`, but negative durations are errors."""
    seconds = parse_duration(value)
    if math.isinf(seconds):
        raise ValueError("must not be negative")
    return seconds


def _parse_number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"not a time; {_EXPECTED}")
    return _checked(float(max(-LONGEST_S - 1, min(value, LONGEST_S + 1))))


def go_duration_s(text: str) -> float:
    """Seconds of a duration in Go's format; `math.inf` for a negative one, which Ollama treats as unlimited.

    Raises: ValueError, with Go's message. Source: `time.ParseDuration`.
    """
    quoted = json.dumps(text[:_LONGEST], ensure_ascii=False)
    if len(text) > _LONGEST:
        raise ValueError(f"time: invalid duration {quoted}")
    position = 1 if text.startswith(("-", "+")) else 0
    if text[position:] == "0":
        return 0.0
    nanoseconds = 0.0
    while True:
        number = _NUMBER.match(text, position)
        if number is None:
            raise ValueError(f"time: invalid duration {quoted}")
        unit = _UNIT.match(text, number.end())
        if unit is None:
            raise ValueError(f"time: missing unit in duration {quoted}")
        if unit[0] not in _NANOSECONDS:
            unknown = json.dumps(unit[0], ensure_ascii=False)
            raise ValueError(f"time: unknown unit {unknown} in duration {quoted}")
        nanoseconds += float(number[0]) * _NANOSECONDS[unit[0]]
        position = unit.end()
        if position == len(text):
            break
    if nanoseconds > _LONGEST_NS:
        raise ValueError(f"time: invalid duration {quoted}")
    return math.inf if text.startswith("-") and nanoseconds else nanoseconds / 1e9


def _parse_text(text: str) -> float:
    try:
        return _checked(float(text))
    except ValueError:
        pass
    try:
        seconds = go_duration_s(text)
    except ValueError:
        raise ValueError(f"not a time; {_EXPECTED}") from None
    return -1.0 if math.isinf(seconds) else seconds


def _checked(seconds: float) -> float:
    if math.isnan(seconds):
        raise ValueError(f"not a time; {_EXPECTED}")
    return seconds


_JSON_FORM = {"anyOf": [{"type": "number"}, {"type": "string", "pattern": r"^-?([0-9.]+(ns|us|µs|ms|s|m|h)?)+$"}]}

Duration = Annotated[float, BeforeValidator(parse_duration), WithJsonSchema(_JSON_FORM)]
"""Seconds; `math.inf` is never, 0 is at once."""

Seconds = Annotated[float, BeforeValidator(parse_seconds), WithJsonSchema(_JSON_FORM)]
"""Seconds, finite and not negative."""
