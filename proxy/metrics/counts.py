"""What is counted of requests, in plain numbers: an observer must not cost what a client could notice.

The values of all labels are bounded: names of models that exist, APIs, statuses, names of keys, codes of errors. Others
are counted as `UNKNOWN`, and so is what would be one too many.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from llama_smart_proxy.backends.journal import StepKind
from llama_smart_proxy.proxy.chat import RequestRecord
from llama_smart_proxy.proxy.log.access import outcome
from llama_smart_proxy.proxy.metrics.histogram import SECONDS, Histogram
from llama_smart_proxy.proxy.metrics.lag import Lag

Totals = Sequence[Mapping[str, object]]
UNKNOWN = "-"
MOST_MODELS = 1000
"""Most models with counts of their own; a server of others may list any number."""
MOST_CODES = 200
"""Most codes of errors; an agent may raise any."""
MOST_SERIES = 20_000
"""Most combinations of model, API, status and key."""
RATES = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 50.0, 75.0, 100.0, 150.0, 200.0, 300.0, 500.0, 1000.0)
"""Upper bounds of the buckets for tokens per second of one answer."""


class ModelCounts:
    """What is counted by model. Requests that did not wait are in `immediate` alone, and not in `queue` and `load`."""

    __slots__ = ("cached", "first_token", "immediate", "load", "prefill", "prompt", "queue", "rate", "request")

    def __init__(self) -> None:
        self.queue, self.load = Histogram(SECONDS), Histogram(SECONDS)
        self.prefill, self.first_token, self.request = Histogram(SECONDS), Histogram(SECONDS), Histogram(SECONDS)
        self.rate = Histogram(RATES)
        self.prompt = self.cached = self.immediate = 0

    def add_waits(self, record: RequestRecord) -> None:
        """Count what a request has waited for."""
        self.queue.add(record.spent_s(StepKind.QUEUE))
        self.load.add(record.spent_s(StepKind.LOAD) + record.spent_s(StepKind.DOWNLOAD))


class Metrics:
    """Counts for as long as the process lives. `observe` is an observer of requests.

    `is_model` is whether a name is that of a model; it is asked for names that have not answered yet. `totals` returns
    what is counted elsewhere: `model`, `starts`, `restarts` (after a crash) and `evictions` of each model.
    """

    def __init__(self, is_model: Callable[[str], bool], totals: Callable[[], Totals] = list) -> None:
        self.requests: dict[tuple[str, str, int, str], int] = {}
        """By model, API, status and name of the key."""
        self.models: dict[str, ModelCounts] = {}
        self.tokens: dict[tuple[str, str], list[int]] = {}
        """Of the prompt, and of the answer, by model and name of the key."""
        self.errors: Counter[str] = Counter()
        """By code."""
        self.lag = Lag()
        self.totals = totals
        self._is_model = is_model

    def observe(self, record: RequestRecord) -> None:
        """Count a request that has ended."""
        counts = self.models.get(record.model) if record.resolved_s else None
        model = record.model if counts is not None else self._label(record)
        key = (model, record.api, record.status, record.client)
        requests = self.requests
        if key not in requests and len(requests) >= MOST_SERIES:
            key = (UNKNOWN, record.api, record.status, UNKNOWN)
        requests[key] = requests.get(key, 0) + 1
        if record.error or record.status >= 400:
            code = outcome(record)
            self.errors[code if code in self.errors or len(self.errors) < MOST_CODES else UNKNOWN] += 1
        if model is not UNKNOWN and record.slot:
            if record.sent_s:
                self._measure(record, self.models[model])
            elif record.steps is not None:  # it may have waited in vain
                self.models[model].add_waits(record)

    def _label(self, record: RequestRecord) -> str:
        """The model of a request, if it is one; it has counts from now on."""
        known = record.resolved_s and len(self.models) < MOST_MODELS
        if not known or not (record.status < 400 or self._is_model(record.model)):
            return UNKNOWN
        self.models[record.model] = ModelCounts()
        return record.model

    def _measure(self, record: RequestRecord, counts: ModelCounts) -> None:
        """Count the times and tokens of a request that was sent to a server."""
        arrived_s, sent_s, first_s = record.arrived_s, record.sent_s, record.first_byte_s
        if record.steps is None:
            counts.immediate += 1
        else:
            counts.add_waits(record)
        if first_s:
            counts.prefill.add(first_s - sent_s)
            counts.first_token.add(first_s - arrived_s)
        counts.request.add(record.ended_s - arrived_s)
        usage = record.usage
        if usage is None:
            return
        prompt, answer = usage.get("prompt_tokens"), usage.get("completion_tokens")
        tokens = self.tokens.get((record.model, record.client))
        if tokens is None:
            tokens = self.tokens[record.model, record.client] = [0, 0]
        if isinstance(prompt, int):
            tokens[0] += prompt
            cached = record.cached_tokens
            if isinstance(cached, int):  # unknown counts neither as a hit nor as none
                counts.prompt += prompt
                counts.cached += cached
        if isinstance(answer, int):
            tokens[1] += answer
            took_s = record.last_byte_s - first_s
            if answer > 1 and took_s > 0 and first_s:
                counts.rate.add((answer - 1) / took_s)
