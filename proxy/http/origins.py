"""Which web pages may use the proxy, and the headers by which their browser lets them (CORS).

Browsers send `Origin` with what a page requests from another host or port, but not with images and links, which only
`Sec-Fetch-Site` shows; and ask by a preflight before they send a request that a form could not. Source: the Fetch
standard, 3.2; Private Network Access, 3.1; Fetch Metadata, 2.3.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from enum import Enum
from functools import lru_cache

from aiohttp import web

from llama_smart_proxy.backends.http.resolver import is_loopback_name
from llama_smart_proxy.proxy.dialects import limits
from llama_smart_proxy.proxy.errors import BadRequest
from llama_smart_proxy.proxy.http.hosts import HOST

ANY = "*"
EXPOSED = f"X-Request-Id, Request-Id, Retry-After, {limits.EXPOSED}"
"""The response headers that scripts may read, besides those that the Fetch standard lists."""
PREFLIGHT_S = 600
"""Seconds that a browser may remember the answer to a preflight."""
_ORIGIN = re.compile(r"(?:([a-z][a-z0-9+.-]*)://)?([!-~]*)", re.IGNORECASE)
_LONGEST = 2048
"""Characters of an origin."""
_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
"""RFC 9110 5.6.2."""
_METHOD = "Access-Control-Request-Method"
_PREFLIGHT_VARY = "Access-Control-Request-Method, Access-Control-Request-Headers"
"""Besides `Origin`, which every response names."""
_SITE = "Sec-Fetch-Site"
_OWN_SITES = ("none", "same-origin")
"""The user's own doing, such as an address typed in; and a page of the proxy itself."""
READING = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that change nothing."""


class Pages(Enum):
    """Which web pages may use an endpoint."""

    ALL = "all"
    """It only reads what the proxy knows: a link to it does no harm, and scripts of foreign pages cannot read it."""
    ALLOWED = "allowed"
    """Those of `Origins.allow`, as it may start, stop or occupy something."""
    LOCAL = "local"
    """Those of this machine, also if others are configured, as it can run commands here."""


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

    def check(self, http: web.BaseRequest, pages: Pages) -> None:
        """Reject a request that comes from a page which may not use an endpoint for `pages`. Raises: BadRequest 403."""
        if pages is Pages.ALL and http.method in READING and not is_preflight(http):
            return
        if "Origin" in http.headers:
            origin = origin_of(http)
            served = is_page_here(origin) if pages is Pages.LOCAL else self.allow(origin)
        else:
            served = http.headers.get(_SITE, "none").lower() in _OWN_SITES
        if served:
            return
        hint = "" if pages is Pages.LOCAL else "; server.allow_origins lists those that may"
        raise BadRequest(f"pages of this origin may not do this{hint}", status=403, code="forbidden_origin")

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
    found = _origin(origin)
    if found is None:
        return False
    scheme = found[1]
    return is_page_here(origin) or (scheme is not None and scheme.lower() not in ("http", "https"))


def is_page_here(origin: str) -> bool:
    """Whether `origin` is a page that a server of this machine has sent."""
    found = _origin(origin)
    if found is None or (found[1] or "http").lower() not in ("http", "https"):
        return False
    host = HOST.fullmatch(found[2])
    return host is not None and _is_this_machine(host[1].lower())


def origin_of(http: web.BaseRequest) -> str:
    """The value of all its `Origin` headers, which should be one."""
    return ", ".join(http.headers.getall("Origin"))


def _origin(text: str) -> re.Match[str] | None:
    return _ORIGIN.fullmatch(text) if len(text) <= _LONGEST else None


def _is_this_machine(host: str) -> bool:
    """`localhost` and names below it, loopback addresses, and those that mean every address."""
    if is_loopback_name(host):
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
