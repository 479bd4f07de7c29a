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

from tests.bench import agents, beside, process, wire
from tests.bench.job import Job
from tests.bench.targets import Target

LOAD_START_S = 20.0
SETTLE_S = 0.5
MANY_TOKENS = 50_000
"""A stream that lasts longer than any upload: whoever asks for it leaves."""


@dataclass(frozen=True)
class Sizes:
    """How much of everything; `tokens` at one each `interval_ms` bounds the time of a streaming round. Streams between
    two APIs are shorter, `crossed_tokens`, as every round has several of them. Uploads, which take long, have rounds of
    their own behind the others."""

    rounds: int = 13
    streams: int = 64
    tokens: int = 200
    crossed_tokens: int = 80
    interval_ms: float = 10
    connections: int = 32
    requests: int = 6000
    firsts: int = 300
    starts: int = 5
    open_streams: int = 5000
    upload_rounds: int = 3
    uploads: int = 100
    upload_bytes: int = 1_000_000


QUICK = Sizes(
    rounds=1, streams=8, tokens=20, crossed_tokens=20, connections=4, requests=100, firsts=10, starts=1,
    open_streams=50, upload_rounds=1, uploads=4, upload_bytes=100_000,
)  # fmt: skip
"""Enough to see that everything works; its figures mean nothing."""


@dataclass
class Measured:
    """All figures of one target. `rounds` holds, for each kind of load, the result of every round in order."""

    start_s: list[float] = field(default_factory=list)
    rss_idle_mib: float = 0.0
    rss_loaded_mib: float = 0.0
    kib_per_stream: list[float] = field(default_factory=list)
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
        weigh(able(targets, OPEN), sizes, stub_port, cores, measured)
        start(targets, sizes.starts, stub_port, cores, measured)
        for kind in KINDS:
            for target in able(targets, kind):
                drive(target, kind, QUICK, cores)
        loaded = [kind for kind in KINDS if kind not in BESIDE]
        for number in range(sizes.rounds):
            say(f"round {number + 1} of {sizes.rounds}")
            one_round(loaded, turned(targets, number), sizes, cores, measured)
        for target in targets:
            measured[target.name].rss_loaded_mib = process.rss_mib(target.pids)
        for number in range(sizes.upload_rounds):
            say(f"uploads, round {number + 1} of {sizes.upload_rounds}")
            one_round(list(BESIDE), turned(targets, number), sizes, cores, measured)
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


def turned(targets: Sequence[Target], number: int) -> list[Target]:
    """The order of the targets in a round: each goes first in its turn."""
    turn = number % len(targets)
    return [*targets[turn:], *targets[:turn]]


def weigh(
    targets: Sequence[Target], sizes: Sizes, stub_port: int, cores: process.Cores, measured: dict[str, Measured]
) -> None:
    """See what open streams take of the memory, in a process that has done nothing else."""
    for target in targets:
        target.start(stub_port, cores)
        measured[target.name].kib_per_stream.append(drive(target, OPEN, sizes, cores)["kib_per_stream"])
        target.stop()


def one_round(
    kinds: Sequence[str], targets: Sequence[Target], sizes: Sizes, cores: process.Cores, measured: dict[str, Measured]
) -> None:
    for kind in kinds:
        for target in able(targets, kind):
            result = drive(target, kind, sizes, cores)
            measured[target.name].rounds.setdefault(kind, []).append(result)


def able(targets: Sequence[Target], kind: str) -> list[Target]:
    """Those of `targets` that can take this kind of load."""
    return [target for target in targets if target.translates or kind not in PROXY_ONLY]


@dataclass(frozen=True)
class Load:
    """One kind of load: the `driver` of `tests.bench.load`, the part of its `Job` that the sizes decide (`count`,
    `each`, `interval_ms`), the API and the model it asks for, and the shape of what is uploaded."""

    driver: str
    amount: Callable[[Sizes], tuple[int, int, float]]
    api: str = "openai"
    model: str = wire.MODEL
    shape: str = ""


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
BESIDE = {
    f"beside_{shape}": Load("beside", lambda s: (s.uploads, MANY_TOKENS, s.interval_ms), shape=shape)
    for shape in beside.SHAPES
}
"""Streams beside uploads, named by what is in these."""
OPEN = "open"
"""Streams that stay open, at a token a minute. No kind of the rounds: what they take shows in a fresh process only."""
PROXY_ONLY = {OPEN, *CROSSINGS, *CHAINED}
KINDS = {
    "stream": Load("stream", lambda s: (s.streams, s.tokens, s.interval_ms)),
    **CHAINED,
    **CROSSINGS,  # next to the streams that they are compared with
    "plain": Load("plain", lambda s: (s.connections, s.requests, 0)),
    "first": Load("first", lambda s: (1, s.firsts, 1)),
    **BESIDE,
}
"""The loads of a round."""
_LOADS = {**KINDS, OPEN: Load("open", lambda s: (s.open_streams, 2, 60_000))}


def drive(target: Target, kind: str, sizes: Sizes, cores: process.Cores) -> dict[str, float]:
    """One run of the load generator against one target; what it printed.

    Raises: `wire.BrokenRun` with its reason when it failed.
    """
    load = _LOADS[kind]
    count, each, interval_ms = load.amount(sizes)
    timeout_s = 60.0 + 3 * sizes.tokens * sizes.interval_ms / 1000
    job = Job(
        port=target.port, api=load.api, model=load.model, pids=target.pids, timeout_s=timeout_s,
        count=count, each=each, interval_ms=interval_ms, shape=load.shape, size=sizes.upload_bytes,
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
