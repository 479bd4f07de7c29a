"""The headers in which an API reports what is left of a client's limits."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple


class Allowance(NamedTuple):
    """What is left of one limit: `kind` is `requests` or `tokens`, `reset_s` the seconds until all of it is there."""

    kind: str
    limit: int
    remaining: int
    reset_s: float


def openai_headers(allowances: Sequence[Allowance]) -> list[tuple[str, str]]:
    """Source: the OpenAI API reference, "Rate limits in headers"."""
    return [
        header
        for kind, limit, remaining, reset_s in allowances
        for header in (
            (f"x-ratelimit-limit-{kind}", str(limit)),
            (f"x-ratelimit-remaining-{kind}", str(remaining)),
            (f"x-ratelimit-reset-{kind}", duration(reset_s)),
        )
    ]


def anthropic_headers(allowances: Sequence[Allowance]) -> list[tuple[str, str]]:
    """Source: the Anthropic API reference, "Rate limits", "Response headers"; times are RFC 3339."""
    now = datetime.now(UTC)
    return [
        header
        for kind, limit, remaining, reset_s in allowances
        for header in (
            (f"anthropic-ratelimit-{kind}-limit", str(limit)),
            (f"anthropic-ratelimit-{kind}-remaining", str(remaining)),
            (f"anthropic-ratelimit-{kind}-reset", f"{now + timedelta(seconds=reset_s):%Y-%m-%dT%H:%M:%SZ}"),
        )
    ]


def duration(seconds: float) -> str:
    """`seconds` as OpenAI writes them: `0s`, `120ms`, `6m0s`, `1.5s`."""
    thousandths = round(max(0.0, seconds) * 1000)
    if 0 < thousandths < 1000:
        return f"{thousandths}ms"
    minutes, rest = divmod(thousandths, 60_000)
    return f"{f'{minutes}m' if minutes else ''}{rest / 1000:g}s"


EXPOSED = ", ".join(
    f"x-ratelimit-{what}-{kind}, anthropic-ratelimit-{kind}-{what}"
    for kind in ("requests", "tokens")
    for what in ("limit", "remaining", "reset")
)
"""The names of all of them."""
