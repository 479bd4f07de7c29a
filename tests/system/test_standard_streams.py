"""Standard input, output and error that are closed, that nobody reads, or that have no room: no crash, and no harm."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import raw_client
from tests.support.e2e_support import Fakes, fakes
from tests.support.harness import ROOT, START_S, environment, free_port, until

__all__ = ["fakes"]  # fixture
TIMEOUT_S = 200.0
PROGRAM = [sys.executable, "-m", "llama_smart_proxy"]
CLOSED = ("<&-", ">&-", "2>&-")
COMBINATIONS = [" ".join(some) for size in (1, 2, 3) for some in itertools.combinations(CLOSED, size)]
FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full")


def shell(redirections: str, *argv: str) -> list[str]:
    """A command line that closes or redirects standard streams of the program."""
    return ["sh", "-c", f'exec "$@" {redirections}', "sh", *argv]


# -- commands that end -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("closed", COMBINATIONS)
def test_closed_streams_are_the_null_device_and_stay_it_in_children(tmp_path: Path, closed: str) -> None:
    program = f"""
import os, subprocess, sys
from llama_smart_proxy.proxy.log import open_standard_streams
open_standard_streams()
print("out"), print("error", file=sys.stderr), sys.stdin.close()
with open({str(tmp_path / "file")!r}, "w") as file:
    assert file.fileno() > 2
    subprocess.run(["ls", "-l", "/proc/self/fd"], stdout=file, stderr=subprocess.DEVNULL, check=True)
    file.write(" ".join(os.readlink(f"/proc/self/fd/{{fd}}") for fd in (0, 1, 2)))
"""
    argv = shell(closed, sys.executable, "-c", program)
    done = subprocess.run(argv, env=environment(), cwd=ROOT, input="", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == (
        "" if ">&-" in closed.split() else "out\n",
        "" if "2>&-" in closed else "error\n",
    )
    links = (tmp_path / "file").read_text().splitlines()[-1].split()
    assert [link == os.devnull for link in links] == [redirection in closed.split() for redirection in CLOSED]


@pytest.mark.parametrize(
    ("words", "status"),
    [("schema", 0), ("check", 0), ("help pull", 0), ("pull none", 1), ("init", 1), ("fly", 2)],
)
def test_a_command_ends_as_ever_where_all_streams_are_closed(words: str, status: int) -> None:
    argv = shell(" ".join(CLOSED), *PROGRAM, *words.split())
    assert subprocess.run(argv, cwd=ROOT, env=environment(), timeout=TIMEOUT_S).returncode == status


@pytest.mark.parametrize("unbuffered", ["", pytest.param("1", marks=pytest.mark.full)])
@pytest.mark.parametrize(("words", "unread"), [("check", "stdout"), ("help", "stdout"), ("pull none", "stderr")])
def test_output_whose_reader_has_left_is_no_traceback(words: str, unread: str, unbuffered: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    assert ran_into(writing, words, unread, unbuffered) == (128 + signal.SIGPIPE, "")


@needs_full
@pytest.mark.parametrize("unbuffered", ["", pytest.param("1", marks=pytest.mark.full)])
@pytest.mark.parametrize(("words", "unread"), [("check", "stdout"), ("help", "stdout"), ("pull none", "stderr")])
def test_output_without_room_is_status_1_and_one_line(words: str, unread: str, unbuffered: str) -> None:
    status, other = ran_into(os.open(FULL, os.O_WRONLY), words, unread, unbuffered)
    told = "llama-smart-proxy: the output cannot be written: No space left on device\n"
    assert (status, other) == (1, told if unread == "stdout" else "")


@pytest.mark.parametrize("words", ["--help", "fly"])
def test_what_argparse_cannot_write_is_no_traceback_either(words: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    status, other = ran_into(writing, words, "stdout" if words == "--help" else "stderr", "")
    assert status in (0, 2, 128 + signal.SIGPIPE) and other == ""


def ran_into(fd: int, words: str, stream: str, unbuffered: str) -> tuple[int, str]:
    """The exit status of a command one of whose streams is `fd`, and what it wrote to the other one."""
    other = "stderr" if stream == "stdout" else "stdout"
    env = environment({"PYTHONUNBUFFERED": unbuffered})
    argv = [*PROGRAM, *words.split()]
    done: subprocess.CompletedProcess[str] = subprocess.run(  # type: ignore[call-overload]
        argv, cwd=ROOT, env=env, text=True, timeout=TIMEOUT_S, **{stream: fd, other: subprocess.PIPE}
    )
    os.close(fd)
    return done.returncode, str(getattr(done, other))


# -- the proxy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", ["closed", pytest.param("full", marks=needs_full), "unread", "left while it runs"])
def test_the_proxy_serves_and_ends_as_ever_whatever_its_streams_are(fakes: Fakes, streams: str) -> None:
    config = fakes.config({"m": fakes.model()}) | {"server": {"port": (port := free_port())}, "model_cache_ttl": 1}
    (fakes.folder / "config.json").write_text(json.dumps(config, default=str))  # with a warning at its start
    redirected = {"closed": " ".join(CLOSED), "full": f"> {FULL} 2>&1"}.get(streams, "2>&1")
    argv = shell(redirected, *PROGRAM, "serve", "--config", str(fakes.folder / "config.json"))
    with subprocess.Popen(argv, cwd=ROOT, env=environment(), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            if streams == "left while it runs":
                while b"listening" not in process.stdout.readline():
                    pass
            process.stdout.close()
            asyncio.run(_served(port))
            opened = [os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in (0, 1, 2)]
            assert streams != "closed" or opened == [os.devnull] * 3
        finally:
            process.terminate()
        assert process.wait(TIMEOUT_S) == 0


async def _served(port: int) -> None:
    await until(lambda: _answers(port), START_S, what="the listening proxy")
    for _ in range(3):
        body = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
        assert (await raw_client.post(port, "/v1/chat/completions", body)).status == 200


async def _answers(port: int) -> bool:
    try:
        return (await raw_client.get(port, "/health")).status == 200
    except OSError:
        return False
