"""The state of the running proxy that all handlers share, and the key under which requests carry it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from aiohttp import web

from llama_smart_proxy.backends.feed import Feed
from llama_smart_proxy.proxy.access.grants import ALL, Grant
from llama_smart_proxy.proxy.access.policy import Access
from llama_smart_proxy.proxy.api.conversations import Conversations
from llama_smart_proxy.proxy.api.reloads import Reloads
from llama_smart_proxy.proxy.config import Config
from llama_smart_proxy.proxy.fetching import Pages
from llama_smart_proxy.proxy.http.running import Running
from llama_smart_proxy.proxy.knowledge.library import Library
from llama_smart_proxy.proxy.metrics import Metrics
from llama_smart_proxy.proxy.middleware.afterwards import Afterwards
from llama_smart_proxy.proxy.middleware.chain import Chain
from llama_smart_proxy.proxy.models.inspection import Inspection
from llama_smart_proxy.proxy.models.router import Router
from llama_smart_proxy.proxy.store import History, Store
from llama_smart_proxy.proxy.stream.waiting import Waits


class Uses:
    """The requests that use what one configuration has made."""

    def __init__(self) -> None:
        self._count = 0
        self._none = asyncio.Event()
        self._none.set()

    def begin(self) -> None:
        """A request begins."""
        self._count += 1
        if self._count == 1:
            self._none.clear()

    def end(self, http: web.BaseRequest) -> None:
        """A request has ended, or uses nothing any more that the configuration has made, such as a stream of events
        watched for days; then its handler calls this, and looks for models and agents in `Proxy.latest()`."""
        if ENDED in http:
            return
        http[ENDED] = True
        self._count -= 1
        if not self._count:
            self._none.set()

    async def ended(self) -> None:
        """Return once no request uses it."""
        await self._none.wait()


ENDED = web.RequestKey("ended", bool)


@dataclass(frozen=True, slots=True)
class Proxy:
    """The running proxy with one configuration, as the clients with `grant` see it. `draining` is set as soon as the
    shutdown begins."""

    config: Config
    router: Router
    chain: Chain
    store: Store
    afterwards: Afterwards
    inspection: Inspection
    waits: Waits
    feed: Feed
    draining: asyncio.Event
    conversations: Conversations
    reloads: Reloads
    running: Running
    history: History
    latest: Callable[[], Proxy]
    """The one of the current configuration, for requests that outlive theirs."""
    access: Access
    metrics: Metrics
    uses: Uses = field(default_factory=Uses)
    grant: Grant = ALL
    library: Library | None = None
    """The knowledge base, as the clients with `grant` see it."""
    pages: Pages | None = None
    """Pages that web searches find."""

    def seen_by(self, grant: Grant) -> Proxy:
        """The same proxy for the clients that have this grant: with the models and agents that exist for them. The
        `latest` one is seen by what has become of the grant."""
        router, chain = self.router.limited(grant.permit), self.chain.limited(grant.agents)

        def latest() -> Proxy:
            now = self.latest()
            return now.seen_by(now.access.successor(grant))

        library = self.library.seen_by(grant.viewer) if self.library is not None else None
        return replace(self, grant=grant, router=router, chain=chain, latest=latest, library=library)

    @property
    def goes_on(self) -> bool:
        """Whether a client that watches something may go on: until the shutdown, or until a configuration without its
        key or that key's scopes."""
        return not self.draining.is_set() and self.grant.scopes <= self.latest().grant.scopes

    def own_chat(self, chat: str) -> str:
        """The id of a client's resumable stream at the model's server: those of another key are others."""
        return f"{self.grant.client}:{chat}" if self.grant.client else chat

    @property
    def max_body_bytes(self) -> int:
        return self.config.server.max_body_mib * 2**20


PROXY = web.RequestKey("proxy", Proxy)
