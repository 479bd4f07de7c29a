"""From the figures of all rounds to one figure a metric, ratios between targets, and goals met or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import median

from tests.bench.measure import Measured

Summary = dict[str, float | None]
"""Metric name to the median over the rounds; None where the target has no such figure."""


@dataclass(frozen=True)
class Metric:
    """One row of the table."""

    name: str
    title: str
    digits: int


METRICS = (
    Metric("cpu_us_per_token", "CPU per token, µs", 1),
    Metric("cpu_us_per_request", "CPU per plain request, µs", 1),
    Metric("requests_per_s", "plain requests/s", 0),
    Metric("request_core_share", "core in use meanwhile", 2),
    Metric("first_token_p50_ms", "first token p50, ms", 3),
    Metric("first_token_p99_ms", "first token p99, ms", 3),
    Metric("added_p50_ms", "added to first token p50, ms", 3),
    Metric("added_p99_ms", "added to first token p99, ms", 3),
    Metric("rss_idle_mib", "RSS idle, MiB", 1),
    Metric("rss_loaded_mib", "RSS after load, MiB", 1),
    Metric("start_s", "start to listening, s", 3),
)


@dataclass(frozen=True)
class Goal:
    """What the relay is to reach: `metric` at most `limit`, or at most `limit` times that of the target `times`."""

    metric: str
    limit: float
    times: str | None = None


GOALS = (
    Goal("cpu_us_per_token", 1.5, "nginx"),
    Goal("cpu_us_per_request", 6, "nginx"),
    Goal("added_p50_ms", 1),
    Goal("rss_idle_mib", 80),
    Goal("start_s", 1),
)


def summarise(measured: Mapping[str, Measured]) -> dict[str, Summary]:
    """Medians by target; times added to the first token are differences to `direct` within the same round."""
    direct = measured.get("direct")
    return {name: _summary(one, direct, has_process=name != "direct") for name, one in measured.items()}


def _summary(one: Measured, direct: Measured | None, *, has_process: bool) -> Summary:
    def middle(kind: str, key: str) -> float:
        return median(result[key] for result in one.rounds[kind])

    def added(key: str) -> float | None:
        if not direct or not has_process:
            return None
        pairs = zip(one.rounds["first"], direct.rounds["first"], strict=True)
        return median(through[key] - without[key] for through, without in pairs)

    own: Summary = {
        "cpu_us_per_token": middle("stream", "cpu_us_per_unit"),
        "cpu_us_per_request": middle("plain", "cpu_us_per_unit"),
        "request_core_share": middle("plain", "core_share"),
        "rss_idle_mib": one.rss_idle_mib,
        "rss_loaded_mib": one.rss_loaded_mib,
        "start_s": median(one.start_s),
    }
    return {
        **(own if has_process else dict.fromkeys(own)),
        "requests_per_s": middle("plain", "units_per_s"),
        "first_token_p50_ms": middle("first", "p50_ms"),
        "first_token_p99_ms": middle("first", "p99_ms"),
        "added_p50_ms": added("p50_ms"),
        "added_p99_ms": added("p99_ms"),
    }


def ratio(summaries: Mapping[str, Summary], metric: str, target: str, to: str) -> float | None:
    """`metric` of one target over that of another; None when either is missing or there is nothing to divide by."""
    above, below = (summaries.get(name, {}).get(metric) for name in (target, to))
    return above / below if above is not None and below else None


@dataclass(frozen=True)
class Verdict(Goal):
    """A goal with the relay's figure; `value` and `met` are None when it could not be measured."""

    value: float | None = None
    met: bool | None = None


def judge(summaries: Mapping[str, Summary]) -> list[Verdict]:
    """Every goal, held against the relay."""
    verdicts = []
    for goal in GOALS:
        if goal.times:
            value = ratio(summaries, goal.metric, "relay", goal.times)
        else:
            value = summaries.get("relay", {}).get(goal.metric)
        verdicts.append(Verdict(**asdict(goal), value=value, met=None if value is None else value <= goal.limit))
    return verdicts
