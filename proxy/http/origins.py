"""Which web pages may use the proxy, and the headers by which their browser lets them (CORS).

Browsers send `Origin` with what a page requests from another host or port, and ask by a preflight before they send a
request that a form could not. Source: the Fetch standard, 3.2; Private Network Access, 3.1.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from functools import lru_cache

from aiohttp import web

ANY = "*"
EXPOSED = "X-Request-Id, Request-Id, Retry-After"
"""The response headers that scripts may read, besides those that the Fetch standard lists."""
PREFLIGHT_S = 600
"""Seconds that a browser may remember the answer to a preflight."""
_ORIGIN = re.compile(r"(?:([a-z][a-z0-9+.-]*)://)?([!-~]*)", re.IGNORECASE)
_HOST = re.compile(r"([a-z0-9._-]+|\[[0-9a-f:.]+\])(?::\d{1,5})?", re.IGNORECASE)
_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
"""RFC 9110 5.6.2."""
_METHOD = "Access-Control-Request-Method"
_PREFLIGHT_VARY = "Access-Control-Request-Method, Access-Control-Request-Headers"
"""Besides `Origin`, which every response names."""


class Origins:
    """The origins whose pages are served: this machine, applications, and the configured ones.

    Other host names are never trusted, even if they resolve to this machine (DNS rebinding), nor is `null`, which is
    also the origin of a page in a sandbox, wherever that comes from.
    """

    def __init__(self, configured: Iterable[str]) -> None:
        self._configured = frozenset(configured)

    def allow(self, origin: str) -> bool:
        """Whether pages of `origin`, the value of the header, are served."""
        if is_local(origin) or origin.lower() in self._configured:
            return True
        return ANY in self._configured and _ORIGIN.fullmatch(origin) is not None

    def headers(self, origin: str) -> list[tuple[str, str]]:
        """The headers of a response to a page of `origin`."""
        vary = ("vary", "Origin")
        if not self.allow(origin):
            return [vary]
        return [("access-control-allow-origin", origin), ("access-control-expose-headers", EXPOSED), vary]


@lru_cache(maxsize=256)
def is_local(origin: str) -> bool:
    """Whether `origin` is a page of this machine, or an application, which has a scheme of its own (`app://`,
    `file://`, `tauri://`, `capacitor://`, `vscode-webview://`, an extension of the browser)."""
    found = _ORIGIN.fullmatch(origin)
    if found is None:
        return False
    scheme, rest = found.groups()
    if scheme is not None and scheme.lower() not in ("http", "https"):
        return True
    host = _HOST.fullmatch(rest)
    return host is not None and _is_this_machine(host[1].lower())


def _is_this_machine(host: str) -> bool:
    """`localhost` and all below it (RFC 6761 6.3), loopback addresses, and those that mean every address."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None) or address
    return bool(mapped.is_loopback or mapped.is_unspecified)


def is_preflight(http: web.BaseRequest) -> bool:
    """Whether a browser asks if a page may send a request."""
    return http.method == "OPTIONS" and all(name in http.headers for name in ("Origin", _METHOD))


async def preflight(http: web.BaseRequest) -> web.Response:
    """The answer to a preflight of an origin that is allowed: the page may send what it asked for. Headers that are
    not tokens are left out."""
    headers = http.headers
    asked = (name.strip() for name in ",".join(headers.getall("Access-Control-Request-Headers", ())).split(","))
    method = headers[_METHOD]
    response = web.Response(headers={"Access-Control-Max-Age": str(PREFLIGHT_S), "Vary": _PREFLIGHT_VARY})
    response.headers["Access-Control-Allow-Methods"] = ", ".join(
        dict.fromkeys(["GET", "POST", "DELETE", *([method] if _TOKEN.fullmatch(method) else [])])
    )
    if names := ", ".join(name for name in asked if _TOKEN.fullmatch(name)):
        response.headers["Access-Control-Allow-Headers"] = names
    if headers.get("Access-Control-Request-Private-Network", "").lower() == "true":
        response.headers["Access-Control-Allow-Private-Network"] = "true"
    return response
