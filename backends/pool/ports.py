"""TCP ports for the children: each is reserved for one at a time, and only while no other process listens on it."""

from __future__ import annotations

import socket
import sys
from contextlib import suppress

import psutil

from llama_smart_proxy.backends.pool.family import family
from llama_smart_proxy.proxy.errors import StartFailed

ANY = ("0.0.0.0", "::")
"""Addresses of sockets that accept connections to every address."""


class Ports:
    """The range of one pool. Ports are handed out in turn, so that a freed one rests before it is used again."""

    def __init__(self, host: str, ports: range) -> None:
        self.host = host
        self._ports = ports
        self._taken: set[int] = set()
        self._next = 0

    def move(self, host: str, ports: range) -> None:
        """Hand out these ports from now on, but none of those that are still taken."""
        if (host, ports) != (self.host, self._ports):
            self.host, self._ports, self._next = host, ports, 0

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


def listens(pid: int, host: str, port: int) -> bool | None:
    """Whether process `pid`, or one that it has started, is who listens on `host` and `port`; None if the system does
    not tell. Blocks."""
    unknown = False
    for member in family(pid):
        try:
            found = psutil.Process(member).net_connections("tcp")
        except psutil.NoSuchProcess:
            continue
        except (psutil.Error, OSError):
            unknown = True
            continue
        mine = [one.laddr for one in found if one.laddr and one.status == psutil.CONN_LISTEN]
        if any(address.port == port and address.ip in (host, *ANY) for address in mine):
            return True
    return None if unknown else False
