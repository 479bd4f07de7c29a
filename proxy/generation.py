"""What one configuration makes: it is replaced as a whole when the configuration changes, and `Lasting` stays."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from llama_smart_proxy.backends.base import Provider, Services
from llama_smart_proxy.backends.feed import Feed
from llama_smart_proxy.backends.pool.launcher import PoolModel
from llama_smart_proxy.backends.pool.pool import Pool
from llama_smart_proxy.backends.weights.downloads import Downloads
from llama_smart_proxy.proxy.access.limits import Counters
from llama_smart_proxy.proxy.access.policy import Access
from llama_smart_proxy.proxy.api.conversations import Conversations
from llama_smart_proxy.proxy.api.dispatcher import Dispatcher
from llama_smart_proxy.proxy.api.endpoints import EndpointHandler
from llama_smart_proxy.proxy.api.reloads import Reloads
from llama_smart_proxy.proxy.api.routes import ROUTES
from llama_smart_proxy.proxy.api.state import Proxy
from llama_smart_proxy.proxy.chat import Observer
from llama_smart_proxy.proxy.config import Config
from llama_smart_proxy.proxy.fetching import Pages
from llama_smart_proxy.proxy.http.running import Running
from llama_smart_proxy.proxy.knowledge.base import Viewer
from llama_smart_proxy.proxy.knowledge.knowledge import Knowledge
from llama_smart_proxy.proxy.metrics import Metrics
from llama_smart_proxy.proxy.middleware.afterwards import Afterwards
from llama_smart_proxy.proxy.middleware.chain import Chain
from llama_smart_proxy.proxy.middleware.chats import Chats
from llama_smart_proxy.proxy.middleware.plugins import Plugins
from llama_smart_proxy.proxy.models.inspection import Inspection
from llama_smart_proxy.proxy.models.router import Router
from llama_smart_proxy.proxy.registry import Registry
from llama_smart_proxy.proxy.store import History, Store
from llama_smart_proxy.proxy.stream.waiting import Waits
from llama_smart_proxy.proxy.tracing import Tracing

LISTED_S = 3.0
"""Longest wait in seconds for new servers and folders to be listed before a new configuration applies."""


@dataclass(frozen=True, slots=True)
class Lasting:
    """What lives as long as the process, and is the same for all its generations."""

    store: Store
    history: History
    feed: Feed
    downloads: Downloads
    pool: Pool
    metrics: Metrics
    knowledge: Knowledge
    pages: Pages
    draining: asyncio.Event = field(default_factory=asyncio.Event)
    conversations: Conversations = field(default_factory=Conversations)
    running: Running = field(default_factory=Running)
    chats: Chats = field(default_factory=Chats)
    reloads: Reloads = field(default_factory=Reloads)
    counters: Counters = field(default_factory=Counters)
    tracing: Tracing | None = None

    @property
    def observers(self) -> list[Observer]:
        """Those of all requests."""
        traced = [self.tracing.observe] if self.tracing is not None else []
        return [self.history.observe, self.metrics.observe, *traced]


@dataclass(frozen=True, slots=True)
class Parts:
    """What takes long to make, and may be made in a thread: modules and agents are imported for it.

    Raises: ConfigError for missing agents or modules, and for invalid options of agents.
    """

    registry: Registry
    plugins: Plugins

    @classmethod
    def of(cls, config: Config, before: Generation | None = None) -> Parts:
        """Those of a configuration; what has not changed since the one `before` is the same."""
        registry = Registry.of(config, before.parts.registry if before is not None else None)
        return cls(registry, Plugins.of(config, before.parts.plugins if before is not None else None))


class Generation:
    """The models, agents and handlers of one configuration. A request keeps the generation that it began with."""

    def __init__(
        self,
        config: Config,
        parts: Parts,
        lasting: Lasting,
        latest: Callable[[], Proxy],
        before: Generation | None = None,
    ) -> None:
        self.config = config
        self.parts = parts
        self.plugins = parts.plugins
        known = {provider.section: provider for provider in before.providers} if before is not None else {}
        services = Services(lasting.downloads, lasting.pool, known.get)
        self.providers: list[Provider] = list(_created(parts.registry, config, services))
        self.router = Router(self.providers, config, lasting.downloads)
        self.proxy = Proxy(
            config,
            self.router,
            Chain(config, self.plugins, lasting.chats),
            lasting.store,
            Afterwards(),
            Inspection({**self.router.looks, "agents": self.plugins.problems}),
            Waits(config.server),
            lasting.feed,
            lasting.draining,
            lasting.conversations,
            lasting.reloads,
            lasting.running,
            lasting.history,
            latest,
            Access(config.server),
            lasting.metrics,
            pages=lasting.pages,
            library=lasting.knowledge.seen_by(Viewer()),
        )
        self.dispatcher = Dispatcher(self.proxy, [*parts.registry.observers, *lasting.observers], lasting.counters)
        self._add_routes(parts.registry)

    def _add_routes(self, registry: Registry) -> None:
        for method, path, handler, scope, pages, loads in ROUTES:
            self.dispatcher.add([method], path, handler, scope, pages=pages, loads=loads)
        for path, endpoint in registry.endpoints.items():
            handle = EndpointHandler(endpoint).handle
            self.dispatcher.add(endpoint.methods, path, handle, endpoint.scope, endpoint.dialect, loads=True)

    async def prepare(self) -> None:
        """Start its agents and list its models, before it applies, as no request may miss them."""
        self.dispatcher.hosts.learn_own()
        await self.plugins.start()
        await self.router.listed(LISTED_S)

    @property
    def pooled(self) -> Sequence[PoolModel]:
        """Its models in the pool."""
        return [model for provider in self.providers for model in provider.pooled()]

    async def start(self) -> None:
        """Start loading models that are to be loaded, and listing the models of servers."""
        self.proxy.history.configure(most=self.config.history.requests, days=self.config.history.days)
        await self.router.start()

    async def ended(self) -> None:
        """Return once no request, and nothing that runs after one, uses it."""
        await self.proxy.uses.ended()
        await self.proxy.afterwards.ended()

    async def close(self) -> None:
        """Stop its agents and close its connections, but for those that another generation has."""
        await self.proxy.inspection.close()
        await self.proxy.afterwards.close()
        await self.plugins.close()
        await self.router.close()


def _created(registry: Registry, config: Config, services: Services) -> Iterator[Provider]:
    for cls in registry.providers:
        if (provider := cls.create(config, services)) is not None:
            yield provider
