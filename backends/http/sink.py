"""What takes the body of an answer."""

from __future__ import annotations

from typing import Protocol


class Sink(Protocol):
    """Accepts body bytes as they arrive."""

    def feed(self, data: bytes) -> bool:
        """Take `data`; returns False to pause the source until `drained()` returns."""

    async def drained(self) -> None:
        """Return once more data can be taken."""
