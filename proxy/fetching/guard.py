"""Which URLs may be fetched, and which addresses may be dialled for that.

A URL is parsed once, by `yarl`, and the parsed value is what aiohttp connects to: no second parser can read another
host into it. What a name resolves to is checked where a socket is made for it, so an address in the URL, a redirect,
and a name that resolves to another address each time are all checked by the same few lines.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable
from typing import Any

from yarl import URL

PORTS = frozenset({80, 443, 8080, 8443})
"""Where web pages are; mail, databases and control ports are elsewhere."""
MAX_URL = 4096
RECEIVED_BYTES = 64 * 1024
"""Of a page that wait in the kernel: what is read at once is parsed at once, while all others wait."""
NOT_PUBLIC = "its address is not a public one, and knowledge.allow_private does not list its host"

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_V4 = (
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24"),
    *("192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24"),
    *("224.0.0.0/4", "240.0.0.0/4"),
)
_V6 = ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")
DENIED = tuple(ipaddress.ip_network(text) for text in (*_V4, *_V6))
"""Not public. Of IPv6 that is what remains within `UNICAST`: Teredo and other protocols, documentation, 6to4.
Source: IANA's special-purpose address registries. `ipaddress.is_global` of Python 3.11 is true for several of them."""
UNICAST = ipaddress.ip_network("2000::/3")
"""All public IPv6 addresses: not the IPv4-mapped and -compatible, NAT64, site-local, link-local and multicast ones."""

_HOST = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?)*\.?")
_LABELS_OF_NUMBERS = re.compile(r"(0x[0-9a-f]*|[0-9]+)")
_UNSAFE = re.compile(r"[\x00-\x20\x7f-\x9f\\]|\s")
_USER = re.compile(r"\A[^/?#]*//[^/?#]*@")


class Refused(ValueError):
    """A URL that is not fetched; the message is the reason, for users."""


class AddressRefused(OSError):
    """An address that is not dialled."""


def is_public(text: str) -> bool:
    """Whether it is an address of the public internet, to which a connection may be opened."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and (address.scope_id is not None or address not in UNICAST):
        return False
    return not any(address in network for network in DENIED if network.version == address.version)


def parsed(text: str) -> URL:
    """The URL, without its fragment. Raises: Refused, if it is not a plain one of http or https."""
    if len(text) > MAX_URL:
        raise Refused(f"the URL is longer than {MAX_URL} characters")
    if _UNSAFE.search(text):
        raise Refused("the URL has white space, control characters or backslashes")
    if _USER.match(text):
        raise Refused("a URL with a user name or a password is not fetched")
    try:
        return checked(URL(text))
    except Refused:
        raise
    except (ValueError, TypeError):  # also what `idna` raises
        raise Refused("the URL is not valid") from None


def checked(url: URL) -> URL:
    """The same URL, without its fragment. Raises: Refused; ValueError for a host that cannot be encoded."""
    if url.scheme not in ("http", "https"):
        raise Refused("only URLs of http and https are fetched")
    if url.raw_user is not None or url.raw_password is not None:
        raise Refused("a URL with a user name or a password is not fetched")
    host, port = (url.raw_host or "").lower(), url.port
    if "[" in url.raw_authority:
        ipaddress.IPv6Address(host)
        if "%" in host:
            raise Refused("an address with a zone is not fetched")
    elif not _HOST.fullmatch(host) or len(host) > 253:
        raise Refused("the URL has no valid host")
    elif _LABELS_OF_NUMBERS.fullmatch(host.removesuffix(".").rpartition(".")[2]):
        ipaddress.IPv4Address(host)  # `127.1`, `0x7f.1` and `2130706433` are addresses only to some
    if not port:
        raise Refused("the URL has no valid port")
    return url.with_fragment(None)


class Guard:
    """Makes sockets for aiohttp, and none for an address that is neither public nor in one of the `networks`, nor
    where it is to be `open`, which is for hosts that the operator has named."""

    def __init__(self, networks: Iterable[Network] = (), *, open: bool = False) -> None:
        self._networks = tuple(networks)
        self._open = open

    def permits(self, text: str) -> bool:
        """Whether a connection to this address may be opened."""
        if self._open or is_public(text):
            return True
        address = ipaddress.ip_address(text)
        return any(address in network for network in self._networks if network.version == address.version)

    def __call__(self, info: tuple[Any, ...]) -> socket.socket:
        """A socket for the address that is dialled next. Raises: AddressRefused."""
        family, kind, protocol, _, address = info
        if family not in (socket.AF_INET, socket.AF_INET6) or not self.permits(address[0]):
            raise AddressRefused(NOT_PUBLIC)
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVED_BYTES)
        return made


class Private:
    """Hosts that are not public and may be fetched all the same: names, addresses, and networks (`10.1.0.0/16`).

    Raises: ValueError.
    """

    def __init__(self, entries: Iterable[str] = ()) -> None:
        self.names: set[str] = set()
        self.networks: list[Network] = []
        for entry in entries:
            if "/" in entry:
                self.networks.append(ipaddress.ip_network(entry))
            else:
                self.names.add(_host(entry))

    def names_host(self, url: URL) -> bool:
        """Whether the host of `url` is one of the names."""
        return (url.raw_host or "").lower().removesuffix(".") in self.names


def _host(entry: str) -> str:
    """A name or address as it is in parsed URLs. Raises: ValueError."""
    url = parsed(f"http://[{entry}]/" if entry.count(":") > 1 else f"http://{entry}/")
    if url.explicit_port is not None or url.raw_path_qs != "/" or "#" in entry:
        raise Refused("no host")
    return (url.raw_host or "").lower().removesuffix(".")
