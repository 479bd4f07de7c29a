"""The worker as the proxy sees it: started at first use, asked for one document at a time, replaced when it fails.

It inherits neither the environment, which contains secrets, nor file descriptors.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from contextlib import suppress
from dataclasses import asdict

import orjson

from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.knowledge.base import Piece, Unreadable
from llama_smart_proxy.proxy.knowledge.reading.frames import HEAD, MAX_FRAME, framed
from llama_smart_proxy.proxy.knowledge.reading.limits import Limits

START = (
    "import sys; sys.path[:] = sys.argv[3:]; "
    "from llama_smart_proxy.proxy.knowledge.reading.worker import main; main(sys.argv[1:3])"
)
INHERITED = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ")
"""What programs require of the environment. It contains no secrets."""


class Worker:
    """One worker process. Its requests wait for each other, first come, first served."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._turn = asyncio.Lock()
        self._process: Process | None = None
        self._idle: asyncio.TimerHandle | None = None

    async def pieces(self, request: Json, content: bytes = b"") -> list[Piece]:
        """The pieces of the file that `request` names, or of `content`. If the caller is cancelled, the worker is
        replaced.

        Raises: Unreadable.
        """
        async with self._turn:
            self._stop_waiting()
            process = await self._running()
            usable = False
            try:
                async with asyncio.timeout(self._limits.time_s):
                    found, outcome = await self._ask(process, framed(orjson.dumps(request)) + framed(content))
                usable = not outcome.get("last")
            except TimeoutError:
                raise Unreadable(f"takes more than {self._limits.time_s:g} s to read") from None
            except (asyncio.IncompleteReadError, ConnectionError):
                raise Unreadable(self._cause(await process.wait())) from None
            finally:
                if usable:
                    self._idle = asyncio.get_running_loop().call_later(self._limits.idle_s, self._end)
                else:
                    self._end()
        if error := outcome.get("error"):
            raise Unreadable(error)
        return found

    async def close(self) -> None:
        """End the process."""
        self._stop_waiting()
        process = self._process
        self._end()
        if process:
            await process.wait()

    async def _running(self) -> Process:
        if self._process is None or self._process.returncode is not None:
            self._end()
            self._process = await self._start()
        return self._process

    async def _start(self) -> Process:
        limits = orjson.dumps(asdict(self._limits)).decode()
        try:
            return await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-c", START, limits, str(os.getpid()), *_import_paths()),
                stdin=PIPE,
                stdout=PIPE,
                stderr=DEVNULL,
                env={name: os.environ[name] for name in INHERITED if name in os.environ},
                cwd="/",
                start_new_session=True,
            )
        except OSError as exc:
            raise Unreadable(f"cannot be read: the system refused to start a process ({exc.strerror})") from exc

    async def _ask(self, process: Process, request: bytes) -> tuple[list[Piece], Json]:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(request)
        found: list[Piece] = []
        room = self._limits.text_mib * 1024 * 1024 + 2 * MAX_FRAME
        while True:
            (length,) = HEAD.unpack(await process.stdout.readexactly(HEAD.size))
            room -= length
            if length > MAX_FRAME or room < 0:
                raise ConnectionError
            message = orjson.loads(await process.stdout.readexactly(length))
            if isinstance(message, dict):
                return found, message
            found += [Piece(text, heading) for text, heading in message]

    def _cause(self, status: int) -> str:
        if status == -signal.SIGXCPU:
            return f"takes more than {self._limits.processor_s} s of processor time to read"
        if status < 0:
            with suppress(ValueError):
                return f"cannot be read: the process that read it was ended by {signal.Signals(-status).name}"
        return f"cannot be read: the process that read it ended with status {status}"

    def _stop_waiting(self) -> None:
        if self._idle:
            self._idle.cancel()
            self._idle = None

    def _end(self) -> None:
        process, self._process = self._process, None
        if process and process.stdin:
            process.stdin.close()
            with suppress(ProcessLookupError):
                process.kill()


def _import_paths() -> list[str]:
    """Where this process imports from, as absolute paths."""
    return [os.path.abspath(path) for path in sys.path]
