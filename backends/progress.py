"""What a request waits for, described for the person who waits."""

from __future__ import annotations

from collections.abc import Callable


class Progress:
    """Of one request, from its arrival to the first piece of its answer. Its backend writes it, and the side of the
    client reads it, at most once a second: a description is computed when it is read, not when something changes."""

    __slots__ = ("_describe",)

    def __init__(self) -> None:
        self._describe: Callable[[], str] | None = None

    @property
    def text(self) -> str:
        """One short line, such as "Loading qwen3: 35 %"; empty if it waits for nothing that is known."""
        return self._describe() if self._describe is not None else ""

    def waits(self, describe: Callable[[], str] | None) -> None:
        """From now on, `text` is what `describe` returns; None if it waits for nothing any more."""
        self._describe = describe
