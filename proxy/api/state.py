"""The state of the running proxy that all handlers share, and the key under which requests carry it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

from aiohttp import web

from llama_smart_proxy.backends.feed import Feed
from llama_smart_proxy.proxy.access.grants import ALL, Grant
from llama_smart_proxy.proxy.api.conversations import Conversations
from llama_smart_proxy.proxy.config import Config
from llama_smart_proxy.proxy.middleware.afterwards import Afterwards
from llama_smart_proxy.proxy.middleware.chain import Chain
from llama_smart_proxy.proxy.models.inspection import Inspection
from llama_smart_proxy.proxy.models.router import Router
from llama_smart_proxy.proxy.store import Store
from llama_smart_proxy.proxy.stream.waiting import Waits


@dataclass(frozen=True, slots=True)
class Proxy:
    """The running proxy, as the clients with `grant` see it. `draining` is set as soon as the shutdown begins."""

    config: Config
    router: Router
    chain: Chain
    store: Store
    afterwards: Afterwards
    inspection: Inspection
    waits: Waits
    feed: Feed
    draining: asyncio.Event = field(default_factory=asyncio.Event)
    conversations: Conversations = field(default_factory=Conversations)

    grant: Grant = ALL

    def seen_by(self, grant: Grant) -> Proxy:
        """The same proxy for the clients that have this grant: with the models and agents that exist for them."""
        router, chain = self.router.limited(grant.permit), self.chain.limited(grant.agents)
        return replace(self, grant=grant, router=router, chain=chain)

    def own_chat(self, chat: str) -> str:
        """The id of a client's resumable stream at the model's server: those of another key are others."""
        return f"{self.grant.client}:{chat}" if self.grant.client else chat

    @property
    def max_body_bytes(self) -> int:
        return self.config.server.max_body_mib * 2**20


PROXY = web.RequestKey("proxy", Proxy)
