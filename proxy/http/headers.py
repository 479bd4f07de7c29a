"""Filters headers in both directions."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from email.utils import formatdate
from fnmatch import fnmatchcase
from functools import lru_cache
from urllib.parse import unquote_plus

from aiohttp import web
from multidict import MultiMapping

from llama_smart_proxy.proxy import __version__
from llama_smart_proxy.proxy.chat import RequestRecord

RECORD = web.RequestKey("record", RequestRecord)
"""The key of a request's record in the request itself."""
PARAMS = web.RequestKey("params", dict[str, str])
"""The path parameters of a request, if its pattern has any."""
EXTRA = web.RequestKey("extra", list[tuple[str, str]])
"""Headers of the response to a request besides those of every response."""
SERVER = f"llama-smart-proxy/{__version__}"

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@|~-]{1,128}")

HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""RFC 9110 7.6.1: meant for the next hop alone."""

CONVERSATION = "X-Conversation-Id"
"""Makes a stream of llama-server resumable: it generates to the end after its client has left, and another request with
the same id ends it. Sent on only to models that are configured for that. No other header has such an effect there.
Source: llama.cpp tools/server/server-stream.h, b11434."""

_NOT_UPSTREAM = HOP_BY_HOP | {
    "host",
    "http2-settings",  # part of an offer to the proxy, which `Connection` should name but may not
    "content-length",
    "content-type",  # the body is serialised anew, as JSON
    "content-encoding",
    "accept-encoding",
    "expect",
    "range",  # answers are generated, not stored: llama-server would generate one and then answer 416
    "if-range",
    "authorization",  # the client's credentials are for the proxy; the model server has its own
    "x-agents",  # names agents of this proxy; the next proxy has others
    "x-conversation-id",  # see `CONVERSATION`
}
_NOT_UPSTREAM_PREFIXES = ("proxy-", "sec-", "access-control-")

_CREDENTIALS = frozenset({"key", "keys", "jwt", "pass", "auth", "authorization", "credential", "credentials", "sig"})
_CREDENTIAL_ENDS = ("apikey", "token", "secret", "password", "passwd", "cookie", "cookie2", "signature", "assertion")
"""Parts, and ends of parts, of the names of headers and of parameters in a query that carry credentials."""
_NO_CREDENTIALS = frozenset({"idempotency-key", "x-idempotency-key"})
_PERSONAL = frozenset({"from", "origin", "referer", "forwarded"})
_PERSONAL_PREFIXES = ("x-forwarded-", "x-original-", "x-authentik-", "remote-", "x-remote-")
_PERSONAL_PARTS = frozenset(
    {"user", "users", "userid", "username", "email", "login", "account", "groups", "roles", "ip", "principal"}
    | {"identity", "authenticated", "tenant", "oidc", "iap"}
)
"""Parts of the names of headers in which a proxy, a log-in or a chat UI identifies the user."""


@lru_cache(maxsize=256)
def is_credential(name: str) -> bool:
    """Whether a header or a parameter of a query of that name (in lower case) carries a client's credentials."""
    found = any(part in _CREDENTIALS or part.endswith(_CREDENTIAL_ENDS) for part in _parts(name))
    return found and name not in _NO_CREDENTIALS


def _parts(name: str) -> list[str]:
    return name.replace("_", "-").replace(".", "-").split("-")


@lru_cache(maxsize=256)
def _is_sent(name: str, forwards: tuple[str, ...]) -> bool:
    """Whether a client's header of that name (in lower case) is sent to a server that gets those that match `forwards`
    in any case."""
    if name in _NOT_UPSTREAM or name.startswith(_NOT_UPSTREAM_PREFIXES):
        return False
    if any(fnmatchcase(name, pattern) for pattern in forwards):
        return True
    if name in _PERSONAL or name.startswith(_PERSONAL_PREFIXES) or is_credential(name):
        return False
    return name == "user-agent" or _PERSONAL_PARTS.isdisjoint(_parts(name))


_NOT_DOWNSTREAM = HOP_BY_HOP | {
    "content-length",
    "date",
    "server",
    "set-cookie",
    "set-cookie2",
    "alt-svc",
    "strict-transport-security",
    "www-authenticate",
    "x-request-id",
    "request-id",
}
_NOT_DOWNSTREAM_PREFIXES = ("access-control-", "proxy-")


def upstream_headers(
    client: MultiMapping[str], *, has_body: bool, forwards: tuple[str, ...] = ()
) -> list[tuple[str, str]]:
    """The client's headers to send to a model server: none with credentials, or about the user, but those that match
    `forwards` (patterns in lower case)."""
    named = client.getall("Connection", ())
    banned = _named_by_connection(",".join(named)) if named else frozenset()
    kept = [("Content-Type", "application/json")] if has_body else []
    for name, value in client.items():
        key = name.lower()
        if _is_sent(key, forwards) and key not in banned:
            kept.append((name, value))
    return kept


def upstream_query(query: str) -> str:
    """The query of a client's request to send to a model server: without credentials."""
    parts = query.split("&")
    return "&".join(part for part in parts if not is_credential(unquote_plus(part.partition("=")[0]).lower()))


def downstream_headers(upstream: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The headers of a model server (names in lower case) to send to the client."""
    kept = []
    banned: frozenset[str] = frozenset()
    for key, value in upstream:
        if key == "connection":
            banned |= _named_by_connection(value)
        elif key not in _NOT_DOWNSTREAM and not key.startswith(_NOT_DOWNSTREAM_PREFIXES):
            kept.append((key, value))
    return [pair for pair in kept if pair[0] not in banned] if banned else kept


def own_headers(http: web.BaseRequest) -> list[tuple[str, str]]:
    """The headers of the proxy in its response to `http`."""
    named = http[RECORD].request_id
    return [("server", SERVER), ("x-request-id", named), ("date", _date(int(time.time()))), *http[EXTRA]]


def named_in(http: web.BaseRequest, names: Iterable[str]) -> list[tuple[str, str]]:
    """The request's id in the headers `names`."""
    return [(name, http[RECORD].request_id) for name in names]


def request_id_of(headers: MultiMapping[str]) -> str | None:
    """The client's own id of a request, if it is safe in a header and in a log line."""
    given = headers.get("X-Request-Id")
    return given if given is not None and _REQUEST_ID.fullmatch(given) else None


def shown_path(http: web.BaseRequest) -> str:
    """The path for a log line: not decoded, as a line break in it would forge lines, and without the query."""
    return http.raw_path.partition("?")[0]


@lru_cache(maxsize=1)
def _date(seconds: int) -> str:
    return formatdate(seconds, usegmt=True)


def _named_by_connection(value: str) -> frozenset[str]:
    """`Connection: close, X-Secret` makes `X-Secret` hop-by-hop too."""
    if not value or value.lower() in ("keep-alive", "close"):
        return frozenset()
    return frozenset(name.strip().lower() for name in value.split(","))
