"""What one configuration makes: it is replaced as a whole when the configuration changes, and `Lasting` stays."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from llama_smart_proxy.backends.base import Services
from llama_smart_proxy.backends.feed import Feed
from llama_smart_proxy.backends.pool.pool import Pool
from llama_smart_proxy.backends.weights.downloads import Downloads
from llama_smart_proxy.proxy.api.conversations import Conversations
from llama_smart_proxy.proxy.api.dispatcher import Dispatcher
from llama_smart_proxy.proxy.api.endpoints import EndpointHandler
from llama_smart_proxy.proxy.api.routes import ROUTES
from llama_smart_proxy.proxy.api.state import Proxy
from llama_smart_proxy.proxy.config import Config
from llama_smart_proxy.proxy.http.running import Running
from llama_smart_proxy.proxy.middleware.afterwards import Afterwards
from llama_smart_proxy.proxy.middleware.chain import Chain
from llama_smart_proxy.proxy.middleware.chats import Chats
from llama_smart_proxy.proxy.middleware.plugins import Plugins
from llama_smart_proxy.proxy.models.inspection import Inspection
from llama_smart_proxy.proxy.models.router import Router
from llama_smart_proxy.proxy.registry import Registry
from llama_smart_proxy.proxy.store import History, Store
from llama_smart_proxy.proxy.stream.waiting import Waits


@dataclass(frozen=True, slots=True)
class Lasting:
    """What lives as long as the process, and is the same for all its generations."""

    store: Store
    history: History
    feed: Feed
    downloads: Downloads
    pool: Pool
    draining: asyncio.Event = field(default_factory=asyncio.Event)
    conversations: Conversations = field(default_factory=Conversations)
    running: Running = field(default_factory=Running)
    chats: Chats = field(default_factory=Chats)


class Generation:
    """The models, agents and handlers of one configuration. A request keeps the generation that it began with.

    Raises: ConfigError for missing agents or modules, and for invalid options of agents.
    """

    def __init__(self, config: Config, lasting: Lasting, latest: Callable[[], Proxy]) -> None:
        self.config = config
        registry = Registry.of(config)
        self.plugins = Plugins.of(config)
        services = Services(lasting.downloads, lasting.pool)
        created = [provider.create(config, services) for provider in registry.providers]
        self.router = Router([provider for provider in created if provider is not None], config, lasting.downloads)
        self.proxy = Proxy(
            config,
            self.router,
            Chain(config, self.plugins, lasting.chats),
            lasting.store,
            Afterwards(self.plugins),
            Inspection({**self.router.looks, "agents": self.plugins.problems}),
            Waits(config.server),
            lasting.feed,
            lasting.draining,
            lasting.conversations,
            lasting.running,
            lasting.history,
            latest,
        )
        lasting.history.configure(most=config.history.requests, days=config.history.days)
        self.dispatcher = Dispatcher(self.proxy, [*registry.observers, lasting.history.observe])
        for method, path, handler, scope, pages in ROUTES:
            self.dispatcher.add([method], path, handler, scope, pages=pages)
        for path, endpoint in registry.endpoints.items():
            handle = EndpointHandler(endpoint).handle
            self.dispatcher.add(endpoint.methods, path, handle, endpoint.scope, endpoint.dialect)

    async def start(self) -> None:
        """Start loading models marked `preload`, and listing the models of servers."""
        self.dispatcher.hosts.learn_own()
        await self.router.start()
        await self.plugins.start()

    async def close(self) -> None:
        """Stop its agents and close its connections."""
        await self.proxy.inspection.close()
        await self.proxy.afterwards.close()
        await self.plugins.close()
        await self.router.close()
