"""Puts the pieces together: configuration in, an aiohttp application out."""

from __future__ import annotations

from collections.abc import AsyncIterator

from aiohttp import web
from aiohttp.typedefs import Handler

from llama_smart_proxy.backends.base import Provider, Services
from llama_smart_proxy.backends.llamacpp.provider import LlamaCpp
from llama_smart_proxy.backends.ollama.provider import Ollama
from llama_smart_proxy.backends.openai import Remotes
from llama_smart_proxy.backends.pool.pool import Pool
from llama_smart_proxy.backends.weights.downloads import Downloads
from llama_smart_proxy.proxy.api import ollama, router_mode
from llama_smart_proxy.proxy.api.admin import health, plugins_listed
from llama_smart_proxy.proxy.api.endpoints import SLOT_ACTION, RelayHandler, list_models, show_model
from llama_smart_proxy.proxy.api.state import PROXY, Proxy
from llama_smart_proxy.proxy.config import Config
from llama_smart_proxy.proxy.middleware.chain import Chain
from llama_smart_proxy.proxy.middleware.plugins import Plugins
from llama_smart_proxy.proxy.models.router import Router

PROVIDERS: tuple[type[Provider], ...] = (LlamaCpp, Remotes, Ollama)
"""In the order in which a model is looked for."""

OLLAMA_ROUTES: list[tuple[str, str, Handler]] = [
    ("GET", "/", ollama.root),
    ("GET", "/api/version", ollama.version),
    ("GET", "/api/tags", ollama.tags),
    ("GET", "/api/ps", ollama.ps),
    ("POST", "/api/show", ollama.show),
    ("POST", "/api/pull", ollama.pull),
    ("DELETE", "/api/delete", ollama.delete),
    ("POST", "/api/copy", ollama.change),
    ("POST", "/api/push", ollama.change),
    ("POST", "/api/create", ollama.change),
    ("POST", "/api/blobs/{digest:sha256:[0-9a-f]{64}}", ollama.blob),
    ("HEAD", "/api/blobs/{digest:sha256:[0-9a-f]{64}}", ollama.blob),
]
"""The Ollama API, but for what is asked of a model: that is in `proxy.api.endpoints.APIS`."""

ROUTER_MODE_ROUTES: list[tuple[str, str, Handler]] = [
    ("GET", "/models", list_models),
    ("POST", "/models", router_mode.download_model),
    ("DELETE", "/models", router_mode.delete_model),
    ("GET", "/models/sse", router_mode.model_events),
    ("POST", "/models/load", router_mode.load_model),
    ("POST", "/models/unload", router_mode.unload_model),
]
"""llama-server's router mode."""


def build_app(config: Config) -> web.Application:
    """The application for `config`: every endpoint but the relayed ones, which `proxy.api.dispatcher` serves itself.

    The providers of its models live from start-up to clean-up of the application.
    """
    app = web.Application(client_max_size=config.server.max_body_mib * 2**20)
    downloads = Downloads()
    services = Services(downloads, Pool(config, downloads))
    providers = [provider for kind in PROVIDERS if (provider := kind.create(config, services)) is not None]
    plugins = Plugins.of(config)
    proxy = app[PROXY] = Proxy(config, Router(providers, config, downloads), Chain(config, plugins))

    async def backends(app: web.Application) -> AsyncIterator[None]:
        await proxy.router.start()
        await plugins.start()
        yield
        await plugins.close()
        await proxy.router.close()

    app.cleanup_ctx.append(backends)
    _add_routes(app, proxy)
    return app


def _add_routes(app: web.Application, proxy: Proxy) -> None:
    _add(app, "GET", "/health", health)
    _add(app, "GET", "/plugins", plugins_listed)
    _add(app, "GET", "/v1/models", list_models)
    _add(app, "POST", r"/slots/{id:\d+}", RelayHandler(SLOT_ACTION, proxy).handle)
    app.router.add_get("/v1/models/{id:.+}", show_model)
    for method, path, handler in (*OLLAMA_ROUTES, *ROUTER_MODE_ROUTES):
        _add(app, method, path, handler)


def _add(app: web.Application, method: str, path: str, handler: Handler) -> None:
    """With and without a trailing slash: both were documented, and a redirect would turn a POST into a GET."""
    for variant in dict.fromkeys((path, f"{path.rstrip('/')}/")):
        app.router.add_route(method, variant, handler)
        if method == "GET":
            app.router.add_route("HEAD", variant, handler)
