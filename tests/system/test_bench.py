"""The bench works: one tiny run of everything it measures. No figure is judged here."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.bench import apis, beside, wire
from tests.bench.measure import KINDS, PROXY_ONLY, QUICK
from tests.bench.process import ROOT, environment, tree
from tests.bench.summary import ALL, CHAINS, CROSSED, GOALS, TOKEN
from tests.support.harness import PATIENCE_S, living

TIMEOUT_S = 240


def bench(*options: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "tests.bench", *options]
    return subprocess.run(
        argv, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def as_stream(body: bytes) -> bytes:
    """`body` as a whole answer in one chunk."""
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + wire.chunk(body) + wire.LAST_CHUNK


def checkout(folder: Path) -> Path:
    """A folder that looks like a checkout with a proxy of its own, which is this one's."""
    program = folder / ".venv" / "bin" / "llama-smart-proxy"
    program.parent.mkdir(parents=True)
    call = shlex.join([sys.executable, "-m", "llama_smart_proxy"])
    program.write_text(f'#!/bin/sh\nexec env PYTHONPATH={shlex.quote(str(ROOT / "src"))} {call} "$@"\n')
    program.chmod(0o755)
    return folder


@pytest.mark.full
def test_quick_run_prints_the_table_and_writes_every_figure(tmp_path: Path) -> None:
    file = tmp_path / "new" / "bench.json"
    done = bench("--quick", "--json", str(file), "--against", str(checkout(tmp_path / "other")))
    assert done.returncode == 0, done.stderr
    for metric in ALL:
        assert f"| {metric.title} " in done.stdout

    result = json.loads(file.read_text())
    expected = {"direct", "relay", "against"} | ({"nginx"} if shutil.which("nginx") else set())
    assert set(result["targets"]) == set(result["medians"]) == expected
    for name, target in result["targets"].items():
        kinds = [kind for kind in KINDS if name in ("relay", "against") or kind not in PROXY_ONLY]
        assert {kind: len(rounds) for kind, rounds in target["rounds"].items()} == dict.fromkeys(kinds, QUICK.rounds)
    assert [goal["metric"] for goal in result["goals"]] == [goal.metric for goal in GOALS]
    assert all(result["medians"]["relay"][name] > 0 for name in (TOKEN, *(metric.name for metric in CHAINS + CROSSED)))
    compared = result["ratios"]["against"]["relay"]
    assert all(compared[metric.name] > 0 for metric in (*CHAINS, *CROSSED))
    judged = {goal["metric"]: goal["value"] for goal in result["goals"]}
    assert all(judged[metric.name] > 0 for metric in CROSSED)
    assert all(
        value is not None for name, value in judged.items() if shutil.which("nginx") or not name.startswith("cpu")
    )
    assert result["versions"]["python"] and result["cpu_count"] and result["pinned"]


def test_unknown_target_is_refused() -> None:
    done = bench("--quick", "--only", "nosuch")
    assert done.returncode == 1
    assert "no such target here: nosuch" in done.stderr


def test_a_checkout_without_a_proxy_is_refused(tmp_path: Path) -> None:
    done = bench("--quick", "--against", str(tmp_path))
    assert done.returncode == 1
    assert f"not there: {tmp_path}/.venv/bin/llama-smart-proxy" in done.stderr


@pytest.mark.full
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
    assert living(started, PATIENCE_S) == []


@pytest.mark.parametrize("shape", beside.SHAPES)
def test_uploads_are_chat_requests_of_their_size(shape: str) -> None:
    made = beside.body(shape, 10_000)
    assert 9_000 < len(made) < 11_000
    assert json.loads(made).keys() == {"model", "messages", "x"}


async def test_the_delay_of_a_stream_is_what_its_tokens_are_behind_the_schedule() -> None:
    watcher = beside.Watcher()
    watcher.arrivals = [0.0, 5.01, 5.02, 5.08, 5.041]  # one token was 50 ms late; the first has no place in it
    assert watcher.worst_delay_s(0.01) == pytest.approx(0.05)


@pytest.mark.parametrize(
    "sent", [wire.stream_body(2)[:-20], wire.stream_body(3), wire.stream_body(2).replace(b"t00001", b"t00002")]
)
def test_answer_that_is_short_or_differs_is_an_error(sent: bytes) -> None:
    with pytest.raises(wire.BrokenRun, match="differs"):
        wire.check_body(as_stream(sent), wire.stream_body(2))


def test_lines_of_ollama_are_compared_byte_for_byte_on_their_way_to_its_own_clients() -> None:
    sent = wire.lines_body(3)
    apis.check_stream(as_stream(sent), "ollama", wire.OLLAMA_MODEL, 3)
    with pytest.raises(wire.BrokenRun, match="differs"):
        apis.check_stream(as_stream(sent.replace(b"03:04:05", b"03:04:07")), "ollama", wire.OLLAMA_MODEL, 3)


def test_agents_that_pass_an_answer_on_may_change_no_byte_and_the_rewriter_has_to_change_each_text() -> None:
    sent = wire.stream_body(2)
    changed = sent.replace(b't00000"', b't00000!"').replace(b't00001"', b't00001!"')
    for model in ("m-1-agent", "m-3-agents"):
        apis.check_stream(as_stream(sent), "openai", model, 2)
        for other in (changed, sent.replace(b"b6000", b"b6001", 1)):
            with pytest.raises(wire.BrokenRun, match="differs"):
                apis.check_stream(as_stream(other), "openai", model, 2)
    apis.check_stream(as_stream(changed), "openai", "m-rewritten", 2)
    for other in (sent, changed.replace(b"t00001!", b"t00001")):
        with pytest.raises(wire.BrokenRun, match="2 of 2 tokens, or in another order"):
            apis.check_stream(as_stream(other), "openai", "m-rewritten", 2)


TRANSLATED = {
    "openai": (wire.OLLAMA_MODEL, wire.stream_body(3)),
    "ollama": (wire.MODEL, wire.lines_body(3)),
    "anthropic": (
        wire.OLLAMA_MODEL,
        b"".join(
            b'event: content_block_delta\ndata: {"type":"content_block_delta","delta":{"text":" t%05d"}}\n\n' % index
            for index in range(3)
        )
        + b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
    ),
}


@pytest.mark.parametrize("api", TRANSLATED)
def test_translated_answer_must_have_every_token_and_its_end(api: str) -> None:
    model, whole = TRANSLATED[api]
    assert whole.count(wire.TOKEN_MARK) == 3
    apis.check_stream(as_stream(whole), api, model, 3)
    with pytest.raises(wire.BrokenRun, match="3 of 4 tokens"):
        apis.check_stream(as_stream(whole), api, model, 4)
    with pytest.raises(wire.BrokenRun, match="another order"):
        apis.check_stream(as_stream(whole.replace(b"t00001", b"t00003")), api, model, 3)
    separator = b"\n" if api == "ollama" else b"\n\n"
    endless = whole[: whole.rindex(separator, 0, -1)] + separator
    with pytest.raises(wire.BrokenRun, match="does not end"):
        apis.check_stream(as_stream(endless), api, model, 3)
