"""The access log: one line for each request that has ended."""

from __future__ import annotations

import time
from functools import lru_cache

from llama_smart_proxy.backends.journal import StepKind
from llama_smart_proxy.proxy.chat import RequestRecord
from llama_smart_proxy.proxy.log.formats import Fields, Form, Logfmt
from llama_smart_proxy.proxy.log.streams import shown
from llama_smart_proxy.proxy.log.writer import Writer

LEFT = "client_left"
"""The outcome of a request whose client did not wait for the end of its answer."""
_KEPT = 200
"""Longest path or name whose shown form is kept."""


class AccessLog:
    """One line for each request that was answered, at level info; nothing while `enabled` is False."""

    def __init__(self) -> None:
        self.enabled = False
        self._writer: Writer | None = None
        self._form: Form = Logfmt()

    def connect(self, writer: Writer | None, form: Form) -> None:
        """Write there from now on, in this form, or nowhere."""
        self._writer = writer
        self._form = form
        self.enabled = writer is not None

    def line(self, record: RequestRecord) -> None:
        """The line of a request that has ended: an observer of requests."""
        if self._writer is not None:
            self._writer.hold(self._form.access(time.time(), fields_of(record)))


def fields_of(record: RequestRecord) -> Fields:
    """What is known of a request; what does not apply is left out."""
    fields: list[tuple[str, str | int]] = [
        ("method", record.method),
        ("path", _shown(record.path)),
        ("status", record.status),
    ]
    if record.model != "-":
        fields.append(("model", _shown(record.model)))
    if record.backend:
        fields.append(("backend", record.backend))
    fields.append(("dialect", record.api))
    if record.client:
        fields.append(("key", record.client))
    if record.agents:
        fields.append(("agents", ",".join(record.agents)))
    if record.steps is not None:
        fields += [(f"{kind}_ms", _ms(spent_s)) for kind in _WAITS if (spent_s := record.spent_s(kind))]
    if record.first_byte_s:
        fields.append(("ttft_ms", _ms(record.first_byte_s - record.arrived_s)))
    fields.append(("total_ms", _ms(record.ended_s - record.arrived_s)))
    if (usage := record.usage) is not None:
        fields += [(name, count) for name, key in _COUNTS if isinstance(count := usage.get(key), int)]
    fields += [("outcome", outcome(record)), ("id", record.request_id)]
    return fields


_WAITS = (StepKind.QUEUE, StepKind.LOAD)
_COUNTS = (("tokens_in", "prompt_tokens"), ("tokens_out", "completion_tokens"))


def outcome(record: RequestRecord) -> str:
    """`ok`, the code of the error that the client got, `client_left`, or `error` for one without a code."""
    if record.status == 499:
        return LEFT
    return record.error or ("ok" if record.status < 400 else "error")


def _ms(seconds: float) -> int:
    return int(seconds * 1000)


def _shown(text: str) -> str:
    return _short(text) if len(text) <= _KEPT else shown(text)


@lru_cache(maxsize=1024)
def _short(text: str) -> str:
    return shown(text)
