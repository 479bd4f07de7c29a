"""The last requests, for the question why one of them took so long."""

from __future__ import annotations

from collections import deque

from llama_smart_proxy.proxy.chat import RequestRecord

KEPT = 1000
"""How many requests are kept."""


class Recent:
    """The records of the last `KEPT` requests that were for a model, or failed. Clients choose ids, so several may have
    the same one: the newest counts."""

    def __init__(self) -> None:
        self._records: deque[RequestRecord] = deque(maxlen=KEPT)

    def observe(self, record: RequestRecord) -> None:
        """Keep a request that has ended."""
        if record.resolved_s or record.status >= 400:
            _ = record.usage  # which gives up the end of the answer, and of a short one all of it
            self._records.append(record)

    def find(self, request_id: str) -> RequestRecord | None:
        """The newest request with this id; None if there is none, or not any more."""
        return next((record for record in reversed(self._records) if record.request_id == request_id), None)
