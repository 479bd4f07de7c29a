"""`llama-smart-proxy pull`, run as a user runs it."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path

import pytest

from llama_smart_proxy.proxy.cli.pull import pull_command
from tests.fakes.hub import gguf
from tests.support.harness import ROOT, environment, until
from tests.support.hub_calls import Bench, bench
from tests.support.ollamas import running_ollama

__all__ = ["bench"]  # fixture
TIMEOUT_S = 200.0


def argv(name: str, config: Path | None = None) -> list[str]:
    given = ["--config", str(config)] if config is not None else []
    return [sys.executable, "-m", "llama_smart_proxy", "pull", name, *given]


def pull(bench: Bench, name: str, config: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = environment(bench.hub.env(bench.home))
    return subprocess.run(argv(name, config), cwd=ROOT, env=env, capture_output=True, text=True, timeout=TIMEOUT_S)


def started(bench: Bench, name: str) -> subprocess.Popen[str]:
    env, pipe = environment(bench.hub.env(bench.home)), subprocess.PIPE
    return subprocess.Popen(argv(name), cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Two models, one of which comes from the hub."""
    file = tmp_path / "config.yaml"
    hub = {"repo": "cli/repo", "variant": "*Q8_0.gguf", "aliases": ["mine"]}
    file.write_text(json.dumps({"models": {"ours": hub, "local": {"path": "m.gguf"}}}))
    return file


@pytest.mark.parametrize("name", ["ours", "Mine", "hf.co/cli/repo:Q8_0"])
def test_a_configured_model_or_one_of_the_hub_is_fetched(bench: Bench, config: Path, name: str) -> None:
    bench.hub.add("cli/repo/m-Q8_0.gguf", gguf(1_000_000))
    done = pull(bench, name, config)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("hf.co/cli/repo:") and done.stdout.endswith(" is ready\n")
    lines = done.stderr.splitlines()
    assert lines[0] == "pulling manifest" and lines[-1] == "writing manifest"
    assert lines[-3 if "verifying sha256 digest" in lines else -2].endswith(": 1.0 of 1.0 MB")
    assert bench.calls("locate", "cli/repo", "Q8_0").result is not None


NEITHER = "neither a configured model with a `repo` nor hf.co/org/repo:variant; for names of Ollama's library "
NO_OLLAMA = f"{NEITHER}configure its host: `ollama: {{host: 127.0.0.1}}`"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("absent", NO_OLLAMA),
        ("qwen3:0.6b", NO_OLLAMA),
        ("hf.co/../x", NO_OLLAMA),
        ("Local", "is configured with a file of its own; there is nothing to download"),
    ],
)
def test_what_cannot_be_pulled_is_named(
    config: Path, capsys: pytest.CaptureFixture[str], name: str, problem: str
) -> None:
    assert pull_command(config, {}, name) == 1
    assert capsys.readouterr() == ("", f"{name}: {problem}\n")


async def test_any_other_name_is_pulled_by_the_configured_ollama(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with running_ollama("other", registry=["qwen3:0.6b", "own"], pull_step_s=0) as fake:
        file = tmp_path / "config.yaml"
        models = {"own": {"backend": "ollama"}, "team": {"model": "own", "aliases": ["ours"]}}
        file.write_text(json.dumps({"ollama": {"host": fake.url, "pull": "never"}, "models": models}))
        for name, pulled in (("qwen3:0.6b", "qwen3:0.6b"), ("own", "own"), ("Ours", "own"), ("no/such", None)):
            status = await asyncio.to_thread(pull_command, file, {}, name)
            out, err = capsys.readouterr()
            assert (status, out) == ((0, f"{pulled} is ready\n") if pulled else (1, ""))
            assert err.startswith("pulling manifest\n")
            if pulled is None:
                assert err.splitlines()[1:] == ["model 'no/such' not found: pull model manifest: file does not exist"]
        await fake.kill()
        assert await asyncio.to_thread(pull_command, file, {}, "own") == 1
        assert f"{fake.url}" in capsys.readouterr().err


def test_a_failure_is_one_line_and_exit_status_1(bench: Bench) -> None:
    done = pull(bench, "hf.co/no/such")
    assert (done.returncode, done.stdout) == (1, "")
    first, error = done.stderr.splitlines()
    assert first == "pulling manifest" and error.startswith("there is no repository no/such at http")


def test_a_terminal_gets_a_progress_bar(bench: Bench) -> None:
    bench.hub.add("bars/repo/m-Q4_K_M.gguf", gguf(1_000_000))
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 100))
    env = environment(bench.hub.env(bench.home, TERM="xterm"))
    process = subprocess.Popen(argv("hf.co/bars/repo"), cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=slave)
    os.close(slave)
    shown = b""
    with suppress(OSError):  # the other end is closed
        while data := os.read(master, 4096):
            shown += data
    os.close(master)
    assert process.wait(TIMEOUT_S) == 0
    assert b"100%" in shown and b"1.00M/1.00M" in shown and b"writing manifest" in shown


async def test_an_interrupted_pull_goes_on_where_it_was(bench: Bench) -> None:
    bench.hub.add("interrupted/repo/m-Q4_K_M.gguf", gguf(1_000_000))
    bench.hub.behave("interrupted/repo/m-Q4_K_M.gguf", hold=0.5)
    process = started(bench, "hf.co/interrupted/repo")
    blobs = bench.folder("interrupted/repo") / "blobs"
    await until(lambda: any(file.stat().st_size >= 490_000 for file in blobs.glob("*")), TIMEOUT_S)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130 and said.endswith("stopped; run the same command to continue\n")
    kept = bench.partial("interrupted/repo").stat().st_size
    bench.hub.behave("interrupted/repo/m-Q4_K_M.gguf")
    assert pull(bench, "hf.co/interrupted/repo").returncode == 0
    ranges = [request["range"] for request in bench.hub.requests(having="/interrupted/repo/resolve/")]
    assert ranges == [None, f"bytes={kept}-999999"]
