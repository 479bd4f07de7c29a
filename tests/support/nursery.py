"""Proxies that need not import anything: one process has imported all of it, and forks another one for each of them.

Most of what it costs to start a proxy are its imports, and the tests start hundreds. What is forked has its own pid,
environment, working folder, output and end, like any other process; only the interpreter's start and the imports are
not repeated, but for what a module finds out about its process when it is imported (`STATE`). The tests of the command
line (`test_cli` and others) start the program from nothing.

This is also the program that forks (`python -m tests.support.nursery FD`). It ends when whoever started it has ended.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.abc import SourceLoader
from pathlib import Path
from typing import IO, Any, NoReturn

LONGEST = 512 * 1024
"""Bytes of a request: the command line and the environment of a proxy."""
AVAILABLE = sys.platform == "linux"
STATE = {"llama_smart_proxy.backends.openai": "OUR_VIA", "llama_smart_proxy.proxy.api.admin": "STARTED"}
"""Values of modules that are another process's business; `test_architecture` finds all there are."""


class Born:
    """A forked process, to be used as a `subprocess.Popen` with a pipe for its stderr."""

    def __init__(self, pid: int, handle: int, status: int, stderr: IO[bytes]) -> None:
        self.pid = pid
        self.stderr = stderr
        self.returncode: int | None = None
        self._handle = handle
        self._status = status
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._told(0)

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, once there is one.

        Raises: subprocess.TimeoutExpired
        """
        told = self._told(timeout)
        if told is None:
            raise subprocess.TimeoutExpired("a proxy", timeout or 0)
        return told

    def send_signal(self, number: int) -> None:
        with self._lock, suppress(ProcessLookupError):
            if self.returncode is None:
                signal.pidfd_send_signal(self._handle, signal.Signals(number))

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _told(self, timeout_s: float | None) -> int | None:
        if self.returncode is None:
            ended = select.poll()
            ended.register(self._status, select.POLLIN)
            if ended.poll(None if timeout_s is None else timeout_s * 1000):
                self._read_status()
        return self.returncode

    def _read_status(self) -> None:
        with self._lock:
            if self.returncode is None:  # else another thread was quicker
                said = os.read(self._status, 100)
                assert said, "the process that forks proxies has died"
                self.returncode = int(said)
                os.close(self._status)
                os.close(self._handle)


class Nursery:
    """The process that forks, as its owner sees it."""

    def __init__(self, env: Mapping[str, str], folder: Path) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            argv = [sys.executable, "-m", __name__, str(theirs.fileno())]
            self._process = subprocess.Popen(
                argv, cwd=folder, env=dict(env), stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
            )
        self._control.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LONGEST)
        self._lock = threading.Lock()
        atexit.register(self.close)

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self, words: Sequence[str], env: Mapping[str, str], folder: Path) -> Born:
        """`llama-smart-proxy` with these words; its stderr is a pipe, its stdout is ours."""
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        request = json.dumps({"words": list(words), "env": dict(env), "folder": str(folder), "files": limits}).encode()
        stderr, their_stderr = os.pipe()
        status, their_status = os.pipe()
        with self._lock:
            socket.send_fds(self._control, [request], [1, their_stderr, their_status])
            said, handles, *_ = socket.recv_fds(self._control, 100, 1)
        os.close(their_stderr)
        os.close(their_status)
        assert said, "the process that forks proxies has died"
        return Born(int(said), handles[0], status, os.fdopen(stderr, "rb"))

    def close(self) -> None:
        """End the process; those that it has forked go on."""
        self._control.close()
        self._process.wait()


# -- the program that forks --------------------------------------------------------------------------------------------


def serve(control: socket.socket) -> list[str] | None:
    """Fork for each request. Returns None when nobody can ask any more, and in the forked process its command line."""
    waiting = select.poll()
    waiting.register(control, select.POLLIN)
    running: dict[int, tuple[int, int]] = {}
    while True:
        for ready, _ in waiting.poll():
            if ready in running:
                pid, status = running.pop(ready)
                waiting.unregister(ready)
                with suppress(BrokenPipeError):  # nobody wants to know
                    os.write(status, b"%d" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                os.close(status)
                os.close(ready)
                continue
            data, fds, *_ = socket.recv_fds(control, LONGEST, 3)
            if not data:
                return None
            request, (stdout, stderr, status) = json.loads(data), fds
            pid = os.fork()
            if pid == 0:
                control.detach()
                become(request, stdout, stderr)
                return list(request["words"])
            handle = os.pidfd_open(pid)
            socket.send_fds(control, [b"%d" % pid], [handle])
            waiting.register(handle, select.POLLIN)
            running[handle] = (pid, status)
            os.close(stdout)
            os.close(stderr)


def become(request: dict[str, Any], stdout: int, stderr: int) -> None:
    """In the forked process: be as if just started with these files, environment, folder and limit of open files."""
    with open(os.devnull, "rb") as nothing:
        for number, fd in enumerate((nothing.fileno(), stdout, stderr)):
            os.dup2(fd, number)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2:
            with suppress(OSError):  # the one that lists the folder is closed already
                os.close(int(name))
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["folder"])
    resource.setrlimit(resource.RLIMIT_NOFILE, tuple(request["files"]))
    for name, attribute in STATE.items():
        renew(name, attribute)


def renew(name: str, attribute: str) -> None:
    """Find out anew what that module did about its process, and tell all who have it from there."""
    module = sys.modules[name]
    assert module.__spec__ is not None and isinstance(module.__spec__.loader, SourceLoader)
    old, again = vars(module)[attribute], {"__name__": name}
    code = module.__spec__.loader.get_code(name)
    assert code is not None
    exec(code, again)
    for other in [other for known, other in sys.modules.items() if known.startswith("llama_smart_proxy.")]:
        for own in [own for own, value in vars(other).items() if value is old]:
            setattr(other, own, again[attribute])


def main() -> int:
    from llama_smart_proxy.proxy import serve as imported_beforehand
    from llama_smart_proxy.proxy.cli import check
    from llama_smart_proxy.proxy.cli.main import main as run

    assert imported_beforehand and check
    gc.collect()
    gc.freeze()
    words = serve(socket.socket(fileno=int(sys.argv[1])))
    if words is None:
        return 0
    sys.argv = ["llama-smart-proxy", *words]
    status = 1
    try:
        status = run(words)
    except SystemExit as exc:
        status = exc.code if isinstance(exc.code, int) else 1
    except BaseException:
        traceback.print_exc()
    end(status)


def end(status: int) -> NoReturn:
    """Exit as an interpreter does, but leave it to the kernel to free the memory: it is shared, and would be copied for
    that."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
