"""Puts the pieces together: configuration in, an aiohttp application out."""

from __future__ import annotations

from collections.abc import AsyncIterator

from aiohttp import web
from aiohttp.typedefs import Handler

from backends.pool import Pool
from proxy.admin import health
from proxy.config import Config
from proxy.handlers import PROXY, SLOT_ACTION, Proxy, RelayHandler, list_models, load_model, show_model, unload_model
from proxy.router import Router


def build_app(config: Config) -> web.Application:
    """The application for `config`: every endpoint but the relayed ones, which `proxy.frontier` serves itself.

    Its pool and router live from start-up to clean-up of the application.
    """
    app = web.Application(client_max_size=config.server.max_body_mib * 2**20)
    pool = Pool(config)
    proxy = app[PROXY] = Proxy(config, Router(config, pool))

    async def backends(app: web.Application) -> AsyncIterator[None]:
        await pool.start()
        proxy.router.start()
        yield
        await proxy.router.close()
        await pool.close(drain_s=0)

    app.cleanup_ctx.append(backends)
    _add_routes(app, proxy)
    return app


def _add_routes(app: web.Application, proxy: Proxy) -> None:
    _add(app, "GET", "/health", health)
    _add(app, "GET", "/v1/models", list_models)
    _add(app, "GET", "/models", list_models)
    _add(app, "POST", "/models/load", load_model)
    _add(app, "POST", "/models/unload", unload_model)
    _add(app, "POST", r"/slots/{id:\d+}", RelayHandler(SLOT_ACTION, proxy).handle)
    app.router.add_get("/v1/models/{id:.+}", show_model)


def _add(app: web.Application, method: str, path: str, handler: Handler) -> None:
    """With and without a trailing slash: both were documented, and a redirect would turn a POST into a GET."""
    for variant in (path, f"{path}/"):
        app.router.add_route(method, variant, handler)
        if method == "GET":
            app.router.add_route("HEAD", variant, handler)
