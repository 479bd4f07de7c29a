"""The proxy as a real process, and waiting without sleeping."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import psutil

from tests.support import raw_client
from tests.support.nursery import AVAILABLE, Born, Nursery

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's threads wait for each other by spinning
ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 60.0
"""How long a test waits for what takes a moment: nothing is lost by patience where it comes, even on a busy machine."""
START_S = 120.0
STOP_S = 25.0
"""Less than the 30 s that a proxy gives by default to answers under way."""
ORPHAN_S = 30.0
LOG_BYTES = 1024 * 1024
POLL_S = 0.005
_LISTENING = re.compile(r"listening on http://(\S+):(\d+)")
_OURS = ("STATE_DIRECTORY", "LSP_", "OLLAMA_PROXY_", "AIP_", "LLAMA_", "FAKE_", "HF_", "HUGGINGFACE_")
_EMPTY_CACHE = tempfile.TemporaryDirectory(prefix="lsp-hf-", ignore_cleanup_errors=True)
_STATE = tempfile.TemporaryDirectory(prefix="lsp-state-", ignore_cleanup_errors=True)
companions: set[int] = set()
"""Pids of other programs that tests have started, and whatever they count are not to count."""
earlier: set[int] = set()
"""The children of this process when the present test began, such as programs that the tests of a module share."""
_NEVER = ("Traceback", "unhandled error", "was destroyed but it is pending", "was never retrieved", "never awaited")
"""What the log of a healthy proxy never holds."""

proxies: list[Proxy] = []
"""Those started in the current test, and those that run for the whole session; `conftest` shows their logs."""

_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_ranges = count(os.getpid() % 100 * _WORKERS + _WORKER, _WORKERS)
_singles = count(os.getpid() % 600 * _WORKERS + _WORKER, _WORKERS)


def direct_children() -> set[int]:
    """The direct children of this process, zombies too, as its threads have started them; cheap to ask."""
    found: set[int] = set()
    for file in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):  # the thread has ended
            found |= {int(pid) for pid in file.read_text().split()}
    return found


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on now, above those of `ports` and below those that the kernel hands
    out, so that it stays free; the next caller gets another one."""
    for number in _singles:
        port = 29600 + number % 3168
        with socket.socket() as sock, suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what lingers after its close is no listener
            sock.bind(("127.0.0.1", port))
            sock.listen(1)
            return port
    raise AssertionError("unreachable")


def ports() -> dict[str, int]:
    """A range of ports for one pool, below those that the kernel hands out, and another one for the next caller, also
    in another worker of this run."""
    start = 20000 + next(_ranges) % 120 * 80
    return {"port_start": start, "port_end": start + 79}


async def until(
    predicate: Callable[[], object | Awaitable[object]], deadline_s: float = PATIENCE_S, *, what: str = "the condition"
) -> None:
    """Return as soon as `predicate()` is true; fail the test when it is not within `deadline_s` seconds."""
    ends = time.monotonic() + deadline_s
    while True:
        held = predicate()
        if inspect.isawaitable(held):
            held = await held
        if held:
            return
        assert time.monotonic() < ends, f"{what} did not come true within {deadline_s:g} s"
        await asyncio.sleep(POLL_S)


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without anything that would configure a proxy, with an empty Hugging Face cache and a
    folder for state, and with a log in text, plus `extra`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(_OURS) and not k.lower().endswith("_proxy")}
    path = os.pathsep.join(filter(None, (str(ROOT), kept.get("PYTHONPATH"))))
    own = {"PYTHONPATH": path, "HF_HOME": _EMPTY_CACHE.name, "XDG_STATE_HOME": _STATE.name, "LSP_LOG_FORMAT": "text"}
    return kept | own | dict(extra or {})


async def stopped(pid: int) -> None:
    """Stop a process by SIGSTOP, and return once every thread of it is."""

    def all_stopped() -> bool:
        states = [file.read_text().rpartition(")")[2].split()[0] for file in Path(f"/proc/{pid}/task").glob("*/stat")]
        return set(states) == {"T"}

    os.kill(pid, signal.SIGSTOP)
    await until(all_stopped, what="the stop")


class Proxy:
    """One running proxy process."""

    def __init__(self, process: subprocess.Popen[bytes] | Born) -> None:
        self.process = process
        self.pid = process.pid
        self.host = ""
        self.port = 0
        self._log = bytearray()
        self._expected_end = False
        assert process.stderr is not None
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        proxies.append(self)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def log(self) -> str:
        """What the process wrote to stderr (the last MiB of it)."""
        return bytes(self._log).decode(errors="replace")

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    async def health(self) -> dict[str, Any]:
        """The body of `GET /health`, whatever its status."""
        answer = (await raw_client.get(self.port, "/health")).json()
        assert isinstance(answer, dict)
        return answer

    def children(self) -> list[psutil.Process]:
        """All descendants alive now; a zombie does not count."""
        found = []
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    if child.status() != psutil.STATUS_ZOMBIE:
                        found.append(child)
        return found

    def fds(self) -> int:
        """Open file descriptors of the proxy process."""
        return int(psutil.Process(self.pid).num_fds())

    def rss_bytes(self) -> int:
        """Resident memory of the proxy process alone."""
        return int(psutil.Process(self.pid).memory_info().rss)

    def peak_rss_bytes(self) -> int:
        """The most memory that the proxy process ever had."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))

    def cpu_s(self) -> float:
        """Processor seconds the proxy process has used."""
        times = psutil.Process(self.pid).cpu_times()
        return float(times.user + times.system)

    def send(self, number: signal.Signals) -> None:
        """Send a signal after which the process may end; `kill -9` is `send(signal.SIGKILL)`."""
        self._expected_end = True
        self.process.send_signal(number)

    async def ended(self, deadline_s: float = STOP_S) -> int:
        """Wait for the process to end; its exit status, negative for a signal."""
        await until(lambda: not self.alive, deadline_s, what="the end of the proxy")
        self._reader.join()
        return int(self.process.wait())

    def started(self) -> bool:
        """Whether it listens; `host` and `port` are known from then on. Fails when it ended instead."""
        found = _LISTENING.search(self.log)
        if found is None:
            assert self.alive, f"the proxy ended with status {self.process.returncode}:\n{self.log}"
            return False
        self.host, self.port = found[1], int(found[2])
        return True

    def check_log(self) -> None:
        """Fail if the log tells of a bug."""
        for words in _NEVER:
            assert words not in self.log, f"{words!r} in the proxy's log"

    def stop(self) -> list[str]:
        """End it if it runs, by SIGTERM, then SIGKILL, and every descendant it left. What was wrong with that."""
        wrong = []
        children = self.children()
        if not self.alive:
            if not self._expected_end:
                wrong.append(f"the proxy ended by itself with status {self.process.returncode}")
        else:
            self.process.terminate()
            try:
                status = self.process.wait(STOP_S)
                if status != 0:
                    wrong.append(f"the proxy answered SIGTERM with exit status {status}")
            except subprocess.TimeoutExpired:
                wrong.append(f"the proxy still ran {STOP_S:g} s after SIGTERM")
                self.process.kill()
                self.process.wait()
        for child in living(children, ORPHAN_S):
            wrong.append(f"child {child.pid} outlived the proxy")
            with suppress(psutil.NoSuchProcess):
                child.kill()
        self._reader.join()
        return wrong

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as pipe:
            while data := os.read(pipe.fileno(), 65536):
                self._log += data
                del self._log[:-LOG_BYTES]


def logged(log: Path) -> list[dict[str, Any]]:
    """The events that fakes have written down there, a line of JSON each, oldest first."""
    with suppress(FileNotFoundError):
        whole, _, _ = log.read_text().rpartition("\n")  # behind it a line that is being written
        return [json.loads(line) for line in whole.splitlines()]
    return []


def living(processes: list[psutil.Process], patience_s: float) -> list[psutil.Process]:
    """Those that still live after so many seconds, or none as soon as all are dead."""
    ends = time.monotonic() + patience_s
    while (left := [process for process in processes if not _is_dead(process)]) and time.monotonic() < ends:
        time.sleep(POLL_S)
    return left


def _is_dead(process: psutil.Process) -> bool:
    """Dead is also who nobody has reaped: not every container has an init that does."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def launch(
    config: Mapping[str, Any],
    folder: Path,
    *,
    env: Mapping[str, str] | None,
    args: Sequence[str],
    within: Sequence[str] = (),
    keep_fds: Sequence[int] = (),
) -> Proxy:
    """Start a proxy without waiting for it. It listens on a free port unless `config` names one, and logs at info.
    `within` is the command line of a program that becomes the proxy, whose own is appended; it inherits `keep_fds`.
    Unless `config` says so, no stream has headers before its answer: how long that takes on a busy machine would decide
    about the status."""
    server = {"port": 0, "early_headers": False, **config.get("server", {})}
    whole = {"log_level": "info", **config, "server": server}
    file = folder / "config.yaml"
    file.write_text(json.dumps(whole, default=str))
    words, environ = ["serve", "--config", str(file), *args], environment(env)
    if AVAILABLE and not within and not any(name.startswith("PYTHON") for name in env or ()):
        return Proxy(nursery().start(words, environ, ROOT))
    argv = [*within, sys.executable, "-m", "llama_smart_proxy", *words]
    stdin, stderr = subprocess.DEVNULL, subprocess.PIPE
    return Proxy(subprocess.Popen(argv, cwd=ROOT, env=environ, stdin=stdin, stderr=stderr, pass_fds=keep_fds))


@cache
def nursery() -> Nursery:
    """What all proxies of this process's tests are forked from, but those with an interpreter set up by variables."""
    started = Nursery(environment(), ROOT)
    companions.add(started.pid)
    return started


@asynccontextmanager
async def running_proxy(
    config: Mapping[str, Any],
    *,
    env: Mapping[str, str] | None = None,
    args: Sequence[str] = (),
    clean_log: bool = True,
    beside: Path | None = None,
    within: Sequence[str] = (),
    keep_fds: Sequence[int] = (),
) -> AsyncIterator[Proxy]:
    """A proxy with `config`, listening; ended at the end, and checked for ending properly. `beside` is the folder of
    its configuration file, by default one where nothing else is; `within` and `keep_fds` as in `launch`.

    Properly: exit status 0 after SIGTERM, no child left, and (unless `clean_log` is False) no traceback in the log.
    """
    with tempfile.TemporaryDirectory() as folder:
        proxy = launch(config, beside or Path(folder), env=env, args=args, within=within, keep_fds=keep_fds)
        try:
            await until(proxy.started, START_S, what="the listening proxy")
            yield proxy
        except BaseException:
            await asyncio.to_thread(proxy.stop)
            raise
        wrong = await asyncio.to_thread(proxy.stop)
        assert not wrong, wrong
        if clean_log:
            proxy.check_log()


@contextmanager
def session_proxy(config: Mapping[str, Any]) -> Iterator[Proxy]:
    """`running_proxy` outside of any event loop, for fixtures that live as long as the session."""
    with tempfile.TemporaryDirectory() as folder:
        proxy = launch(config, Path(folder), env=None, args=())
        ends = time.monotonic() + START_S
        try:
            while not proxy.started():
                assert time.monotonic() < ends, f"the proxy does not listen:\n{proxy.log}"
                time.sleep(POLL_S)
            yield proxy
        finally:
            wrong = proxy.stop()
        assert not wrong, wrong
        proxy.check_log()
