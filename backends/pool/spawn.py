"""Child processes: the one place that makes them, and how their output and their end become events.

A child is started through `pool.launch`, which ties its life to ours, in a session and process group of its own;
every signal goes to the whole group. Its two outputs are one pipe; its input is empty, or a pipe until it is to end.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from llama_smart_proxy.backends.pool.orphans import OWNER, owner_mark
from llama_smart_proxy.proxy.errors import StartFailed

logger = logging.getLogger(__name__)

LAUNCH = str(Path(__file__).with_name("launch.py"))
READ_BYTES = 64 * 1024
FINAL_READS = 16
HELD_S = 0.1
"""Pause in seconds after which a process that has ended and cannot be reaped is tried again."""


class Child:
    """A process of ours, from its spawn until it is reaped. All methods and callbacks run in the event loop.

    `pid` is also its process group. Keep a reference until it has ended: there is no other.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        output: int,
        on_output: Callable[[bytes], None],
        on_exit: Callable[[int], None],
        held: int = -1,
        farewell: bytes = b"",
    ) -> None:
        self.pid = process.pid
        self.returncode: int | None = None
        """Exit code, or minus the number of the signal that ended it; None while it lives."""
        self._process = process
        self._output = output
        self._held = held  # the other end of its input
        self._farewell = farewell
        self._on_output = on_output
        self._on_exit = on_exit
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[int] = self._loop.create_future()
        self._pidfd = -1

    def terminate(self) -> None:
        """SIGTERM to the group, and the farewell; nothing when it has ended."""
        self._signal(signal.SIGTERM)
        if self._held >= 0:
            with suppress(OSError):  # it has closed its input, or does not read it
                os.write(self._held, self._farewell)
        self._close_input()

    def kill(self) -> None:
        """SIGKILL to the group; nothing when it has ended."""
        self._signal(signal.SIGKILL)

    @property
    def alive(self) -> bool:
        """Whether it has not ended, as the system has it at this moment: before its end is reported. Cheap."""
        if self.returncode is not None:
            return False
        if not hasattr(os, "waitid"):
            return True
        with suppress(ChildProcessError):
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None
        return False

    async def wait(self) -> int:
        """The `returncode`, once the process is reaped and what was left of its group is killed."""
        return await asyncio.shield(self._ended)

    def _watch(self) -> None:
        """Start the two event sources. Raises `OSError` when there is no file descriptor left for them."""
        os.set_blocking(self._output, False)
        if sys.platform == "linux":
            try:
                self._pidfd = os.pidfd_open(self.pid)
            except OSError as exc:
                if exc.errno != errno.ENOSYS:
                    raise
        self._loop.add_reader(self._output, self._readable)
        if self._pidfd >= 0:
            self._loop.add_reader(self._pidfd, self._exited)
        else:
            threading.Thread(target=self._wait_in_thread, daemon=True).start()

    def _wait_in_thread(self) -> None:
        """Where there is no pidfd. Leaves the process a zombie if the system can do that, else reaps it."""
        if hasattr(os, "waitid"):
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        else:
            self._process.wait()
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._exited)

    def _readable(self) -> bool:
        """Hand on one piece of output; False when there is none now."""
        try:
            data = os.read(self._output, READ_BYTES)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._close_output()
            return False
        self._on_output(data)
        return True

    def _exited(self) -> None:
        """The process has ended. It is still a zombie, so no other process can have its group id yet: what is left of
        the group goes first. A process that escaped from the group and still holds the pipe delays nothing.
        """
        self._signal(signal.SIGKILL)
        for _ in range(FINAL_READS):
            if self._output < 0 or not self._readable():
                break
        self.returncode = self._process.poll()
        if self.returncode is None:  # a debugger holds it: it can be reaped once that has let it go
            if self._pidfd >= 0:
                self._loop.remove_reader(self._pidfd)
            self._loop.call_later(HELD_S, self._exited)
            return
        self._close()
        if not self._ended.done():
            self._ended.set_result(self.returncode)
        self._on_exit(self.returncode)

    def _signal(self, number: signal.Signals) -> None:
        if self.returncode is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)

    def _close_output(self) -> None:
        if self._output >= 0:
            self._loop.remove_reader(self._output)
            os.close(self._output)
            self._output = -1

    def _close_input(self) -> None:
        if self._held >= 0:
            os.close(self._held)
            self._held = -1

    def _discard(self) -> None:
        """End and reap a process that cannot be watched."""
        self.kill()
        self._process.wait()
        self._close()

    def _close(self) -> None:
        self._close_output()
        self._close_input()
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1


def spawn(
    argv: Sequence[str],
    env: Mapping[str, str],
    on_output: Callable[[bytes], None],
    on_exit: Callable[[int], None],
    farewell: bytes = b"",
    *,
    confined: bool = True,
) -> Child:
    """Start `argv` with exactly the environment `env`, plus the mark by which a later proxy knows its orphans.

    `farewell` is written to its input when it is to end; without one, its input is empty. If it is `confined`, neither
    it nor what it starts can gain privileges.
    `on_output` gets what the child prints, piece by piece; `on_exit` its return code, once, after its last output.
    There is no await in here, so a child that was started always has an owner. A program that cannot be executed is a
    child that prints why and exits with 127.

    Raises: `StartFailed` (code `spawn_failed`) when the system refuses another process or file descriptor;
    `RuntimeError` outside the main thread: the kernel ends a child with the *thread* that made it (`pool.launch`).
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("children must be spawned from the main thread")
    try:
        child = _spawn(argv, env, on_output, on_exit, farewell, confined)
        try:
            child._watch()
        except OSError:
            child._discard()
            raise
    except OSError as exc:
        reason = os.strerror(exc.errno) if exc.errno else str(exc)
        raise StartFailed(f"The system refused to start another process: {reason}.", code="spawn_failed") from exc
    return child


def _spawn(
    argv: Sequence[str],
    env: Mapping[str, str],
    on_output: Callable[[bytes], None],
    on_exit: Callable[[int], None],
    farewell: bytes,
    confined: bool,
) -> Child:
    """Raises: `OSError`."""
    # Not `stdout=PIPE`: when file descriptors run out, Popen loses the one it opened for DEVNULL.
    with ExitStack() as theirs, ExitStack() as ours:
        output, write_end = os.pipe()
        ours.callback(os.close, output)
        theirs.callback(os.close, write_end)
        read_end, held = subprocess.DEVNULL, -1
        if farewell:
            read_end, held = os.pipe()
            ours.callback(os.close, held)
            theirs.callback(os.close, read_end)
            os.set_blocking(held, False)
        process = _popen(argv, env, read_end, write_end, confined)
        ours.pop_all()
    return Child(process, output, on_output, on_exit, held, farewell)


def _popen(
    argv: Sequence[str], env: Mapping[str, str], source: int, output: int, confined: bool
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-I", "-S", LAUNCH, str(os.getpid()), "--" if confined else "++", *argv],
        env={**env, OWNER: owner_mark()},
        stdin=source,
        stdout=output,
        stderr=output,
        start_new_session=True,
    )
