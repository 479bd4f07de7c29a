"""The context size that one model is asked for and loaded with."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field

from llama_smart_proxy.backends.http.exchange import UpstreamResponse

LOOK_S = 0.5
"""Longest wait in seconds for the hosts' lists while a request waits for them."""


@dataclass(slots=True)
class Context:
    """The context sizes in requests for one model, and their results.

    `confirmed` is the largest size of a successful request, `pending` are those of requests without an answer yet,
    `failed` is the last one that failed. `looked`: what Ollama loads the model with for a request without a size has
    been looked up since `confirmed` changed. `used_at` is the last use of the model, on the event loop's clock.
    """

    confirmed: int = 0
    pending: list[int] = field(default_factory=list)
    failed: int = 0
    looked: bool = False
    used_at: float = -math.inf

    def size(self, loaded: Sequence[int]) -> int:
        """The largest size that applies to other requests too, 0 for none; `loaded` are the sizes with which hosts have
        the model loaded.

        Pending sizes count, or concurrent first requests would cause alternating reloads; but not a size that has
        failed before, which would fail other requests.
        """
        if self.failed in loaded:  # its client disconnected before the answer
            self.confirmed = max(self.confirmed, self.failed)
        return max(self.confirmed, *(size for size in self.pending if size != self.failed), 0)

    async def track(self, size: int, answer: Awaitable[UpstreamResponse]) -> UpstreamResponse:
        """Await the `answer` to a request with that size, and record whether it succeeded."""
        self.pending.append(size)
        confirmed = False
        try:
            response = await answer
            confirmed = response.status == 200
            return response
        finally:
            self.pending.remove(size)
            if not confirmed:
                self.failed = size
            elif size > self.confirmed:
                self.confirmed, self.looked = size, False

    def default_of(self, before: Sequence[int], after: Sequence[int]) -> int:
        """Ollama's own size, if a request without one has just loaded the model; 0 if it was loaded already.

        `before` and `after` are the sizes with which hosts have listed the model. A size that clients asked for and
        that was replaced by a larger one is no longer what the model is loaded with.
        """
        new = [size for size in after if size and size not in before and size != self.confirmed]
        if not new:
            return 0
        if self.confirmed:
            self.confirmed = max(self.confirmed, *new)
        return max(new)
