"""The entry and exit point of every request: its record, its handler, its errors."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from aiohttp import web

from llama_smart_proxy.backends.names import LONGEST_NAME
from llama_smart_proxy.backends.openai import OUR_VIA
from llama_smart_proxy.proxy.access.limits import Counters, Limits, Visit
from llama_smart_proxy.proxy.access.policy import CHALLENGE
from llama_smart_proxy.proxy.api.state import PROXY, Proxy
from llama_smart_proxy.proxy.chat import Observer, RequestRecord
from llama_smart_proxy.proxy.dialects import OPENAI, Dialect, dialect_of, dialect_of_client
from llama_smart_proxy.proxy.errors import AccessDenied, BadRequest, Overloaded, ProxyError, let_go
from llama_smart_proxy.proxy.http.coding import ACCEPTED
from llama_smart_proxy.proxy.http.headers import EXTRA, PARAMS, RECORD, named_in, own_headers, request_id_of, shown_path
from llama_smart_proxy.proxy.http.hosts import Hosts
from llama_smart_proxy.proxy.http.origins import READING, Origins, Pages, is_preflight, origin_of, preflight
from llama_smart_proxy.proxy.http.scopes import Scope
from llama_smart_proxy.proxy.http.server import AMBIGUOUS, TOO_LARGE, FrontConnection, check_request

logger = logging.getLogger(__name__)

VISIT = web.RequestKey("visit", Visit)
"""The visit of a client whose key has limits."""
Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
_PART = re.compile(r"\{(\w+)(?::([^{}]+(?:\{[\d,]+\}[^{}]*)?))?\}")


@dataclass(slots=True)
class Resource:
    """The handlers of one path, the scopes that they require, and the web pages that may call them, by method.
    `dialect` is the API in which errors are reported there; requests of `counted` methods count for limits."""

    dialect: Dialect = OPENAI
    handlers: dict[str, Handler] = field(default_factory=dict)
    scopes: dict[str, Scope] = field(default_factory=dict)
    pages: dict[str, Pages] = field(default_factory=dict)
    counted: set[str] = field(default_factory=set)


class Dispatcher:
    """Checks the head of each request, creates its record, calls its handler, reports errors in the client's API, and
    passes the record to the observers when the request has ended.

    Paths match with and without a trailing slash: both were documented, and a redirect would turn a POST into a GET.
    `counters` are those of earlier configurations, whose counts go on. A path parameter, `{name}` or `{name:pattern}`,
    is stored in `PARAMS` of the request.
    """

    def __init__(self, proxy: Proxy, observers: Iterable[Observer] = (), counters: Counters | None = None) -> None:
        self._proxy = proxy
        self._counters = counters or Counters()
        self._running = proxy.running.requests
        self._observers = list(observers)
        self._exact: dict[str, Resource] = {}
        self._patterns: list[tuple[re.Pattern[str], Resource]] = []
        server = proxy.config.server
        self.hosts = Hosts([*server.allow_hosts, server.host])
        self._origins = Origins(server.allow_origins)
        self._seen_by = {grant: proxy.seen_by(grant) for grant in proxy.access.grants}
        self._run = secrets.token_hex(4)
        self._serial = count(1)

    def add(
        self,
        methods: Iterable[str],
        path: str,
        handler: Handler,
        scope: Scope,
        dialect: Dialect | None = None,
        pages: Pages = Pages.ALLOWED,
        *,
        loads: bool = False,
    ) -> None:
        """Serve `path` with `handler` to clients with `scope` and to these web pages; GET includes HEAD. `loads`: also
        what only reads there can load a model, and so counts for the limits of keys."""
        plain = path.rstrip("/")
        resource = self._exact.get(path)
        if resource is None:
            resource = Resource(dialect or dialect_of(path))
            self._exact[path] = self._exact[f"{plain}/"] = resource
            if "{" in path:
                self._patterns.append((_pattern(plain), resource))
        for method in [*methods, *(["HEAD"] if "GET" in methods else [])]:
            resource.handlers[method] = handler
            resource.scopes[method] = scope
            resource.pages[method] = pages
            if loads or method not in READING:
                resource.counted.add(method)

    def table(self) -> Iterator[tuple[str, str, Scope, Pages]]:
        """Every route: its method, path, scope and pages."""
        for path, resource in self._exact.items():
            if path == "/" or not path.endswith("/"):
                yield from ((name, path, scope, resource.pages[name]) for name, scope in resource.scopes.items())

    def dialect_of(self, path: str) -> Dialect:
        """The API in which errors are reported at `path`."""
        resource = self._find(path)
        return resource.dialect if resource is not None else dialect_of(path)

    async def __call__(self, http: Any) -> web.StreamResponse:
        request_id = request_id_of(http.headers) or f"{self._run}-{next(self._serial):x}"
        record = RequestRecord(time.monotonic(), request_id=request_id, method=http.method)
        http[RECORD] = record
        self._proxy.uses.begin()
        if isinstance(http.protocol, FrontConnection):
            http.protocol.head_complete()
        running, task = self._running, asyncio.current_task()
        running[task] = http
        response: web.StreamResponse | None = None
        try:
            response = await self._answer(http)
            return response
        finally:
            del running[task]
            record.ended_s = time.monotonic()
            record.path = shown_path(http)
            # 499: the client left before its answer was complete
            record.status = response.status if response is not None else record.answered or 499
            if record.client and VISIT in http:
                http[VISIT].leave(record, http.content.total_bytes)
            for observe in self._observers:
                self._notify(observe, record)
            self._proxy.uses.end(http)

    def _notify(self, observe: Observer, record: RequestRecord) -> None:
        try:
            observe(record)
        except Exception as exc:  # an observer's failure must not affect the client
            logger.error("an observer of requests failed", exc_info=exc)

    async def _answer(self, http: web.BaseRequest) -> web.StreamResponse:
        resource = self._find(http.path, http)
        dialect = resource.dialect if resource is not None else dialect_of(http.path)
        dialect = dialect_of_client(dialect, http.path, http.headers)
        http[RECORD].api = dialect.name
        http[EXTRA] = named_in(http, dialect.id_headers)
        try:
            if "Origin" in http.headers:
                http[EXTRA] += self._origins.headers(origin_of(http))
            check_request(http)
            if (host := http.headers.get("Host")) is not None:
                self.hosts.check(host)
            if "Via" in http.headers:
                _check_loop(http)
            if "Origin" in http.headers or "Sec-Fetch-Site" in http.headers:
                self._origins.check(http, _pages(http, resource))
            response = await self._handler(http, resource, dialect)(http)
            if not response.prepared and isinstance(response, web.Response):
                response.headers.extend(own_headers(http))
            return response
        except BaseException as exc:
            try:
                return _failed(http, exc, dialect)
            finally:
                let_go(exc)

    def _handler(self, http: web.BaseRequest, resource: Resource | None, dialect: Dialect) -> Handler:
        """What answers `http`, whose client may use it. Raises: Overloaded while shutting down; BadRequest 404;
        HTTPMethodNotAllowed; AccessDenied; Overloaded 429 for a key at its limit."""
        if is_preflight(http):
            return preflight
        if self._proxy.draining.is_set() and http.path != "/health":
            raise Overloaded("the proxy is shutting down", code="shutting_down", retry_after_s=5)
        if resource is None:
            raise BadRequest("there is no such endpoint", status=404, code="not_found")
        handler = resource.handlers.get(http.method)
        if handler is None:
            raise web.HTTPMethodNotAllowed(http.method, resource.handlers)
        grant = self._proxy.access.admit(http, resource.scopes[http.method])
        http[PROXY] = self._seen_by[grant]
        if grant.limits is not None:
            self._enter(http, grant.client, grant.limits, dialect, counts=http.method in resource.counted)
        return handler

    def _enter(self, http: web.BaseRequest, client: str, limits: Limits, dialect: Dialect, *, counts: bool) -> None:
        """The visit of a key with limits, which counts or is only told what is left. Raises: Overloaded 429."""
        visit = http[VISIT] = self._counters.visit(client, limits)
        try:
            if counts:
                visit.enter()
        finally:
            http[EXTRA] += dialect.limit_headers(visit.allowances())

    def _find(self, path: str, http: web.BaseRequest | None = None) -> Resource | None:
        """The resource at `path`; its parameters are stored in `http`."""
        resource = self._exact.get(path)
        if resource is not None:
            return resource
        path = path.rstrip("/")
        for pattern, resource in self._patterns:
            found = pattern.fullmatch(path)
            if found is not None and all(len(value) <= LONGEST_NAME for value in found.groupdict().values()):
                if http is not None:
                    http[PARAMS] = found.groupdict()
                return resource
        return None


def _pattern(path: str) -> re.Pattern[str]:
    """`/a/{name:.+}` as a regular expression, in which digits and words are ASCII."""
    pattern, position = "", 0
    for part in _PART.finditer(path):
        pattern += re.escape(path[position : part.start()]) + f"(?P<{part[1]}>{part[2] or '[^/]+'})"
        position = part.end()
    return re.compile(pattern + re.escape(path[position:]), re.ASCII)


def _pages(http: web.BaseRequest, resource: Resource | None) -> Pages:
    """The web pages that may send `http`, or the request that a preflight announces."""
    if resource is None:
        return Pages.ALL
    method = http.headers["Access-Control-Request-Method"] if is_preflight(http) else http.method
    return resource.pages.get(method, Pages.ALLOWED)


def _check_loop(http: web.BaseRequest) -> None:
    """Reject a request that loops back to this proxy. Raises: BadRequest 508."""
    if OUR_VIA in ",".join(http.headers.getall("Via")):
        message = "this request has looped: this proxy is among its own upstream servers"
        raise BadRequest(message, status=508, code="loop_detected")


def reported(http: web.BaseRequest, exc: Exception) -> ProxyError:
    """The error that the client of `http` gets for `exc`, which is logged if it is a fault of the proxy."""
    if isinstance(exc, web.HTTPException):
        return BadRequest(_http_error_text(exc), status=exc.status)
    if isinstance(exc, ProxyError):
        return exc
    logger.error("unhandled error in %s %s", http.method, shown_path(http), exc_info=exc)
    return ProxyError("internal error; the proxy's log has the details")


def _failed(http: web.BaseRequest, exc: BaseException, dialect: Dialect) -> web.StreamResponse:
    """The error response for `exc`. Raises: `exc` itself if no response can be sent any more."""
    if isinstance(exc, asyncio.CancelledError):
        exc = http[RECORD].cancellation(exc)
    if not isinstance(exc, Exception) or isinstance(exc, ConnectionError) or http.writer.output_size > 0:
        raise exc
    allow = exc.headers.get("Allow", "") if isinstance(exc, web.HTTPException) else ""
    exc = reported(http, exc)
    http[RECORD].error = exc.code
    response = web.Response(status=exc.status, body=dialect.error_body(exc), content_type="application/json")
    response.headers.extend(own_headers(http))
    if exc.retry_after_s is not None:
        response.headers["Retry-After"] = str(exc.retry_after_s)
    if allow:
        response.headers["Allow"] = allow
    if exc.status == 401 and isinstance(exc, AccessDenied):
        response.headers["WWW-Authenticate"] = CHALLENGE
    if exc.status == 415:
        response.headers["Accept-Encoding"] = ACCEPTED
    if exc.code in (AMBIGUOUS, TOO_LARGE, "shutting_down") or not http.content.is_eof():
        response.force_close()  # further input is unreliable, unwanted, or the rest of a large body
    return response


def _http_error_text(exc: web.HTTPException) -> str:
    if isinstance(exc, web.HTTPMethodNotAllowed):
        return f"this endpoint takes {' or '.join(sorted(exc.allowed_methods))}"
    return exc.reason
