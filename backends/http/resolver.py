"""Looks up the addresses of servers, each name in a thread of its own.

The event loop would do it in a few threads that all names share, so that one DNS server that does not answer delays the
servers of all other names, and the end of the process.
"""

from __future__ import annotations

import asyncio
import ipaddress
import math
import socket
from dataclasses import dataclass
from functools import partial
from typing import Any

from llama_smart_proxy.backends.threads import begin_in_thread

FRESH_S = 30.0
"""Age in seconds from which a name is looked up again."""
FAILED_S = 2.0
"""Likewise for one that could not be resolved."""
AddressInfo = tuple[int, int, int, str, Any]
"""As `socket.getaddrinfo` returns it."""


@dataclass(slots=True)
class _LookUp:
    """One look-up of a name, running or done; its result may be an error. `until` is when it is done anew."""

    result: asyncio.Future[list[AddressInfo] | Exception]
    until: float = math.inf


class Resolver:
    """The addresses of names, remembered for a short time. All who wait for a name share one look-up."""

    def __init__(self) -> None:
        self._names: dict[str, _LookUp] = {}

    async def addresses(self, host: str, port: int) -> list[AddressInfo]:
        """The addresses of `host`, best first. The caller limits the time; the look-up goes on without it.

        Raises: OSError, UnicodeError if there are none; StartFailed if no thread can be started.
        """
        if is_loopback_name(host):
            return _with_port(_LOOPBACK, port)
        name = host.lower()
        loop = asyncio.get_running_loop()
        known = self._names.get(name)
        if known is None or known.until <= loop.time() or known.result.get_loop() is not loop:
            known = _LookUp(begin_in_thread(partial(_look_up, name)))
            known.result.add_done_callback(partial(_remember, known))
            self._names[name] = known
        found = await asyncio.shield(known.result)
        if isinstance(found, Exception):
            raise type(found)(*found.args)
        return _with_port(found, port)

    def forget(self, host: str) -> None:
        """Look the name up anew, as none of its addresses could be reached."""
        known = self._names.get(host.lower())
        if known is not None and known.result.done():
            known.until = -math.inf


def is_address(host: str) -> bool:
    """Whether it is an IP address, which may have a zone."""
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def is_loopback_name(host: str) -> bool:
    """Whether it is `localhost` or a name below it, with or without a final dot. Source: RFC 6761 6.3."""
    return host.lower().removesuffix(".").rpartition(".")[2] == "localhost"


_LOOPBACK: list[AddressInfo] = [
    (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("127.0.0.1", 0)),
    (socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("::1", 0, 0, 0)),
]


def _look_up(name: str) -> list[AddressInfo] | Exception:
    try:
        found: list[Any] = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
        return found
    except (OSError, UnicodeError) as exc:  # not raised, as the future may have no reader any more
        return exc


def _remember(known: _LookUp, result: asyncio.Future[list[AddressInfo] | Exception]) -> None:
    if not result.cancelled():
        kept_s = FAILED_S if isinstance(result.result(), Exception) else FRESH_S
        known.until = result.get_loop().time() + kept_s


def _with_port(found: list[AddressInfo], port: int) -> list[AddressInfo]:
    return [(*info, (address[0], port, *address[2:])) for *info, address in found]  # type: ignore[misc]


resolver = Resolver()
"""The one of this process."""
