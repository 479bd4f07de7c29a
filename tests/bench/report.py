"""What the bench prints, and what it writes as JSON."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version

from tests.bench.measure import Measured, Sizes
from tests.bench.process import Cores
from tests.bench.summary import ALL, CHAINS, CROSSED, METRICS, TOKEN, Summary, Verdict
from tests.bench.targets import AGAINST

COMPARED_TO = ("nginx", AGAINST, "direct")


def document(measured: Mapping[str, Measured], sizes: Sizes, cores: Cores) -> dict[str, object]:
    """Every figure of every round, with what it takes to read them."""
    summary = Summary(measured)
    return {
        "versions": versions(),
        "cpu_count": os.cpu_count(),
        "pinned": str(cores),
        "sizes": asdict(sizes),
        "targets": {name: asdict(one) for name, one in measured.items()},
        "medians": summary.medians(),
        "ratios": {to: summary.ratios(to) for to in COMPARED_TO if to in measured},
        "goals": [asdict(verdict) for verdict in summary.verdicts()],
    }


def text(measured: Mapping[str, Measured], sizes: Sizes, cores: Cores) -> str:
    """Conditions, table and goals, as Markdown."""
    summary = Summary(measured)
    using = ", ".join(f"{name} {number}" for name, number in versions().items() if number)
    conditions = (
        f"{using}; {os.cpu_count()} cores; {cores}.\n"
        f"Medians over rounds: {sizes.rounds}; in each {sizes.streams} streams of {sizes.tokens} tokens, one every "
        f"{sizes.interval_ms:g} ms (through agents, and between two APIs: {sizes.crossed_tokens} tokens); "
        f"{sizes.requests} plain requests on {sizes.connections} connections; {sizes.firsts} streamed requests one by "
        f"one. Behind them {sizes.upload_rounds} rounds, for each shape of JSON, of streams beside {sizes.uploads} "
        f"uploads at once of {sizes.upload_bytes:,} bytes. Starts: {sizes.starts}; open streams: {sizes.open_streams}. "
        f"Ratios are medians of each round's. A proxy that does not use all of its core is not what bounds requests/s."
    )
    return "\n\n".join([conditions, table(summary), crossed(summary), goals(summary.verdicts())])


def table(summary: Summary) -> str:
    """A column for each target, then one for each ratio."""
    pairs = [(name, to) for to in COMPARED_TO if to in summary.targets for name in summary.ratios(to)]
    rows = [["", *summary.targets, *(f"{name} / {to}" for name, to in pairs)]]
    for metric in METRICS:
        figures = [_number(summary.value(metric.name, name), metric.digits) for name in summary.targets]
        ratios = [_number(summary.ratio(metric.name, *pair), 2) for pair in pairs]
        rows.append([metric.title, *figures, *ratios])
    return _markdown(rows)


def crossed(summary: Summary) -> str:
    """What the relay takes for a stream through agents, and for one between two APIs."""
    rows = [["streams through the relay", "µs", "/ OpenAI client and server", "/ nginx"]]
    other = AGAINST in summary.targets
    if other:
        rows[0] += [AGAINST, f"relay / {AGAINST}"]
    for metric in (*CHAINS, *CROSSED):
        ratios = [_number(summary.ratio(metric.name, "relay", to, TOKEN), 2) for to in ("relay", "nginx")]
        row = [metric.title, _number(summary.value(metric.name, "relay"), metric.digits), *ratios]
        if other:
            row.append(_number(summary.value(metric.name, AGAINST), metric.digits))
            row.append(_number(summary.ratio(metric.name, "relay", AGAINST), 2))
        rows.append(row)
    return _markdown(rows)


def goals(verdicts: Sequence[Verdict]) -> str:
    """What the relay is to reach, and whether it does."""
    titles = {metric.name: metric.title for metric in ALL}
    words = {True: "met", False: "not met", None: "not measured"}
    rows = [["goal of the relay", "at most", "measured", ""]]
    for verdict in verdicts:
        unit = f" x {verdict.times}" if verdict.times else ""
        rows.append([titles[verdict.metric], f"{verdict.limit:g}{unit}", _number(verdict.value, 2), words[verdict.met]])
    return _markdown(rows)


def versions() -> dict[str, str | None]:
    """Of everything whose speed shows in the figures; None for what is not installed."""
    packages = {name: version(name) for name in ("aiohttp", "uvloop", "httptools")}
    return {"python": platform.python_version(), "nginx": _nginx_version(), **packages}


def _nginx_version() -> str | None:
    if not shutil.which("nginx"):
        return None
    said = subprocess.run(["nginx", "-v"], capture_output=True, text=True, check=False).stderr
    return said.strip().rpartition("/")[2]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [_line([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    lines.insert(1, _line(["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
