"""The border that every request crosses, in and out."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from itertools import count
from typing import Any

from aiohttp import web

from llama_smart_proxy.backends.openai import OUR_VIA
from llama_smart_proxy.proxy.api.endpoints import APIS, RelayHandler
from llama_smart_proxy.proxy.api.state import MODEL, Proxy
from llama_smart_proxy.proxy.dialects import OLLAMA, OPENAI, Dialect
from llama_smart_proxy.proxy.errors import BadRequest, Overloaded, ProxyError
from llama_smart_proxy.proxy.http.headers import ANSWERED, REQUEST_ID, own_headers, shown, shown_path
from llama_smart_proxy.proxy.http.server import AMBIGUOUS, FrontConnection, check_request
from llama_smart_proxy.proxy.log import access

logger = logging.getLogger(__name__)


class Frontier:
    """Checks the head, gives a request id, finds the handler, puts errors into the caller's dialect, logs one line.

    The relayed endpoints are found in a table here; everything else goes to `other`, the aiohttp application. Its
    router and middlewares would take a fifth of the CPU time of a small relayed request.
    """

    def __init__(self, proxy: Proxy, other: Callable[[Any], Awaitable[web.StreamResponse]]) -> None:
        self._proxy = proxy
        self._other = other
        self._relays: dict[str, RelayHandler] = {}
        for path, api in APIS.items():
            self._relays[path] = self._relays[f"{path}/"] = RelayHandler(api, proxy)
        self._run = secrets.token_hex(4)
        self._serial = count(1)

    async def __call__(self, http: Any) -> web.StreamResponse:
        started = time.monotonic()
        if isinstance(http.protocol, FrontConnection):
            http.protocol.head_complete()
        http[REQUEST_ID] = f"{self._run}-{next(self._serial):x}"
        response: web.StreamResponse | None = None
        try:
            response = await self._answer(http)
            return response
        finally:
            if access.enabled:
                _log(http, response, time.monotonic() - started)

    async def _answer(self, http: web.Request) -> web.StreamResponse:
        try:
            check_request(http)
            if "Via" in http.headers or "Origin" in http.headers:
                _check_sender(http)
            if self._proxy.draining.is_set() and http.path != "/health":
                raise Overloaded("the proxy is shutting down", code="shutting_down", retry_after_s=5)
            relay = self._relays.get(http.path)
            if relay is None:
                response = await self._other(http)
                if not response.prepared:
                    response.headers.extend(own_headers(http))
                return response
            if http.method not in relay.api.methods:
                raise web.HTTPMethodNotAllowed(http.method, relay.api.methods)
            return await relay.handle(http)
        except BaseException as exc:
            return _failed(http, exc)


def _check_sender(http: web.Request) -> None:
    """Refuse a request that went round in a circle, and one that a web page of somebody else's has a browser make.

    Browsers tell by `Origin`. Pages on this machine may ask, and applications, whose scheme is their own; of what has a
    name in the network nobody knows whether the name is honest (DNS rebinding).

    Raises: BadRequest 508 and 403.
    """
    headers = http.headers
    if "Via" in headers and OUR_VIA in ",".join(headers.getall("Via")):
        words = "this request went round in a circle: this proxy is among its own upstream servers"
        raise BadRequest(words, status=508, code="loop_detected")
    if "Origin" in headers and http.method not in ("GET", "HEAD", "OPTIONS"):
        scheme, _, rest = headers["Origin"].partition("://")
        if scheme in ("http", "https", "null") and not _LOCAL_ORIGIN.fullmatch(rest):
            raise BadRequest("pages of other origins may not do this", status=403, code="forbidden_origin")


_LOCAL_ORIGIN = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?")


def _log(http: web.Request, response: web.StreamResponse | None, spent_s: float) -> None:
    """The access line. 499: the client left before its answer was complete."""
    status = response.status if response is not None else http.get(ANSWERED, 499)
    access.line(http.method, shown_path(http), status, shown(http.get(MODEL, "-")), spent_s, http[REQUEST_ID])


def _failed(http: web.Request, exc: BaseException) -> web.StreamResponse:
    """The answer to a request that raised, or the exception again where there is nobody to answer."""
    if not isinstance(exc, Exception) or isinstance(exc, ConnectionError) or http.writer.output_size > 0:
        raise exc
    allow = ""
    if isinstance(exc, web.HTTPException):
        allow = exc.headers.get("Allow", "")
        exc = BadRequest(_http_error_text(exc), status=exc.status, code="not_found" if exc.status == 404 else None)
    elif not isinstance(exc, ProxyError):
        logger.error("unhandled error in %s %s", http.method, shown_path(http), exc_info=exc)
        exc = ProxyError("internal error; the proxy's log has the details")
    dialect = _dialect_of(http)
    response = web.Response(status=exc.status, body=dialect.error_body(exc), content_type="application/json")
    response.headers.extend(own_headers(http))
    if exc.retry_after_s is not None:
        response.headers["Retry-After"] = str(exc.retry_after_s)
    if allow:
        response.headers["Allow"] = allow
    if exc.code == AMBIGUOUS or exc.code == "shutting_down" or not http.content.is_eof():
        response.force_close()  # what follows on this connection is in doubt, not wanted, or the rest of a large body
    return response


def _dialect_of(http: web.Request) -> Dialect:
    if http.path.startswith("/api/"):
        return OLLAMA
    api = APIS.get(http.path.rstrip("/"))
    return api.dialect if api else OPENAI


def _http_error_text(exc: web.HTTPException) -> str:
    if isinstance(exc, web.HTTPNotFound):
        return "there is no such endpoint"
    if isinstance(exc, web.HTTPMethodNotAllowed):
        return f"this endpoint takes {' or '.join(sorted(exc.allowed_methods))}"
    return exc.reason
