"""Which names the proxy answers to, as a protection against DNS rebinding.

A web page of any server can let its own host name resolve to an address of this machine; its requests then count as the
page's own origin, and only their `Host` header shows it. So the names that others could let resolve to anything are
refused, and those they have no power over are served: addresses, names without a dot, and this machine's own ones.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from llama_smart_proxy.backends.http.resolver import is_loopback_name
from llama_smart_proxy.backends.threads import begin_in_thread
from llama_smart_proxy.proxy.errors import BadRequest, StartFailed

ANY = "*"
LOOPBACK = frozenset({"localhost.localdomain", "localhost4.localdomain4", "localhost6.localdomain6"})
"""Names with dots for this machine in `/etc/hosts`."""
CONTAINERS = frozenset({"host.docker.internal", "host.containers.internal"})
"""The host's names in containers of Docker and Podman."""
HOST = re.compile(r"([A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\])(?::([0-9]{1,5}))?")
"""A name or an address in brackets, and a port."""
_REMEMBERED = 256
_RESOLV_CONF = Path("/etc/resolv.conf")


class Hosts:
    """The names that are served: those which the public DNS cannot give away, and the `configured` ones, of which `*`
    means all and `*.example.com` all below that domain."""

    def __init__(self, configured: Iterable[str]) -> None:
        names = frozenset(configured)
        self._any = ANY in names
        self._suffixes = tuple(name[1:] for name in names if name.startswith("*."))
        self._names = set(LOOPBACK | CONTAINERS | names)
        self._served: set[str] = set()
        """Values of the header that were served, as most requests repeat them."""

    def learn_own(self) -> None:
        """Add this machine's names. Its full name may require a look-up, so that comes later, from a thread."""
        full = socket.gethostname().lower()
        short = full.partition(".")[0]
        self._names.update((full, *(f"{short}.{domain}" for domain in ("local", *_search_domains()))))
        with suppress(StartFailed):
            begin_in_thread(self._learn_full_name)

    def _learn_full_name(self) -> None:
        with suppress(OSError, UnicodeError):
            self._names.add(socket.getfqdn().lower())

    def check(self, header: str) -> None:
        """Reject a request with this valid `Host` header unless its name is served. Raises: BadRequest 403."""
        if header in self._served:
            return
        if not self.serve(header):
            message = f"this proxy does not answer to the host {header[:100]!r}; server.allow_hosts lists further names"
            raise BadRequest(message, status=403, code="forbidden_host")
        if len(self._served) >= _REMEMBERED:
            self._served.clear()
        self._served.add(header)

    def serve(self, header: str) -> bool:
        """Whether requests with this valid `Host` header are served; its port is not considered."""
        if self._any or header.startswith("["):
            return True
        host = header.partition(":")[0].lower()
        name = host.removesuffix(".")
        if "." not in name or is_loopback_name(host):
            return True
        return name in self._names or _is_address(name) or name.endswith(self._suffixes)


@lru_cache(maxsize=_REMEMBERED)
def is_host(header: str) -> bool:
    """Whether it is a valid `Host` header."""
    found = HOST.fullmatch(header)
    return found is not None and (found[2] is None or int(found[2]) <= 65535)


def _is_address(name: str) -> bool:
    """Whether it is an IPv4 address in any spelling, such as `127.1`: no name of the DNS ends in a number."""
    if not name.rpartition(".")[2][:1].isdigit():
        return False
    try:
        socket.inet_aton(name)
    except OSError:
        return False
    return True


def _search_domains() -> list[str]:
    """The domains that this machine's resolver appends to short names."""
    with suppress(OSError, UnicodeError):
        lines = [line.split() for line in _RESOLV_CONF.read_text(encoding="utf-8").splitlines()]
        found = [words[1:] for words in lines if words[:1] in (["search"], ["domain"])]
        return [domain.strip(".").lower() for domains in found for domain in domains if domain.strip(".")]
    return []
