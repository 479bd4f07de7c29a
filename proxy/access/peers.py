"""Where clients come from, and where the proxy listens: on this machine, or beyond."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache

from aiohttp import web

from llama_smart_proxy.proxy.config import ServerConfig

FORWARDING = ("X-Forwarded-For", "Forwarded", "X-Real-IP")
"""The headers by which a reverse proxy names its client. They may be forged, so they only ever take a right away."""


def is_local(http: web.BaseRequest) -> bool:
    """Whether `http` comes from this machine, as far as can be known: not through a reverse proxy that says so."""
    transport = http.transport
    peer = transport.get_extra_info("peername") if transport is not None else None
    if isinstance(peer, tuple) and not is_loopback(peer[0]):
        return False
    headers = http.headers
    return peer is not None and not any(name in headers for name in FORWARDING)


@lru_cache(maxsize=256)
def is_loopback(host: str) -> bool:
    """Whether this address, or `localhost`, is reached from this machine alone."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host.lower() == "localhost"
    return bool((getattr(address, "ipv4_mapped", None) or address).is_loopback)


def exposure(server: ServerConfig, inherited: Iterable[socket.socket] = ()) -> str | None:
    """Why the proxy must not listen: without keys, and where others can reach it. None if it may. It listens on the
    `inherited` sockets, or else on the configured address."""
    if server.api_keys or server.allow_unauthenticated:
        return None
    hosts = [sock.getsockname()[0] for sock in inherited if sock.family != socket.AF_UNIX] or _addresses(server.host)
    reachable = [host for host in hosts if not is_loopback(host)]
    if not reachable:
        return None
    return (
        f"will not listen on {', '.join(dict.fromkeys(reachable))} without authentication: anyone who can reach this "
        "address could use it. server.api_keys lists keys (`llama-smart-proxy key new` makes one); "
        "server.allow_unauthenticated: true permits it to everyone"
    )


def _addresses(host: str) -> list[str]:
    """What the configured host stands for, unless that is this machine alone. A name that cannot be resolved fails when
    it is listened on."""
    if is_loopback(host):
        return []
    with suppress(ValueError):
        return [str(ipaddress.ip_address(host))]
    with suppress(OSError, UnicodeError):
        return [str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    return []
