"""The rounds: starts stub and targets, drives each in turn, and keeps every figure."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.bench import agents, process, wire
from tests.bench.job import Job
from tests.bench.targets import Target

LOAD_START_S = 20.0
SETTLE_S = 0.5


@dataclass(frozen=True)
class Sizes:
    """How much of everything; `tokens` at one each `interval_ms` bounds the time of a streaming round. Streams between
    two APIs are shorter, `crossed_tokens`, as every round has several of them."""

    rounds: int = 16
    streams: int = 64
    tokens: int = 200
    crossed_tokens: int = 80
    interval_ms: float = 10
    connections: int = 32
    requests: int = 6000
    firsts: int = 300
    starts: int = 5


QUICK = Sizes(rounds=1, streams=8, tokens=20, crossed_tokens=20, connections=4, requests=100, firsts=10, starts=1)
"""Enough to see that everything works; its figures mean nothing."""


@dataclass
class Measured:
    """All figures of one target. `rounds` holds, for each kind of load, the result of every round in order."""

    start_s: list[float] = field(default_factory=list)
    rss_idle_mib: float = 0.0
    rss_loaded_mib: float = 0.0
    rounds: dict[str, list[dict[str, float]]] = field(default_factory=dict)


Say = Callable[[str], None]


def measure(targets: Sequence[Target], sizes: Sizes, cores: process.Cores, say: Say) -> dict[str, Measured]:
    """Measure all targets, interleaved: every round drives each once with each kind of load, in rotating order.

    Raises: `wire.BrokenRun` when a figure would not be worth reporting. Ends every process it started in any case.
    """
    measured = {target.name: Measured() for target in targets}
    with ExitStack() as stack:
        stub_port = stack.enter_context(running_stub(cores))
        for target in targets:
            stack.callback(target.stop)
        say(f"starting {', '.join(measured)}")
        start(targets, sizes.starts, stub_port, cores, measured)
        for kind in KINDS:
            for target in able(targets, kind):
                drive(target, kind, QUICK, cores)
        for number in range(sizes.rounds):
            say(f"round {number + 1} of {sizes.rounds}")
            turn = number % len(targets)
            one_round([*targets[turn:], *targets[:turn]], sizes, cores, measured)
        for target in targets:
            measured[target.name].rss_loaded_mib = process.rss_mib(target.pids)
    return measured


@contextmanager
def running_stub(cores: process.Cores) -> Iterator[int]:
    """The stub's port, for as long as it runs."""
    with tempfile.TemporaryDirectory(prefix="bench-stub-") as directory:
        log = Path(directory) / "log"
        stub = process.spawn([sys.executable, "-m", "tests.bench.stub"], cores.load, log, piped=True)
        try:
            assert stub.stdout is not None
            line = stub.stdout.readline()
            if not line:
                raise wire.BrokenRun(f"the stub does not start; it said: {log.read_text()[-2000:]}")
            yield int(line)
        finally:
            process.stop(stub)


def start(
    targets: Sequence[Target], times: int, stub_port: int, cores: process.Cores, measured: dict[str, Measured]
) -> None:
    """Start every target `times` times, and leave the last one of each running."""
    for _ in range(times):
        for target in targets:
            target.stop()
            measured[target.name].start_s.append(target.start(stub_port, cores))
    time.sleep(SETTLE_S)
    for target in targets:
        measured[target.name].rss_idle_mib = process.rss_mib(target.pids)


def one_round(targets: Sequence[Target], sizes: Sizes, cores: process.Cores, measured: dict[str, Measured]) -> None:
    for kind in KINDS:
        for target in able(targets, kind):
            result = drive(target, kind, sizes, cores)
            measured[target.name].rounds.setdefault(kind, []).append(result)


def able(targets: Sequence[Target], kind: str) -> list[Target]:
    """Those of `targets` that can take this kind of load."""
    return [target for target in targets if target.translates or kind not in CROSSINGS | CHAINED]


@dataclass(frozen=True)
class Load:
    """One kind of load: the `driver` of `tests.bench.load`, the part of its `Job` that the sizes decide (`count`,
    `each`, `interval_ms`), and the API and the model it asks for."""

    driver: str
    amount: Callable[[Sizes], tuple[int, int, float]]
    api: str = "openai"
    model: str = wire.MODEL


def _crossed(client: str, model: str) -> Load:
    return Load("stream", lambda s: (s.streams, s.crossed_tokens, s.interval_ms), client, model)


CROSSINGS = {
    "ollama_to_openai": _crossed("ollama", wire.MODEL),
    "openai_to_ollama": _crossed("openai", wire.OLLAMA_MODEL),
    "anthropic_to_ollama": _crossed("anthropic", wire.OLLAMA_MODEL),
    "ollama_to_ollama": _crossed("ollama", wire.OLLAMA_MODEL),
}
"""Streams from clients of one API to a server of another, and between Ollama's own; named client to server."""
CHAINED = {model: _crossed("openai", model) for model in agents.CHAINS}
"""Streams through agents, named by the virtual model that has them."""
KINDS = {
    "stream": Load("stream", lambda s: (s.streams, s.tokens, s.interval_ms)),
    **CHAINED,
    **CROSSINGS,  # next to the streams that they are compared with
    "plain": Load("plain", lambda s: (s.connections, s.requests, 0)),
    "first": Load("first", lambda s: (1, s.firsts, 1)),
}


def drive(target: Target, kind: str, sizes: Sizes, cores: process.Cores) -> dict[str, float]:
    """One run of the load generator against one target; what it printed.

    Raises: `wire.BrokenRun` with its reason when it failed.
    """
    load = KINDS[kind]
    count, each, interval_ms = load.amount(sizes)
    timeout_s = 30.0 + 3 * sizes.tokens * sizes.interval_ms / 1000
    job = Job(
        port=target.port, api=load.api, model=load.model, pids=target.pids, timeout_s=timeout_s,
        count=count, each=each, interval_ms=interval_ms,
    )  # fmt: skip
    argv = [sys.executable, "-m", "tests.bench.load", load.driver, json.dumps(asdict(job))]
    with process.on_cores(cores.load):
        done = subprocess.run(
            argv, cwd=process.ROOT, env=process.environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=timeout_s + LOAD_START_S, start_new_session=True, check=False,
        )  # fmt: skip
    if done.returncode:
        target.check_alive()
        raise wire.BrokenRun(f"{target.name}, {kind}, {done.stderr[-2000:].strip()}; it said: {target.log()[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout)
    return result
