"""Fixtures that several test files share, and the proxy's log in the report of a failed test."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers

from tests.support import harness
from tests.support.e2e_support import matrix
from tests.support.gguf_fixture import tiny_models
from tests.support.harness import Proxy, free_port, session_proxy
from tests.support.knowledge import known, known_folder
from tests.support.stages import chain, recorded, scripted, served, stage
from tests.support.toxic import RawUpstream, raw_upstream

__all__ = ["chain", "known", "known_folder", "recorded", "scripted", "served", "stage", "tiny_models"]  # fixtures
LOG_TAIL = 8000
"""Characters of a proxy's log shown for a failed test."""
# How long an example takes says nothing on a busy machine. But for `search`, everyone gets the same examples.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True, database=None)
for profile in ("quick", "full"):
    settings.register_profile(profile, patient, derandomize=True)
settings.register_profile("search", patient)


def pytest_configure(config: pytest.Config) -> None:
    # what a shell lets its background jobs ignore would be ignored by the programs that tests start, too
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    profile = config.getoption("--hypothesis-profile") or "quick"
    settings.load_profile(profile)
    if profile != "search":  # which modules a worker has imported, and so their constants, is left to chance
        providers._get_local_constants = lambda: providers._local_constants


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        for proxy in harness.proxies:
            report.sections.append((f"log of proxy {proxy.pid}", proxy.log[-LOG_TAIL:]))
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    harness.proxies[:] = [proxy for proxy in harness.proxies if proxy.alive]


def pytest_sessionfinish(session: pytest.Session) -> None:
    output: dict[str, object] | None = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["matrix"] = list(matrix.items())


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """One of the workers (pytest-xdist) is done."""
    for key, cells in getattr(node, "workeroutput", {}).get("matrix", ()):
        matrix.setdefault(key, {}).update(cells)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not matrix:
        return
    columns = list(dict.fromkeys(column for cells in matrix.values() for column in cells))
    rows = [["API", "backend", "answer", *columns]]
    rows += [[*key, *(cells.get(column, "-") for column in columns)] for key, cells in sorted(matrix.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    terminalreporter.section("what clients get, by API and backend")
    for row in rows:
        terminalreporter.line("  ".join(map(str.ljust, row, widths)).rstrip())


@dataclass(frozen=True)
class Shared:
    """A proxy that many tests use, and the port where its one remote, with the one model `m`, is expected."""

    proxy: Proxy
    upstream_port: int


@pytest.fixture(autouse=True)
def _earlier_programs() -> None:
    """Set up behind the fixtures of the module, and before all others of the test."""
    harness.earlier.clear()
    harness.earlier.update(harness.direct_children())


@pytest.fixture(scope="session")
def shared() -> Iterator[Shared]:
    port = free_port()
    remote = {"url": f"http://127.0.0.1:{port}", "models": ["m"], "first_byte_timeout_s": 300, "idle_timeout_s": 300}
    remote["responses"] = True
    with session_proxy({"remotes": {"upstream": remote}, "server": {"head_timeout_s": 300}}) as proxy:
        yield Shared(proxy, port)


@pytest.fixture
def proxy(shared: Shared) -> Proxy:
    """The shared proxy; model `m` is at `upstream`."""
    return shared.proxy


@pytest.fixture
async def upstream(shared: Shared) -> AsyncIterator[RawUpstream]:
    """The server behind model `m` of `proxy`. Set its `script`."""
    async with raw_upstream(port=shared.upstream_port) as upstream:
        yield upstream
