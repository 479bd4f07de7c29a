"""`simulate`: the proof that an installation works, and the verdict when it does not."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from llama_smart_proxy.proxy.config import hash_of
from tests.support.e2e_support import Fakes, Gate, embedded, fakes, gate, needs_llama_cpp, tiny
from tests.support.gguf_fixture import tiny_models
from tests.support.harness import ORPHAN_S, ROOT, START_S, STOP_S, environment, living, until

__all__ = ["fakes", "gate", "tiny_models"]  # fixtures
ONE_THREAD = {"LSP_LLAMA_CPP__ARGS": '["-t", "1"]'}
"""The threads of llama.cpp wait for each other by spinning, on a busy machine for minutes."""
ROW = re.compile(r"(?P<step>.+?) +(?P<verdict>pass|FAIL|skip) ")


def command(config: dict[str, Any] | None, folder: Path) -> list[str]:
    """The command line; None is the shipped configuration."""
    words = [sys.executable, "-P", "-m", "llama_smart_proxy", "simulate"]
    if config is not None:
        file = folder / "simulated.yaml"
        file.write_text(json.dumps(config))
        words += ["--config", str(file)]
    return words


def simulate(config: dict[str, Any] | None, folder: Path) -> tuple[int, dict[str, str], str]:
    """Exit status, verdict of each step, and everything printed."""
    words = command(config, folder)
    done = subprocess.run(words, cwd=ROOT, env=environment(ONE_THREAD), capture_output=True, text=True, timeout=250)
    rows = [match for line in done.stdout.splitlines() if (match := ROW.match(line))]
    return done.returncode, {row["step"]: row["verdict"] for row in rows}, done.stdout + done.stderr


@needs_llama_cpp
@pytest.mark.timeout(300)  # two models on both cores, beside another test: seconds, or a minute and more
def test_the_shipped_configuration_passes_every_step(tmp_path: Path) -> None:
    status, verdicts, said = simulate(None, tmp_path)
    assert status == 0, said
    assert list(verdicts) == [
        *("proxy starts", "model list", "chat", "chat, streamed", "embedding", "helper beside it", "health")
    ]
    assert set(verdicts.values()) == {"pass"}
    assert "smollm2 beside minilm" in said


@needs_llama_cpp
def test_two_chat_models_are_swapped_where_nothing_embeds(tmp_path: Path, tiny_models: dict[str, Path]) -> None:
    models = {name: tiny(tiny_models[name]) for name in ("tiny-a", "tiny-b")}
    server = {"host": "0.0.0.0", "api_keys": [hash_of("a key that only its client knows")]}
    status, verdicts, said = simulate({**embedded(models), "server": server}, tmp_path)
    assert status == 0, said
    assert verdicts["model swap"] == "pass" and verdicts["embedding"] == "skip"


def test_a_model_that_cannot_load_fails_with_its_last_words(tmp_path: Path, fakes: Fakes) -> None:
    status, verdicts, said = simulate(fakes.config({"broken": fakes.model(EXIT=3)}), tmp_path)
    assert status == 1
    assert verdicts["proxy starts"] == verdicts["model list"] == "pass"
    assert verdicts["chat"] == verdicts["chat, streamed"] == "FAIL"
    assert "exited with code 3" in said and "Traceback" not in said


def test_a_stream_that_breaks_off_fails(tmp_path: Path, fakes: Fakes) -> None:
    status, verdicts, said = simulate(fakes.config({"m": fakes.model(CUT="chunked_no_end")}), tmp_path)
    assert status == 1 and verdicts["chat, streamed"] == "FAIL"
    assert "Traceback" not in said


def test_a_configuration_without_models_fails(tmp_path: Path) -> None:
    status, verdicts, said = simulate({"models": {}}, tmp_path)
    assert status == 1 and verdicts["model list"] == "FAIL" and "no model is offered" in said


def started(config: dict[str, Any], folder: Path) -> subprocess.Popen[str]:
    """Run in a folder with modules of others, which the command itself does not see, and its proxy must not either."""
    for name in ("agents", "backends", "llama_smart_proxy", "proxy", "yaml"):
        (folder / f"{name}.py").write_text("raise RuntimeError('not ours')")
    return subprocess.Popen(command(config, folder), cwd=folder, env=environment(), stdout=subprocess.PIPE, text=True)


def test_each_step_is_printed_as_it_ends_also_into_a_pipe(tmp_path: Path, fakes: Fakes, gate: Gate) -> None:
    with started(fakes.config({"m": fakes.model(LOAD_UNTIL=gate)}), tmp_path) as process:
        assert process.stdout is not None
        first = [process.stdout.readline().split()[:2] for _ in range(2)]
        assert first == [["proxy", "starts"], ["model", "list"]]
        gate.open()  # the chat has not been answered before
        assert "chat, streamed   pass" in process.stdout.read()
    assert process.returncode == 0


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGHUP, "the reader leaves"])
async def test_the_proxy_ends_with_the_simulation(
    tmp_path: Path, fakes: Fakes, gate: Gate, end: signal.Signals | str
) -> None:
    with started(fakes.config({"m": fakes.model(LOAD_UNTIL=gate)}), tmp_path) as process:
        assert process.stdout is not None
        await until(lambda: fakes.events("start"), START_S)
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 2, "the proxy and its server"
        if isinstance(end, signal.Signals):
            process.send_signal(end)
        process.stdout.close()
        gate.open()
        assert process.wait(STOP_S) == 128 + (end if isinstance(end, signal.Signals) else signal.SIGPIPE)
    assert living(children, ORPHAN_S) == []
