"""What a request waits for, described for the person who waits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Progress:
    """Of one request, from its arrival to the first piece of its answer. Its backend writes it, and the side of the
    client reads it, at most once a second: a description is computed when it is read, not when something changes.
    `shows` is whether a model of that name may be named to the client."""

    __slots__ = ("_describe", "shows")

    def __init__(self, shows: Callable[[str], bool] = lambda name: True) -> None:
        self._describe: Callable[[], str] | None = None
        self.shows = shows

    @property
    def text(self) -> str:
        """One short line, such as "Loading qwen3: 35 %"; empty if it waits for nothing that is known."""
        return self._describe() if self._describe is not None else ""

    def waits(self, describe: Callable[[], str] | None) -> None:
        """From now on, `text` is what `describe` returns; None if it waits for nothing any more."""
        self._describe = describe


@contextmanager
def described(progress: Progress | None, begin: Callable[[], Callable[[], str]]) -> Iterator[None]:
    """Within the context, a request waits for what `begin` returns a description of; it is called if there is a
    `progress`."""
    if progress is None:
        yield
        return
    progress.waits(begin())
    try:
        yield
    finally:
        progress.waits(None)


def timed(text: str, spent_s: float, left_s: float | None = None) -> str:
    """`text` with the seconds that are left, as far as they are known and not over, else with those that have passed:
    a line that does not change would look as if nothing happened."""
    if left_s is not None and left_s > 0.5:
        return f"{text}, about {math.ceil(left_s)} s"
    return f"{text}, {spent_s:.0f} s so far" if spent_s >= 1 else text


def waiting(text: str, now: Callable[[], float], left_s: float | None = None) -> Callable[[], str]:
    """A description of a wait that begins now, by the clock `now` in seconds, and may take `left_s`."""
    since = now()

    def describe() -> str:
        spent_s = now() - since
        return timed(text, spent_s, left_s - spent_s if left_s is not None else None)

    return describe
