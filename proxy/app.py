"""Assembles the proxy from a configuration."""

from __future__ import annotations

import os

from llama_smart_proxy.backends.base import Services
from llama_smart_proxy.backends.feed import Feed
from llama_smart_proxy.backends.pool.load_times import LoadTimes
from llama_smart_proxy.backends.pool.pool import Pool
from llama_smart_proxy.backends.weights.downloads import Downloads
from llama_smart_proxy.proxy.api.dispatcher import Dispatcher
from llama_smart_proxy.proxy.api.endpoints import EndpointHandler
from llama_smart_proxy.proxy.api.routes import ROUTES
from llama_smart_proxy.proxy.api.state import Proxy
from llama_smart_proxy.proxy.config import Config
from llama_smart_proxy.proxy.middleware.afterwards import Afterwards
from llama_smart_proxy.proxy.middleware.chain import Chain
from llama_smart_proxy.proxy.middleware.plugins import Plugins
from llama_smart_proxy.proxy.models.inspection import Inspection
from llama_smart_proxy.proxy.models.router import Router
from llama_smart_proxy.proxy.registry import Registry
from llama_smart_proxy.proxy.store import ProxyMemory, Store, state_dir
from llama_smart_proxy.proxy.stream.waiting import Waits


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
        for method, path, handler, scope, pages in ROUTES:
            self.dispatcher.add([method], path, handler, scope, pages=pages)
        for path, endpoint in registry.endpoints.items():
            handle = EndpointHandler(endpoint).handle
            self.dispatcher.add(endpoint.methods, path, handle, endpoint.scope, endpoint.dialect)

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
