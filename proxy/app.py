"""Assembles the proxy from a configuration."""

from __future__ import annotations

import os

from llama_smart_proxy.backends.base import Services
from llama_smart_proxy.backends.feed import Feed
from llama_smart_proxy.backends.pool.load_times import LoadTimes
from llama_smart_proxy.backends.pool.pool import Pool
from llama_smart_proxy.backends.weights.downloads import Downloads
from llama_smart_proxy.proxy.api import admin, llama_server, router_mode
from llama_smart_proxy.proxy.api import ollama as ollama_api
from llama_smart_proxy.proxy.api.dispatcher import Dispatcher, Handler
from llama_smart_proxy.proxy.api.endpoints import EndpointHandler
from llama_smart_proxy.proxy.api.models import list_models, show_model
from llama_smart_proxy.proxy.api.state import Proxy
from llama_smart_proxy.proxy.config import Config
from llama_smart_proxy.proxy.http.origins import Pages
from llama_smart_proxy.proxy.middleware.afterwards import Afterwards
from llama_smart_proxy.proxy.middleware.chain import Chain
from llama_smart_proxy.proxy.middleware.plugins import Plugins
from llama_smart_proxy.proxy.models.inspection import Inspection
from llama_smart_proxy.proxy.models.router import Router
from llama_smart_proxy.proxy.registry import Registry
from llama_smart_proxy.proxy.store import ProxyMemory, Store, state_dir
from llama_smart_proxy.proxy.stream.waiting import Waits

_BLOB = "/api/blobs/{digest:sha256:[0-9a-f]{64}}"
ROUTES: list[tuple[str, str, Handler]] = [
    ("GET", "/health", admin.health),
    ("GET", "/v1/health", admin.health),
    ("GET", "/plugins", admin.plugins_listed),
    ("GET", "/v1/models", list_models),
    ("GET", "/v1/models/{id:.+}", show_model),
    # Ollama's API, except for generation and embeddings
    ("GET", "/", ollama_api.root),
    ("GET", "/api/version", ollama_api.version),
    ("GET", "/api/tags", ollama_api.tags),
    ("GET", "/api/ps", ollama_api.ps),
    ("GET", "/api/status", ollama_api.status),
    ("POST", "/api/me", ollama_api.me),
    ("POST", "/api/show", ollama_api.show),
    ("POST", "/api/pull", ollama_api.pull),
    ("DELETE", "/api/delete", ollama_api.delete),
    ("POST", "/api/copy", ollama_api.change),
    ("POST", "/api/push", ollama_api.change),
    ("POST", "/api/create", ollama_api.change),
    ("POST", _BLOB, ollama_api.blob),
    ("HEAD", _BLOB, ollama_api.blob),
    # llama-server's router mode
    ("GET", "/models", list_models),
    ("POST", "/models", router_mode.download_model),
    ("DELETE", "/models", router_mode.delete_model),
    ("GET", "/models/sse", router_mode.model_events),
    ("POST", "/models/load", router_mode.load_model),
    ("POST", "/models/unload", router_mode.unload_model),
    # llama-server's other endpoints that are not simply relayed
    ("GET", "/props", llama_server.props),
    ("GET", "/metrics", llama_server.metrics),
    ("POST", "/lora-adapters", llama_server.set_lora_adapters),
    ("POST", "/v1/audio/transcriptions", llama_server.transcribe),
    ("POST", "/audio/transcriptions", llama_server.transcribe),
    ("GET", "/v1/stream", llama_server.resume_stream),
    ("DELETE", "/v1/stream", llama_server.stop_stream),
    ("POST", "/v1/streams/lookup", llama_server.find_streams),
    *((method, path, llama_server.use_tools) for path in ("/tools", "/mcp") for method in ("GET", "POST")),
    ("DELETE", "/mcp", llama_server.use_tools),
]
"""Routes that are not answered by a model; those are the registry's endpoints."""
_READERS = (admin.health, admin.plugins_listed, list_models, show_model, ollama_api.root, ollama_api.version)
_PAGES: dict[Handler, Pages] = {
    **dict.fromkeys((*_READERS, ollama_api.tags, ollama_api.ps, ollama_api.status), Pages.ALL),
    llama_server.use_tools: Pages.LOCAL,
}
"""The web pages that may use a route, if those are not the allowed ones."""


class App:
    """The proxy for one configuration. `dispatcher` answers requests between `start` and `close`.

    Raises: ConfigError for missing agents or modules, and for invalid options of agents.
    """

    def __init__(self, config: Config) -> None:
        registry = Registry.of(config)
        store = Store(state_dir(config.state_dir, os.environ))
        feed = Feed()
        downloads = Downloads(feed)
        self.pool = Pool(config.server_pool, downloads, LoadTimes(feed, ProxyMemory(store)))
        self.plugins = Plugins.of(config)
        services = Services(downloads, self.pool)
        providers = [provider for cls in registry.providers if (provider := cls.create(config, services)) is not None]
        router, chain = Router(providers, config, downloads), Chain(config, self.plugins)
        inspection = Inspection({**router.looks, "agents": self.plugins.problems})
        afterwards, waits = Afterwards(self.plugins), Waits(config.server)
        self.proxy = Proxy(config, router, chain, store, afterwards, inspection, waits, feed)
        self.dispatcher = Dispatcher(self.proxy, registry.observers)
        for method, path, handler in ROUTES:
            self.dispatcher.add([method], path, handler, pages=_PAGES.get(handler, Pages.ALLOWED))
        for path, endpoint in registry.endpoints.items():
            handle = EndpointHandler(endpoint, self.proxy).handle
            self.dispatcher.add(endpoint.methods, path, handle, endpoint.dialect)

    async def start(self) -> None:
        """Start loading models marked `preload`, and listing the models of servers."""
        self.dispatcher.hosts.learn_own()
        if self.proxy.config.state_dir is not None or "STATE_DIRECTORY" in os.environ:
            await self.proxy.store.open()
        await self.proxy.router.start()
        await self.plugins.start()

    async def close(self) -> None:
        """Stop agents, processes and connections."""
        await self.proxy.inspection.close()
        await self.proxy.conversations.close()
        await self.proxy.afterwards.close()
        await self.plugins.close()
        self.proxy.store.close()
        await self.proxy.router.close()
