"""The counts in Prometheus' format, which is made when it is asked for.

Names and labels are documented in docs/observability.md. Imported with the first request for them, as its library takes
30 ms to load and 1.5 MiB.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from llama_smart_proxy.proxy import __version__
from llama_smart_proxy.proxy.metrics.counts import Metrics
from llama_smart_proxy.proxy.metrics.histogram import Histogram

PREFIX = "llama_smart_proxy"
STATES = ("loading", "loaded", "unloading", "unloaded")


@dataclass(frozen=True, slots=True)
class AgentCounts:
    """Of one agent: the requests that it took part in, those it failed in, and the seconds that its code took."""

    name: str
    calls: int
    failures: int
    spent_s: float


@dataclass(frozen=True, slots=True)
class Now:
    """What is not counted, but is so at the moment. `instances` are those of `ProviderStatus`."""

    instances: Iterable[Mapping[str, Any]] = ()
    agents: Iterable[AgentCounts] = ()
    requests: int = 0
    dropped: int = 0


def collected(metrics: Metrics, now: Now) -> list[Metric]:
    """All families, also those without a sample, as they are at this moment."""
    build = GaugeMetricFamily(f"{PREFIX}_build_info", "The version that runs; always 1.", labels=["version"])
    build.add_metric([__version__], 1)
    lag = HistogramMetricFamily(
        f"{PREFIX}_event_loop_lag_seconds", "How late a timer of the event loop came, looked at once a second."
    )
    _add(lag, [], metrics.lag.seconds)
    return [
        build,
        *_of_requests(metrics, now),
        *_times(metrics),
        *_tokens(metrics),
        *_of_instances(now),
        *_of_starts(metrics),
        *_of_agents(now),
        lag,
    ]


def encoded(families: list[Metric], accept: str) -> tuple[bytes, str]:
    """The families, and those of the process, in the format that `accept`, a header, asks for, and its content type. It
    takes most of the time of a scrape, and may be done in a thread."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected(families))
    ProcessCollector(registry=registry)
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


class _Collected(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        """As they are."""
        return self._families


def _of_requests(metrics: Metrics, now: Now) -> Iterator[Metric]:
    labels = ["model", "dialect", "status", "key"]
    requests = CounterMetricFamily(
        f"{PREFIX}_requests", "Requests that have ended; 499: the client left.", None, labels
    )
    for (model, api, status, key), count in metrics.requests.items():
        requests.add_metric([model, api, str(status), key], count)
    yield requests
    errors = CounterMetricFamily(f"{PREFIX}_errors", "Errors that clients got, also within a stream.", None, ["code"])
    for code, count in metrics.errors.items():
        errors.add_metric([code], count)
    yield errors
    yield GaugeMetricFamily(f"{PREFIX}_requests_in_progress", "Requests whose answer has not ended.", now.requests)
    yield CounterMetricFamily(f"{PREFIX}_history_dropped", "Requests that the store could not keep.", now.dropped)


def _times(metrics: Metrics) -> Iterator[Metric]:
    for name, text in _TIMES.items():
        family = HistogramMetricFamily(f"{PREFIX}_{name}_seconds", text, labels=["model"])
        for model, counts in metrics.models.items():
            waits = name in ("queue", "load")
            _add(family, [model], getattr(counts, name), counts.immediate if waits else 0)
        yield family


_TIMES = {
    "queue": "Time that a request waited for a place or a slot.",
    "load": "Time that a request waited for its model to be fetched and loaded.",
    "prefill": "From sending a request to its server to the first byte of the answer.",
    "first_token": "From the arrival of a request to the first byte of its answer.",
    "request": "From the arrival of a request to the end of its answer.",
}


def _tokens(metrics: Metrics) -> Iterator[Metric]:
    labels = ["model", "key"]
    prompt = CounterMetricFamily(f"{PREFIX}_prompt_tokens", "Tokens of prompts, cached ones too.", None, labels)
    answer = CounterMetricFamily(f"{PREFIX}_completion_tokens", "Tokens of answers.", None, labels)
    for label_values, (prompt_tokens, answer_tokens) in metrics.tokens.items():
        prompt.add_metric(label_values, prompt_tokens)
        answer.add_metric(label_values, answer_tokens)
    yield prompt
    yield answer
    looked_up = CounterMetricFamily(
        f"{PREFIX}_kv_cache_looked_up_tokens", "Tokens of prompts whose server reports cached ones.", None, ["model"]
    )
    hits = CounterMetricFamily(f"{PREFIX}_kv_cache_hit_tokens", "Of these, tokens out of the cache.", None, ["model"])
    rate = HistogramMetricFamily(
        f"{PREFIX}_decode_tokens_per_second", "Tokens per second of one streamed answer.", labels=["model"]
    )
    for model, counts in metrics.models.items():
        looked_up.add_metric([model], counts.prompt)
        hits.add_metric([model], counts.cached)
        _add(rate, [model], counts.rate)
    yield looked_up
    yield hits
    yield rate


def _of_instances(now: Now) -> Iterator[Metric]:
    state = GaugeMetricFamily(f"{PREFIX}_model_state", "1 for the state of a model.", labels=["model", "state"])
    queue = GaugeMetricFamily(f"{PREFIX}_queue_depth", "Requests that wait for a model.", labels=["model"])
    active = GaugeMetricFamily(f"{PREFIX}_instance_requests", "Requests that a process answers.", labels=["model"])
    memory = GaugeMetricFamily(f"{PREFIX}_instance_resident_memory_bytes", "Memory of a process.", labels=["model"])
    for entry in now.instances:
        model = [str(entry["model"])]
        for name in STATES:
            state.add_metric([*model, name], float(_STATES.get(str(entry["state"]), "unloaded") == name))
        queue.add_metric(model, float(entry.get("queue") or 0))
        if entry.get("pid"):
            active.add_metric(model, float(entry.get("leases") or 0))
        if (rss := entry.get("rss_bytes")) is not None:
            memory.add_metric(model, float(rss))
    yield from (state, queue, active, memory)


def _of_starts(metrics: Metrics) -> Iterator[Metric]:
    totals = metrics.totals()
    for name, text in _TOTALS.items():
        family = CounterMetricFamily(f"{PREFIX}_model_{name}", text, None, ["model"])
        for entry in totals:
            family.add_metric([str(entry["model"])], float(str(entry[name])))
        yield family


_STATES = {"starting": "loading", "downloading": "loading", "ready": "loaded", "unloading": "unloading"}
_TOTALS = {
    "starts": "Processes that were started.",
    "restarts": "Starts after a crash.",
    "evictions": "Processes that were stopped to make room for another model.",
}


def _of_agents(now: Now) -> Iterator[Metric]:
    calls = CounterMetricFamily(f"{PREFIX}_agent_calls", "Requests that an agent took part in.", None, ["agent"])
    failures = CounterMetricFamily(f"{PREFIX}_agent_failures", "Requests that it failed in.", None, ["agent"])
    seconds = CounterMetricFamily(f"{PREFIX}_agent_seconds", "Time that its own code took.", None, ["agent"])
    for agent in now.agents:
        calls.add_metric([agent.name], agent.calls)
        failures.add_metric([agent.name], agent.failures)
        seconds.add_metric([agent.name], agent.spent_s)
    yield from (calls, failures, seconds)


def _add(family: HistogramMetricFamily, labels: list[str], values: Histogram, zeros: int = 0) -> None:
    """Add the buckets of `values` and of `zeros` further values of 0."""
    buckets, sum_so_far = [], zeros
    for bound, count in zip((*map(str, values.bounds), "+Inf"), values.counts, strict=True):
        sum_so_far += count
        buckets.append((bound, sum_so_far))
    family.add_metric(labels, buckets, values.total)
