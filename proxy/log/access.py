"""The access log: one line for each request that has ended."""

from __future__ import annotations

import time
from collections.abc import Sequence

from llama_smart_proxy.backends.journal import StepKind
from llama_smart_proxy.proxy.chat import RequestRecord
from llama_smart_proxy.proxy.log.formats import Form, Logfmt
from llama_smart_proxy.proxy.log.redaction import redacted
from llama_smart_proxy.proxy.log.streams import shown
from llama_smart_proxy.proxy.log.writer import Writer

OK = "ok"
LEFT = "client_left"
"""The outcome of a request whose client did not wait for the end of its answer."""
MOST_KEPT = 1024
"""Most beginnings of lines that are kept; the same ones come again and again."""
_LONGEST_KEPT = 200
_NAMES = ("method", "path", "status", "model", "backend", "dialect", "key", "agents")


class AccessLog:
    """One line for each request that was answered, at level info; nothing while `enabled` is False."""

    def __init__(self) -> None:
        self.enabled = False
        self.with_content = False
        """Whether prompts and answers are in the log."""
        self._writer: Writer | None = None
        self._form: Form = Logfmt()
        self._kept: dict[tuple[object, ...], str] = {}

    def connect(self, writer: Writer | None, form: Form) -> None:
        """Write there from now on, in this form, or nowhere."""
        self._writer = writer
        self._form = form
        self._kept.clear()
        self.enabled = writer is not None

    def line(self, record: RequestRecord) -> None:
        """The line of a request that has ended: an observer of requests."""
        if self._writer is None:
            return
        named = (
            record.method, record.path, record.status, record.model,
            record.backend, record.api, record.client, *record.agents,
        )  # fmt: skip
        begins = self._kept.get(named) or self._beginning(named)
        self._writer.hold(self._form.access(time.time(), begins, _numbers(record), outcome(record), record.request_id))

    def _beginning(self, named: tuple[object, ...]) -> str:
        """The part of the line that says what was asked, and of whom."""
        last = len(_NAMES) - 1
        texts = [*named[:last], ",".join(map(str, named[last:]))]
        fields = [
            (name, value if isinstance(value, int) else shown(redacted(str(value))))
            for name, value in zip(_NAMES, texts, strict=True)
            if value not in ("", "-")
        ]
        begins = self._form.fields(fields)
        if len(begins) <= _LONGEST_KEPT:
            if len(self._kept) >= MOST_KEPT:
                self._kept.clear()
            self._kept[named] = begins
        return begins


def _numbers(record: RequestRecord) -> Sequence[tuple[str, int]]:
    """Times in milliseconds, and tokens; what does not apply is left out."""
    arrived_s = record.arrived_s
    numbers = []
    if record.steps is not None:
        numbers += [(f"{kind}_ms", int(spent_s * 1000)) for kind in _WAITS if (spent_s := record.spent_s(kind))]
    if record.first_byte_s:
        numbers.append(("ttft_ms", int((record.first_byte_s - arrived_s) * 1000)))
    numbers.append(("total_ms", int((record.ended_s - arrived_s) * 1000)))
    if (usage := record.usage) is not None:
        numbers += [(name, count) for name, key in _COUNTS if isinstance(count := usage.get(key), int)]
    return numbers


_WAITS = (StepKind.QUEUE, StepKind.LOAD)
_COUNTS = (("tokens_in", "prompt_tokens"), ("tokens_out", "completion_tokens"))


def outcome(record: RequestRecord) -> str:
    """`ok`, `client_left`, or the code of the error that the client got: `upstream_error` for one that was passed on as
    it was, `error` for one without a code."""
    if record.status == 499:
        return LEFT
    if not record.error:
        return OK if record.status < 400 else "upstream_error" if record.sent_s else "error"
    return record.error if record.error.isidentifier() and record.error.isascii() else "error"  # an agent may raise any
