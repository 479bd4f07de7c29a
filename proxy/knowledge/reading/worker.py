"""The worker: a program that reads one document after another, and can do little else.

It is started by `process`; its arguments are `Limits` as JSON and the pid of the proxy. It ends when its input ends, or
with the proxy, and after a document that has used up the memory.
"""

from __future__ import annotations

import logging
import os
import resource
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import BinaryIO

import orjson

from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.knowledge.base import Chunking, Piece, Unreadable
from llama_smart_proxy.proxy.knowledge.reading.documents import pieces_of
from llama_smart_proxy.proxy.knowledge.reading.frames import FRAME_BYTES, framed, received
from llama_smart_proxy.proxy.knowledge.reading.limits import OUT_OF_MEMORY, Limits

PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, SIGKILL = 1, 38, 9
OOM_SCORE = b"800"
MIB = 1024 * 1024


def main(argv: list[str]) -> None:
    """Read documents until the input ends."""
    limits = Limits(**orjson.loads(argv[0]))
    _tie_to(int(argv[1]))
    _confine(limits)
    logging.disable(logging.CRITICAL)  # libraries describe documents in the log
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no frame
    while (request := received(source)) is not None:
        _renew(limits)
        if not _answer(orjson.loads(request), source, sink, limits):
            break


def _answer(request: Json, source: BinaryIO, sink: BinaryIO, limits: Limits) -> bool:
    """Write the pieces of one document. False if this process is not to read another one."""
    outcome: Json = {}
    try:
        content = received(source) or b""
        if path := request["path"]:
            content = _content(path)
        chunking = Chunking(request["characters"], request["overlap"])
        pieces = pieces_of(content, request["name"], request["media_type"], chunking)
        for frame in _frames(pieces, limits):
            sink.write(frame)
    except Unreadable as exc:
        outcome["error"] = str(exc)
    except Exception as exc:  # of a library, for a damaged document
        if isinstance(exc, MemoryError):
            os._exit(OUT_OF_MEMORY)
        outcome["error"] = f"is damaged or not supported ({type(exc).__name__})"
    used = _memory_used()
    if "error" in outcome and used > 0.9 * limits.memory_mib * MIB:  # a library has hidden the cause
        os._exit(OUT_OF_MEMORY)
    if used > limits.memory_mib * MIB // 2:  # the next one would have less than it is promised
        outcome["last"] = True
    sink.write(framed(orjson.dumps(outcome)))
    sink.flush()
    return "last" not in outcome


def _memory_used() -> int:
    """The most address space that this process had, in bytes; 0 where it is unknown."""
    with suppress(OSError), open("/proc/self/status", "rb") as status:
        for line in status:
            if line.startswith(b"VmPeak:"):
                return int(line.split()[1]) * 1024
    return 0


def _content(path: str) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would block
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise Unreadable("is not a regular file")
            return file.read()
    except OSError as exc:
        raise Unreadable(f"cannot be opened: {exc.strerror}") from exc


def _frames(pieces: Iterable[Piece], limits: Limits) -> Iterator[bytes]:
    room = limits.text_mib * MIB
    batch: list[tuple[str, str]] = []
    size = 0
    for piece in pieces:
        batch.append((piece.text, piece.heading))
        size += len(piece.text)
        if size > FRAME_BYTES:
            frame = framed(orjson.dumps(batch))
            if (room := room - len(frame)) < 0:
                raise Unreadable(f"contains more than {limits.text_mib} MiB of text")
            yield frame
            batch, size = [], 0
    if batch:
        yield framed(orjson.dumps(batch))


def _tie_to(parent: int) -> None:
    """End with the proxy, however it ends; gain no privileges; be the first to be killed when memory runs out."""
    if sys.platform == "linux":
        import ctypes

        libc = ctypes.CDLL(None)
        libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        with suppress(OSError), open("/proc/self/oom_score_adj", "wb") as score:
            score.write(OOM_SCORE)
    if os.getppid() != parent:
        sys.exit(1)


def _confine(limits: Limits) -> None:
    for which, most in (
        (resource.RLIMIT_AS, limits.memory_mib * MIB),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        with suppress(OSError, ValueError):  # the system does not have it, or a lower limit holds already
            resource.setrlimit(which, (most, most))


def _renew(limits: Limits) -> None:
    """Each document has its processor time, on top of what has been used."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    with suppress(OSError, ValueError):
        most = int(used.ru_utime + used.ru_stime) + 1 + limits.processor_s
        resource.setrlimit(resource.RLIMIT_CPU, (most, hard))


if __name__ == "__main__":
    main(sys.argv[1:])
