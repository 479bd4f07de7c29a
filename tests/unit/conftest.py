"""Tests of functions alone: none of them starts a process, or uses the network."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

FORBIDDEN = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system"}
FORBIDDEN |= {"socket.connect", "socket.bind", "socket.getaddrinfo"}
watched = False


def watch(event: str, args: tuple[object, ...]) -> None:
    if watched and event in FORBIDDEN:
        raise AssertionError(f"{event}{args}: not in a unit test")


sys.addaudithook(watch)  # for the rest of the process


@pytest.fixture(autouse=True)
def no_processes_no_sockets() -> Iterator[None]:
    global watched
    watched = True
    yield
    watched = False
