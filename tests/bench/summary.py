"""From the figures of all rounds to one figure a metric, ratios between targets, and goals met or not.

The machine's own speed drifts from round to round, and takes all targets with it: so ratios and differences are taken
within each round, and the median of those is what counts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from statistics import median

from tests.bench.measure import BESIDE, CROSSINGS, Measured
from tests.bench.targets import AGAINST

BASE = "direct"
"""The target without a process: it has no CPU time, and nothing is added to it."""

Series = Callable[[Measured], list[float]]


def _rounds(kind: str, key: str) -> Series:
    return lambda one: [result[key] for result in one.rounds.get(kind, [])]


def _worst(kinds: Collection[str], key: str) -> Series:
    """The largest figure of each round that has such loads."""
    return lambda one: [
        max(result[key] for result in results)
        for results in zip(*(one.rounds.get(kind, []) for kind in kinds), strict=True)
    ]


@dataclass(frozen=True)
class Metric:
    """One row of the table. `series` finds its figure of every round; `of_base` says whether the base has it too."""

    name: str
    title: str
    digits: int
    series: Series
    of_base: bool = False
    minus_base: bool = False


METRICS = (
    Metric("cpu_us_per_token", "CPU per token, µs", 1, _rounds("stream", "cpu_us_per_unit")),
    Metric("cpu_us_per_request", "CPU per plain request, µs", 1, _rounds("plain", "cpu_us_per_unit")),
    Metric("requests_per_s", "plain requests/s", 0, _rounds("plain", "units_per_s"), of_base=True),
    Metric("request_core_share", "core in use meanwhile", 2, _rounds("plain", "core_share")),
    Metric("first_token_p50_ms", "first token p50, ms", 3, _rounds("first", "p50_ms"), of_base=True),
    Metric("first_token_p99_ms", "first token p99, ms", 3, _rounds("first", "p99_ms"), of_base=True),
    Metric("added_p50_ms", "added to first token p50, ms", 3, _rounds("first", "p50_ms"), minus_base=True),
    Metric("added_p99_ms", "added to first token p99, ms", 3, _rounds("first", "p99_ms"), minus_base=True),
    Metric("worst_delay_ms", "worst delay beside uploads, ms", 0, _worst(BESIDE, "worst_delay_ms"), of_base=True),
    Metric("rss_idle_mib", "RSS idle, MiB", 1, lambda one: [one.rss_idle_mib]),
    Metric("rss_loaded_mib", "RSS after load, MiB", 1, lambda one: [one.rss_loaded_mib]),
    Metric("kib_per_stream", "RSS per open stream, KiB", 1, lambda one: one.kib_per_stream),
    Metric("start_s", "start to listening, s", 3, lambda one: one.start_s),
)


def _crossing(name: str) -> Metric:
    client, server = (_API_NAMES[api] for api in name.split("_to_"))
    return Metric(
        f"cpu_us_per_token_{name}",
        f"CPU per token, µs: {client} client, {server} server",
        1,
        _rounds(name, "cpu_us_per_unit"),
    )


_API_NAMES = {"openai": "OpenAI", "ollama": "Ollama", "anthropic": "Anthropic"}
CROSSED = tuple(map(_crossing, CROSSINGS))
"""The CPU time per token of streams between two APIs, in microseconds: only the relay has it."""
CHAINS = tuple(
    Metric(f"cpu_us_per_token_{name}", f"CPU per token, µs: {title}", 1, _rounds(name, "cpu_us_per_unit"))
    for name, title in (
        ("m-1-agent", "through 1 agent that passes it on"),
        ("m-3-agents", "through 3 agents that pass it on"),
        ("m-rewritten", "through 1 agent that changes it"),
    )
)
"""The same of streams through agents: only the relay has any."""
TOKEN = METRICS[0].name
"""What `CROSSED` and `CHAINS` are compared with."""
ALL = METRICS + CHAINS + CROSSED


@dataclass(frozen=True)
class Goal:
    """What the relay is to reach: `metric` at most `limit`, or at most `limit` times that of the target `times`; there
    it is the metric `of` if that is given."""

    metric: str
    limit: float
    times: str | None = None
    of: str | None = None


GOALS = (
    Goal("cpu_us_per_token", 1.4, "nginx"),
    Goal("cpu_us_per_request", 5.5, "nginx"),
    Goal(CHAINS[0].name, 2.7, "nginx", TOKEN),
    Goal(CHAINS[1].name, 3.1, "nginx", TOKEN),
    *(Goal(metric.name, 2.1, "relay", TOKEN) for metric in CROSSED),
    Goal("added_p50_ms", 1),
    Goal("worst_delay_ms", 250),
    Goal("rss_idle_mib", 58),
    Goal("kib_per_stream", 25),
    Goal("start_s", 1),
)


@dataclass(frozen=True)
class Verdict(Goal):
    """A goal with the relay's figure; `value` and `met` are None when it could not be measured."""

    value: float | None = None
    met: bool | None = None


class Summary:
    """The figures of all targets, by metric and target; None where there is none."""

    def __init__(self, measured: Mapping[str, Measured]) -> None:
        self.targets = list(measured)
        self._series = {(metric.name, name): _of(metric, name, measured) for metric in ALL for name in measured}

    def value(self, metric: str, target: str) -> float | None:
        """The median."""
        series = self._series.get((metric, target))
        return median(series) if series else None

    def ratio(self, metric: str, target: str, to: str, of: str | None = None) -> float | None:
        """The median of what `target` has for each of what `to` has in the same round; of the metric `of`, if given."""
        above, below = self._series.get((metric, target)), self._series.get((of or metric, to))
        if not above or not below or 0 in below:
            return None
        return median(one / other for one, other in zip(above, below, strict=True))

    def medians(self) -> dict[str, dict[str, float | None]]:
        return {name: {metric.name: self.value(metric.name, name) for metric in ALL} for name in self.targets}

    def ratios(self, to: str) -> dict[str, dict[str, float | None]]:
        """Of each target to `to`. Another checkout is compared with by this one's proxy alone."""
        others = [name for name in self.targets if name not in (to, BASE)] if to != AGAINST else ["relay"]
        return {name: {metric.name: self.ratio(metric.name, name, to) for metric in ALL} for name in others}

    def verdicts(self) -> list[Verdict]:
        """Every goal, held against the relay."""
        judged = []
        for goal in GOALS:
            value = self.value(goal.metric, "relay")
            if goal.times:
                value = self.ratio(goal.metric, "relay", goal.times, goal.of)
            judged.append(Verdict(**asdict(goal), value=value, met=None if value is None else value <= goal.limit))
        return judged


def _of(metric: Metric, name: str, measured: Mapping[str, Measured]) -> list[float]:
    if name == BASE and not metric.of_base:
        return []
    series = metric.series(measured[name])
    if not metric.minus_base:
        return series
    return [own - base for own, base in zip(series, metric.series(measured[BASE]), strict=True)]
