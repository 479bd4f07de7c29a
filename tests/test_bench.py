"""The bench works: one tiny run of everything it measures. No figure is judged here."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.bench import wire
from tests.bench.measure import KINDS, QUICK
from tests.bench.process import ROOT, environment, tree
from tests.bench.summary import GOALS, METRICS

TIMEOUT_S = 120


def bench(*options: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "tests.bench", *options]
    return subprocess.run(
        argv, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def test_quick_run_prints_the_table_and_writes_every_figure(tmp_path: Path) -> None:
    file = tmp_path / "new" / "bench.json"
    done = bench("--quick", "--json", str(file))
    assert done.returncode == 0, done.stderr
    for metric in METRICS:
        assert f"| {metric.title} " in done.stdout

    result = json.loads(file.read_text())
    expected = {"direct", "relay"} | ({"nginx"} if shutil.which("nginx") else set())
    assert set(result["targets"]) == set(result["medians"]) == expected
    for target in result["targets"].values():
        assert {kind: len(rounds) for kind, rounds in target["rounds"].items()} == dict.fromkeys(KINDS, QUICK.rounds)
    assert [goal["metric"] for goal in result["goals"]] == [goal.metric for goal in GOALS]
    assert result["medians"]["relay"]["cpu_us_per_token"] > 0
    assert result["versions"]["python"] and result["cpu_count"] and result["pinned"]


def test_unknown_target_is_refused() -> None:
    done = bench("--quick", "--only", "nosuch")
    assert done.returncode == 1
    assert "no such target here: nosuch" in done.stderr


def test_interrupted_run_leaves_no_process_behind(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "tests.bench", "--quick", "--rounds", "1000"]
    with (tmp_path / "log").open("w") as log, subprocess.Popen(argv, cwd=ROOT, env=environment(), stderr=log) as run:
        deadline = time.monotonic() + TIMEOUT_S
        while "round 1 " not in (tmp_path / "log").read_text():
            assert run.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.02)
        started = tree(run.pid)[1:]
        try:
            run.send_signal(signal.SIGINT)
            assert run.wait(TIMEOUT_S / 2) == 1
        finally:
            run.terminate()
    assert len(started) >= 2
    assert [process for process in started if process.is_running()] == []


@pytest.mark.parametrize(
    "sent", [wire.stream_body(2)[:-20], wire.stream_body(3), wire.stream_body(2).replace(b"t00001", b"t00002")]
)
def test_answer_that_is_short_or_differs_is_an_error(sent: bytes) -> None:
    response = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + wire.chunk(sent) + wire.LAST_CHUNK
    with pytest.raises(wire.BrokenRun, match="differs"):
        wire.check_body(response, wire.stream_body(2))
