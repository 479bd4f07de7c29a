"""One record per request, filled in on its way and observed when it ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from llama_smart_proxy.proxy.chat.extensions import Json


@dataclass(slots=True)
class Timing:
    """When a request arrived and when it was sent to the model's server, in seconds of `time.monotonic()`.

    `extra` is what else an API that reports such things has in its last frame.
    """

    arrived_s: float
    sent_s: float = 0.0
    extra: Json = field(default_factory=dict)


@dataclass(slots=True)
class RequestRecord(Timing):
    """What happened to one request. Times are seconds of `time.monotonic()`, 0 for what did not happen.

    `request_id` is in the header `X-Request-Id`. `model` is the model that the request turned out to be for, `backend`
    who runs it, `agents` those that took part. `resolved_s`: the model was found; `sent_s`: the request went to its
    server, which before that may have waited in the queue or for the load; `first_byte_s` and `last_byte_s`: of the
    answer. `answered` is the status of a response of which the client has all but the end mark (many leave before they
    get that), `status` the status in the end: 499 if the client left before its answer was complete.
    """

    request_id: str = ""
    method: str = ""
    path: str = ""
    api: str = ""
    client: str = ""
    model: str = "-"
    backend: str = ""
    agents: Sequence[str] = ()
    resolved_s: float = 0.0
    first_byte_s: float = 0.0
    last_byte_s: float = 0.0
    ended_s: float = 0.0
    answered: int = 0
    status: int = 0
    count_usage: Callable[[], Json | None] | None = None
    """Reads the counts out of the last frames of a relayed answer: only if an observer asks."""
    counted: Json | None = None

    def routed(self, model: str, backend: str) -> None:
        """The model was found, or another one was chosen."""
        self.model, self.backend, self.resolved_s = model, backend, time.monotonic()

    @property
    def usage(self) -> Json | None:
        """The tokens, in OpenAI's shape, as the model's server counted them; None if it did not."""
        if self.counted is None and self.count_usage is not None:
            self.counted, self.count_usage = self.count_usage(), None
        return self.counted


Observer = Callable[[RequestRecord], None]
"""Called when a request has ended; must not block, and what it raises is logged."""
