"""Puts the pieces together: configuration in, an aiohttp application out."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import AsyncIterator
from itertools import count

from aiohttp import web
from aiohttp.typedefs import Handler
from backends.pool import Pool

from proxy import __version__
from proxy.admin import DRAINING, health
from proxy.config import Config
from proxy.dialects import OPENAI, Dialect
from proxy.errors import BadRequest, Overloaded, ProxyError
from proxy.handlers import (
    APIS,
    MODEL,
    PROXY,
    Proxy,
    RelayHandler,
    list_models,
    load_model,
    show_model,
    unload_model,
)
from proxy.ingress import REQUEST_ID, FrontConnection, check_request
from proxy.router import Router

logger = logging.getLogger(__name__)
access = logging.getLogger("proxy.access")

_run = secrets.token_hex(4)
_serial = count(1)


def build_app(config: Config) -> web.Application:
    """The application for `config`. Its pool and router live from start-up to clean-up of the application."""
    app = web.Application(middlewares=[frontier], client_max_size=config.server.max_body_mib * 2**20)
    pool = Pool(config)
    app[PROXY] = Proxy(config, Router(config, pool))
    app[DRAINING] = [False]

    async def backends(app: web.Application) -> AsyncIterator[None]:
        await pool.start()
        for remote in app[PROXY].router.remotes:
            _ = remote.models  # asking makes it fetch its list
        yield
        await app[PROXY].router.close()
        await pool.close(drain_s=0)

    app.cleanup_ctx.append(backends)
    _add_routes(app)
    return app


def _add_routes(app: web.Application) -> None:
    for path, api in APIS.items():
        handler = RelayHandler(api).handle
        for method in api.methods:
            _add(app, method, path, handler)
    _add(app, "GET", "/health", health)
    _add(app, "GET", "/v1/models", list_models)
    _add(app, "GET", "/models", list_models)
    _add(app, "POST", "/models/load", load_model)
    _add(app, "POST", "/models/unload", unload_model)
    app.router.add_get("/v1/models/{id:.+}", show_model)


def _add(app: web.Application, method: str, path: str, handler: Handler) -> None:
    """With and without a trailing slash: both were documented, and a redirect would turn a POST into a GET."""
    for variant in (path, f"{path}/"):
        app.router.add_route(method, variant.replace("{id}", r"{id:\d+}"), handler)


@web.middleware
async def frontier(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The border every request crosses: head checks, request id, errors in the caller's dialect, one access line."""
    started = time.monotonic()
    if isinstance(request.protocol, FrontConnection):
        request.protocol.head_complete()
    request_id = f"{_run}-{next(_serial):x}"
    request[REQUEST_ID] = request_id
    try:
        check_request(request)
        if request.app[DRAINING][0] and request.path != "/health":
            raise Overloaded("the proxy is shutting down", code="shutting_down", retry_after_s=5)
        response = await handler(request)
    except BaseException as exc:
        response = failed(request, exc)
    if not response.prepared:
        response.headers["X-Request-Id"] = request_id
        response.headers["Server"] = f"llama-smart-proxy/{__version__}"
    if access.isEnabledFor(logging.INFO):
        spent_ms = (time.monotonic() - started) * 1000
        model = request.get(MODEL, "-")
        access.info(
            "%s %s %d model=%s %.0f ms %s", request.method, request.path, response.status, model, spent_ms, request_id
        )
    return response


def failed(http: web.Request, exc: BaseException) -> web.StreamResponse:
    """The answer to a request that raised, or the exception again where there is nobody to answer."""
    if not isinstance(exc, Exception) or isinstance(exc, ConnectionError) or http.writer.output_size > 0:
        raise exc
    close = False
    if isinstance(exc, web.HTTPException):
        close = True
        exc = BadRequest(_http_error_text(exc), status=exc.status, code="not_found" if exc.status == 404 else None)
    elif not isinstance(exc, ProxyError):
        logger.exception("unhandled error in %s %s", http.method, http.path, exc_info=exc)
        exc = ProxyError("internal error; the proxy's log has the details")
    elif isinstance(exc, BadRequest):
        close = not http.content.at_eof() or exc.status in (400, 431, 501, 505)
    dialect = _dialect_of(http)
    response = web.Response(status=exc.status, body=dialect.error_body(exc), content_type="application/json")
    if exc.retry_after_s is not None:
        response.headers["Retry-After"] = str(exc.retry_after_s)
    if close:
        response.force_close()
    return response


def _dialect_of(http: web.Request) -> Dialect:
    api = APIS.get(http.path.rstrip("/"))
    return api.dialect if api else OPENAI


def _http_error_text(exc: web.HTTPException) -> str:
    if isinstance(exc, web.HTTPNotFound):
        return "there is no such endpoint"
    if isinstance(exc, web.HTTPMethodNotAllowed):
        return f"this endpoint takes {' or '.join(sorted(exc.allowed_methods))}"
    return exc.reason
