"""TCP ports for the children: each is reserved for one at a time, and only while no other process listens on it."""

from __future__ import annotations

import socket
import sys
from contextlib import suppress

import psutil

from llama_smart_proxy.proxy.errors import StartFailed


class Ports:
    """The range of one pool. Ports are handed out in turn, so that a freed one rests before it is used again."""

    def __init__(self, host: str, ports: range) -> None:
        self.host = host
        self._ports = ports
        self._taken: set[int] = set()
        self._next = 0

    def reserve(self) -> int:
        """A port that is free now. Nothing is bound: the child that gets it may still find it taken.

        Raises: `StartFailed` (code `no_free_port`).
        """
        for offset in range(len(self._ports)):
            index = (self._next + offset) % len(self._ports)
            port = self._ports[index]
            if port not in self._taken and is_free(self.host, port):
                self._next = index + 1
                self._taken.add(port)
                return port
        first, last = self._ports[0], self._ports[-1]
        raise StartFailed(f"No port from {first} to {last} is free on {self.host}.", code="no_free_port")

    def release(self, port: int) -> None:
        """Give a reserved port back."""
        self._taken.discard(port)


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now.

    SO_REUSEADDR only on Linux: there it skips connections that linger after their close, and never hides a listener;
    on BSDs it would hide one on the wildcard address.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe, suppress(OSError):
        if sys.platform == "linux":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        probe.listen(1)
        return True
    return False


def listens(pid: int, port: int) -> bool:
    """Whether process `pid`, or one that it has started, listens on `port`; False if that cannot be known. Blocks."""
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        for member in (process, *process.children(recursive=True)):
            if port in _listened_on(member):
                return True
    return False


def _listened_on(process: psutil.Process) -> list[int]:
    with suppress(psutil.Error):
        found = process.net_connections("tcp")
        return [one.laddr.port for one in found if one.laddr and one.status == psutil.CONN_LISTEN]
    return []
