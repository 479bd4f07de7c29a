"""One record per request, filled in while it is processed and passed to observers when it has ended."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llama_smart_proxy.backends.journal import Journal, Step, StepKind
from llama_smart_proxy.proxy.chat.extensions import Json
from llama_smart_proxy.proxy.errors import Cancelled

if TYPE_CHECKING:
    from llama_smart_proxy.proxy.log.content import Exchange

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Timing:
    """When a request arrived and when it was sent to the model's server, in seconds of `time.monotonic()`.

    `extra` are further fields for the last frame, for APIs that report any there.
    """

    arrived_s: float
    sent_s: float = 0.0
    extra: Json = field(default_factory=dict)


@dataclass(slots=True)
class RequestRecord(Timing):
    """What happened to one request. Times are seconds of `time.monotonic()`, 0 for what did not happen.

    `request_id` is in the header `X-Request-Id`. `api` is the name of the client's dialect, `client` that of its API
    key, empty without one. `model` is the name of the resolved model, `backend` what runs it, `agents` those that took
    part. `slot`: its endpoint generates, or embeds. `resolved_s`: the model was found; `sent_s`: the request was sent
    to its server, possibly after a wait for the queue or the load; `first_byte_s` and `last_byte_s`: of the answer.
    `answered` is the status of a response of which only the end mark is still unsent (many clients disconnect before
    it), `status` the final status: 499 if the client disconnected before its answer was complete. `error` is the code
    of the error that the client got, in place of an answer or at its end.
    """

    request_id: str = ""
    method: str = ""
    path: str = ""
    api: str = ""
    client: str = ""
    model: str = "-"
    backend: str = ""
    slot: bool = False
    agents: Sequence[str] = ()
    resolved_s: float = 0.0
    first_byte_s: float = 0.0
    last_byte_s: float = 0.0
    ended_s: float = 0.0
    answered: int = 0
    status: int = 0
    error: str = ""
    count_usage: Callable[[], Json | None] | None = None
    """Parses the counts from the last frames of a relayed answer; called only when `usage` is read, as parsing costs
    time."""
    counted: Json | None = None
    traceparent: str = ""
    """The client's header of that name (W3C Trace Context)."""
    exchange: Exchange | None = None
    """What is in the log of it with `log_content`."""
    side_tokens: int = 0
    """Tokens that models have generated for its agents."""
    cancelled: bool = False
    """Whether it was cancelled by `DELETE /running/{id}`."""
    steps: list[Step] | None = None
    """What it waited for; None if it did not wait. Written by `note`."""
    pending: Callable[[Journal], None] | None = None
    """As of `backends.journal.Journal`."""

    def note(self, kind: StepKind, began_s: float, ended_s: float, **detail: Any) -> None:
        """Add one step, as `backends.journal.Journal`."""
        if self.steps is None:
            self.steps = []
        self.steps.append(Step(kind, began_s, ended_s, detail))

    def spent_s(self, kind: StepKind) -> float:
        """Seconds in all steps of one kind."""
        return sum(step.ended_s - step.began_s for step in self.steps or () if step.kind is kind)

    def cancellation(self, exc: asyncio.CancelledError) -> Cancelled:
        """The error for the client in place of `exc`, the cancellation of the task that processes its request.

        Raises: `exc` unless that is due to `DELETE /running/{id}`: the client has left, or the proxy is stopping.
        """
        if not self.cancelled:
            raise exc
        if (task := asyncio.current_task()) is not None:
            task.uncancel()
        self.error = Cancelled.code
        return Cancelled()

    def routed(self, model: str, backend: str) -> None:
        """Record that the model was found, or that another one was chosen."""
        self.model, self.backend, self.resolved_s = model, backend, time.monotonic()

    @property
    def usage(self) -> Json | None:
        """The token counts of the model's server, in OpenAI's shape; None if it sent none that can be read."""
        count = self.count_usage  # several threads may read this
        if self.counted is None and count is not None:
            try:
                self.counted = count()
            except Exception as exc:  # the server's answer may have any form
                logger.debug("the counts of %s", self.request_id, exc_info=exc)
            self.count_usage = None
        return self.counted

    @property
    def cached_tokens(self) -> Any:
        """How many tokens of the prompt the server had cached, as it sent it; None if it sent nothing of the kind."""
        details = (self.usage or {}).get("prompt_tokens_details")
        return details.get("cached_tokens") if isinstance(details, dict) else None


Observer = Callable[[RequestRecord], None]
"""Called when a request has ended; must not block; exceptions it raises are logged."""
