"""Notices a server that lives and generates nothing: it is stopped, wedged, or answers no more.

One periodic look at what is counted anyway costs nothing for each token. Only after a silence does the watch look
closer: at what the system has counted of the process, what its server reports, and whether that generates a token.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial

from llama_smart_proxy.backends.http.connection import ConnectionPool
from llama_smart_proxy.backends.pool.family import Vitals
from llama_smart_proxy.backends.pool.launcher import Launcher, Report
from llama_smart_proxy.backends.threads import log_failure, run_in_thread
from llama_smart_proxy.proxy.errors import ProxyError

logger = logging.getLogger(__name__)

LOOKS = 8
"""How often the watch looks within the limit."""
REPORT_S, LEAST_REPORT_S = 2.0, 0.5
"""Longest wait in seconds for a report, and for the system's counts: a quarter of the limit within these bounds. A
server that is busy may take longer."""
PROBE_S = 10.0
"""Longest wait in seconds for the token of a probe."""
IDLE_CPU_S = 0.02
IDLE_CPU_SHARE = 0.001
"""Processor time up to `IDLE_CPU_S` and this share of the time is that of a server that does nothing: its threads wake
up to look for clients that have left, and the report costs something, too."""


class Verdict(Enum):
    """What is known of a server from which nothing has come."""

    ALIVE = "alive"
    """It works, or it cannot be known that it does not."""
    PROBE = "probe"
    """It may just have nothing to do."""
    STALLED = "stalled"


@dataclass(frozen=True, slots=True)
class Facts:
    """What was measured of a silent server over `window_s` seconds. None is unknown.

    `advanced`: a part of a generated answer has arrived. `cpu_s`: processor time it has used; `faults`: page faults
    that read a disk; `states`: its processes' states. `reported`: whether the work that it reports has changed, None
    without a report. `free`: whether it reports a free slot. `probed`: whether it has generated a token for a probe.
    """

    window_s: float
    advanced: bool = False
    cpu_s: float | None = None
    faults: int = 0
    states: str = ""
    reported: bool | None = None
    free: bool = False
    probed: bool | None = None

    def __str__(self) -> str:
        cpu = "unknown" if self.cpu_s is None else f"{self.cpu_s:.2f} s in state {self.states}"
        report = {None: "none", True: "work done", False: "no work done"}[self.reported]
        probe = {None: "not sent", True: "answered", False: "not answered"}[self.probed]
        return f"in {self.window_s:.1f} s: CPU time {cpu}, report: {report}, probe: {probe}"


def judge(facts: Facts) -> Verdict:
    """Whether a server works, decided by everything that is known of it. In doubt it does."""
    idle_s = IDLE_CPU_S + IDLE_CPU_SHARE * facts.window_s
    if facts.advanced or facts.reported or facts.probed or facts.faults or (facts.cpu_s or 0.0) > idle_s:
        return Verdict.ALIVE
    if facts.cpu_s is None and facts.reported is None:
        return Verdict.ALIVE
    return Verdict.PROBE if facts.free and facts.probed is None else Verdict.STALLED


@dataclass(frozen=True, slots=True)
class Sight:
    """What one closer look has seen, `silent_s` seconds into the silence."""

    silent_s: float
    advanced_at: float
    vitals: Vitals | None
    report: Report | None


class Watch:
    """Watches one server from when it is ready. `on_stall` is called with the reason, once, when it has generated
    nothing for `limit_s` seconds (0: never) while requests waited, and by all signs will not. `suspicion` is that
    reason, from the moment it becomes likely.

    The silence is counted in looks: time in which the proxy did not run, as while its machine sleeps, is no part of it.
    """

    def __init__(
        self,
        name: str,
        limit_s: float,
        launcher: Launcher,
        connections: ConnectionPool,
        vitals: Callable[[], Vitals | None],
        on_stall: Callable[[str], None],
    ) -> None:
        self.suspicion: str | None = None
        self._name = name
        self._limit_s = limit_s
        self._launcher = launcher
        self._connections = connections
        self._vitals = vitals
        self._on_stall = on_stall
        self._silent_s = 0.0
        self._looked_at = 0.0
        self._advanced_at = 0.0
        self._first: Sight | None = None
        self._due_s = limit_s / 2
        self._looking: asyncio.Task[None] | None = None
        if limit_s > 0:
            connections.on_sweep = self._look

    async def close(self) -> None:
        """End a closer look that is under way."""
        self._connections.on_sweep = None
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait({self._looking})

    # -- the periodic look -----------------------------------------------------------------------------------------

    def _look(self, now: float) -> None:
        waiting = self._connections.waiting(self._looked_at)
        step_s = min(now - self._looked_at, 2 * look_s(self._limit_s))
        self._looked_at = now
        if self._connections.advanced_at > self._advanced_at:
            self._begin_anew(0.0, None)
        elif waiting:
            self._silent_s += step_s
            if self._silent_s >= self._due_s and (self._looking is None or self._looking.done()):
                loop = asyncio.get_running_loop()
                self._looking = loop.create_task(self._look_closer(waiting), name=f"closer look at {self._name}")
                self._looking.add_done_callback(partial(log_failure, logger))

    def _begin_anew(self, silent_s: float, first: Sight | None) -> None:
        """Count from `silent_s` on, and compare with `first` from then on."""
        self._advanced_at = self._connections.advanced_at
        self._silent_s, self._first, self.suspicion = silent_s, first, None
        self._due_s = first.silent_s + self._limit_s / 4 if first is not None else self._limit_s / 2

    # -- the closer look -------------------------------------------------------------------------------------------

    async def _look_closer(self, waiting: int) -> None:
        """In the middle of the limit take the measures that later ones are compared with; at its end, decide."""
        first, now = self._first, await self._see()
        if first is None:
            self._begin_anew(self._silent_s, now)
            return
        facts = _compare(first, now)
        over = now.silent_s >= self._limit_s
        if over and judge(facts) is Verdict.PROBE:
            probed = await self._launcher.probe(self._connections, min(PROBE_S, self._limit_s))
            facts = replace(facts, probed=probed)
        if self._connections.advanced_at > first.advanced_at:
            return  # the next look has seen it, or will
        verdict = judge(facts)
        if verdict is Verdict.ALIVE:
            logger.debug("%s: silent for %.1f s, but alive: %s", self._name, now.silent_s, facts)
            seen = await self._see() if facts.probed else now  # the probe was work, too
            self._begin_anew(self._limit_s / 2, replace(seen, silent_s=self._limit_s / 2))
            return
        self._due_s = now.silent_s + self._limit_s / 4
        if verdict is Verdict.STALLED:
            some = "1 request waits" if waiting == 1 else f"{waiting} requests wait"
            self.suspicion = f"nothing generated for {now.silent_s:.1f} s while {some}; {facts}"
            if over:
                self._on_stall(self.suspicion)

    async def _see(self) -> Sight:
        silent_s, advanced_at = self._silent_s, self._connections.advanced_at
        limit_s = min(REPORT_S, max(LEAST_REPORT_S, self._limit_s / 4))
        report = await self._launcher.report(self._connections, limit_s)
        vitals = None
        try:
            async with asyncio.timeout(REPORT_S):
                vitals = await run_in_thread(self._vitals)
        except (TimeoutError, ProxyError) as exc:
            logger.warning("%s: its process cannot be looked at: %s", self._name, str(exc) or "no answer")
        return Sight(silent_s, advanced_at, vitals, report)


def look_s(limit_s: float) -> float:
    """Seconds between two looks at a server."""
    return min(1.0, limit_s / LOOKS) if limit_s > 0 else 1.0


def _compare(first: Sight, now: Sight) -> Facts:
    facts = Facts(
        window_s=now.silent_s - first.silent_s,
        advanced=now.advanced_at > first.advanced_at,
        reported=_changed(first.report, now.report),
        free=now.report is not None and now.report.free is True,
    )
    before, after = first.vitals, now.vitals
    if before is None or after is None:
        return facts
    cpu_s, faults = after.cpu_s - before.cpu_s, after.faults - before.faults
    return replace(facts, cpu_s=cpu_s, faults=faults, states=after.states)


def _changed(before: Report | None, after: Report | None) -> bool | None:
    """Whether the reported work has changed; None if there is no report. One that answers again has worked, too."""
    return None if after is None else before is None or before.work != after.work
