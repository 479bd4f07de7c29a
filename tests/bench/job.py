"""What one measurement is asked to do, and the span of it that counts."""

from __future__ import annotations

import time
from dataclasses import dataclass

from tests.bench import apis, wire
from tests.bench.process import cpu_ns


@dataclass(frozen=True)
class Job:
    """One measurement: where to, how much, and whose CPU time counts.

    `api` is the API in which streams are asked for (`tests.bench.apis`), `model` a model of the stub's.
    `count` is the number of streams or connections at once; `each` the tokens of each stream, or for the other kinds
    the requests in all; `interval_ms` the time between two tokens of a stream. Uploads have a body of about `size`
    bytes, in one of the shapes of `tests.bench.beside`.
    """

    port: int
    api: str
    model: str
    pids: list[int]
    count: int
    each: int
    interval_ms: float
    timeout_s: float
    shape: str = ""
    size: int = 0

    def stream_request(self, tokens: int) -> bytes:
        return apis.stream_request(self.api, self.model, tokens, self.interval_ms)


class Window:
    """The measured span: CPU time of `pids`, and the units (tokens, requests) delivered in it."""

    def __init__(self, pids: list[int]) -> None:
        self._pids = pids
        self._began: tuple[int, float, int] | None = None
        self._ended: tuple[int, float, int] | None = None

    def _now(self, units: int) -> tuple[int, float, int]:
        return units, time.perf_counter(), cpu_ns(self._pids)

    def open(self, units: int) -> None:
        self._began = self._now(units)

    def close(self, units: int) -> None:
        """The first call counts, and only once the window is open."""
        if self._began and not self._ended:
            self._ended = self._now(units)

    def result(self) -> dict[str, float]:
        """Units, seconds, CPU microseconds per unit, units per second, and the share of one core that was used.

        Raises: `BrokenRun` when the window was never open, or nothing came through it.
        """
        if not self._began or not self._ended or self._ended[0] <= self._began[0]:
            raise wire.BrokenRun("no time at which all connections were busy: too few tokens or requests")
        units, seconds, cpu_ns = (after - before for after, before in zip(self._ended, self._began, strict=True))
        return {
            "units": units,
            "seconds": seconds,
            "cpu_us_per_unit": cpu_ns / 1000 / units,
            "units_per_s": units / seconds,
            "core_share": cpu_ns / 1e9 / seconds,
        }
