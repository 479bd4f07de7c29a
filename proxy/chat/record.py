"""What is known of one request, filled in on its way."""

from __future__ import annotations

from dataclasses import dataclass, field

from llama_smart_proxy.proxy.chat.extensions import Json


@dataclass(slots=True)
class Timing:
    """When a request arrived and when it was sent to the model's server, in seconds of `time.monotonic()`.

    `extra` is what else an API that tells such things has in its last frame.
    """

    arrived_s: float
    sent_s: float = 0.0
    extra: Json = field(default_factory=dict)
