"""Background prompts of chat UIs (titles, tags, follow-ups), as the pool handles them: people come first."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama_smart_proxy.backends.http.exchange import UpstreamResponse

BROKEN_OFF = "broken_off"
"""Code of the failure of a task that made room for a person: to be sent again."""
MOST_BREAKS = 3
"""So often a task is broken off; then it is completed."""


class Task:
    """One background prompt, over all attempts to answer it. `UpstreamRequest.task` refers to it.

    `hold_s`: how long it lets others go first, once its model is loaded. `whole`: none of its answer is used before it
    is complete, so that it can be broken off at any time; otherwise until the first byte. `since` is when it first
    arrived at the pool, on the event loop's clock; `breaks` is how often it was broken off.
    """

    __slots__ = ("_response", "breaks", "broken", "hold_s", "since", "whole")

    def __init__(self, hold_s: float = 0.0) -> None:
        self.hold_s = hold_s
        self.whole = False
        self.since = 0.0
        self.breaks = 0
        self.broken = False
        self._response: UpstreamResponse | None = None

    def arrives(self) -> None:
        """It is at the pool, for the first time or again."""
        self.since = self.since or asyncio.get_running_loop().time()

    def begins(self) -> None:
        """It has got a slot."""
        self.broken, self._response = False, None

    def sends(self, response: UpstreamResponse) -> None:
        """It has been sent, and `response` is its answer."""
        self._response = response
        if self.broken:
            self._fail(response)

    @property
    def breakable(self) -> bool:
        """Whether it may be broken off now."""
        response = self._response
        if self.broken or self.breaks >= MOST_BREAKS or (response is not None and response.complete):
            return False
        return self.whole or response is None or not response.begun

    def break_off(self) -> None:
        """Fail its answer with the code `BROKEN_OFF`, at once: the connection is closed, so that the server stops."""
        self.broken = True
        self.breaks += 1
        if self._response is not None:
            self._fail(self._response)

    def _fail(self, response: UpstreamResponse) -> None:
        response.fail("a background prompt made room for a person's request", code=BROKEN_OFF)
