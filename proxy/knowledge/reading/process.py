"""The worker as the proxy sees it: started at first use, asked for one document at a time, replaced when it fails.

It inherits neither the environment, which contains secrets, nor file descriptors.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from typing import cast

import orjson

from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.knowledge.base import Piece, Unreadable
from llama_smart_proxy.proxy.knowledge.reading.frames import HEAD, MAX_FRAME, framed
from llama_smart_proxy.proxy.knowledge.reading.limits import OUT_OF_MEMORY, Limits

START = (
    "import sys; sys.path[:] = sys.argv[3:]; "
    "from llama_smart_proxy.proxy.knowledge.reading.worker import main; main(sys.argv[1:3])"
)
INHERITED = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ")
"""What programs require of the environment. It contains no secrets."""
MIB = 1024 * 1024
MAX_REASON = 500


class Worker:
    """One worker process. Its requests wait for each other, first come, first served."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._turn = asyncio.Lock()
        self._link: _Link | None = None
        self._ending: set[_Link] = set()
        self._idle: asyncio.TimerHandle | None = None

    async def pieces(self, request: Json, content: bytes = b"") -> list[Piece]:
        """The pieces of the file that `request` names, or of `content`. If the caller is cancelled, the worker is
        replaced.

        Raises: Unreadable.
        """
        async with self._turn:
            self._stop_waiting()
            link = await self._running()
            usable = False
            try:
                async with asyncio.timeout(self._limits.time_s):
                    found, outcome = await link.ask(framed(orjson.dumps(request)) + framed(content))
                usable = not outcome.get("last")
            except TimeoutError:
                raise Unreadable(f"takes more than {self._limits.time_s:g} s to read") from None
            except ConnectionError:
                raise Unreadable(self._cause(link.status)) from None
            finally:
                if usable:
                    self._idle = asyncio.get_running_loop().call_later(self._limits.idle_s, self._end)
                else:
                    self._end()
        if error := outcome.get("error"):
            raise Unreadable(str(error)[:MAX_REASON])
        return found

    async def close(self) -> None:
        """End the process. A document that is being read is unreadable."""
        self._stop_waiting()
        self._end()
        await asyncio.gather(*(link.ended for link in self._ending))

    async def _running(self) -> _Link:
        if self._link is None or not self._link.lives:
            self._end()
            self._link = await self._start()
        return self._link

    async def _start(self) -> _Link:
        limits = orjson.dumps(asdict(self._limits)).decode()
        room = self._limits.text_mib * MIB + 2 * MAX_FRAME
        try:
            _, link = await asyncio.get_running_loop().subprocess_exec(
                lambda: _Link(room),
                *(sys.executable, "-I", "-c", START, limits, str(os.getpid()), *_import_paths()),
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in INHERITED if name in os.environ},
                cwd="/",
                start_new_session=True,
            )
        except OSError as exc:
            raise Unreadable(f"cannot be read: the system refused to start a process ({exc.strerror})") from exc
        return link

    def _cause(self, status: int | None) -> str:
        if status == -signal.SIGXCPU:
            return f"takes more than {self._limits.processor_s} s of processor time to read"
        if status == OUT_OF_MEMORY:
            return f"requires more than {self._limits.memory_mib} MiB of memory"
        how = "was ended" if status is None else f"ended with status {status}"
        if status is not None and status < 0:
            with suppress(ValueError):
                how = f"was ended by {signal.Signals(-status).name}"
        return f"cannot be read: the process that read it {how}"

    def _stop_waiting(self) -> None:
        if self._idle:
            self._idle.cancel()
            self._idle = None

    def _end(self) -> None:
        link, self._link = self._link, None
        if link and not link.ended.done():
            self._ending.add(link)
            link.ended.add_done_callback(lambda _: self._ending.discard(link))
            link.kill()


class _Link(asyncio.SubprocessProtocol):
    """The connection to one process, until that has ended."""

    def __init__(self, room: int) -> None:
        loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = loop.create_future()
        """Done when it is reaped and its pipes are closed."""
        self._answer: asyncio.Future[tuple[list[Piece], Json]] = loop.create_future()
        self._found: list[Piece] = []
        self._data = bytearray()
        self._most = room
        self._room = room

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.SubprocessTransport, transport)

    @property
    def status(self) -> int | None:
        """Its exit status, or minus the number of a signal; None while it lives."""
        return self._transport.get_returncode()

    @property
    def lives(self) -> bool:
        """Whether it has not ended, as the system has it at this moment: before its end is reported."""
        if self.status is not None or self.ended.done() or not hasattr(os, "waitid"):
            return self.status is None and not self.ended.done()
        try:
            return os.waitid(os.P_PID, self._transport.get_pid(), os.WEXITED | os.WNOWAIT | os.WNOHANG) is None
        except ChildProcessError:  # the event loop has reaped it
            return False

    async def ask(self, request: bytes) -> tuple[list[Piece], Json]:
        """Send a request; its pieces, and the last message. Raises: ConnectionError."""
        self._answer = asyncio.get_running_loop().create_future()
        self._found, self._room = [], self._most
        self._input.write(request)
        return await self._answer

    def kill(self) -> None:
        """It is to end at once."""
        self._input.close()
        with suppress(ProcessLookupError):
            self._transport.kill()

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        self._data += data
        self._room -= len(data)
        start = 0
        while start + HEAD.size <= len(self._data):
            (length,) = HEAD.unpack_from(self._data, start)
            if length > MAX_FRAME or self._room < 0:
                self.kill()
                return
            end = start + HEAD.size + length
            if end > len(self._data):
                break
            try:
                self._message(orjson.loads(self._data[start + HEAD.size : end]))
            except (ValueError, TypeError):  # a document has taken it over
                self.kill()
                return
            start = end
        del self._data[:start]

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport.close()
        if not self._answer.done():
            self._answer.set_exception(ConnectionError())
            self._answer.exception()  # it may be that no document is being read
        self.ended.set_result(None)

    def _message(self, message: list[list[str]] | Json) -> None:
        if not isinstance(message, dict):
            self._found += [Piece(str(text), str(heading)) for text, heading in message]
        elif not self._answer.done():
            self._answer.set_result((self._found, message))

    @property
    def _input(self) -> asyncio.WriteTransport:
        return cast(asyncio.WriteTransport, self._transport.get_pipe_transport(0))


def _import_paths() -> list[str]:
    """Where this process imports from, as absolute paths."""
    return [os.path.abspath(path) for path in sys.path]
