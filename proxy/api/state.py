"""The state of the running proxy that all handlers share, and the key under which requests carry it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from aiohttp import web

from llama_smart_proxy.backends.feed import Feed
from llama_smart_proxy.proxy.api.conversations import Conversations
from llama_smart_proxy.proxy.config import Config
from llama_smart_proxy.proxy.http.running import Running
from llama_smart_proxy.proxy.middleware.afterwards import Afterwards
from llama_smart_proxy.proxy.middleware.chain import Chain
from llama_smart_proxy.proxy.models.inspection import Inspection
from llama_smart_proxy.proxy.models.router import Router
from llama_smart_proxy.proxy.store import Store
from llama_smart_proxy.proxy.stream.waiting import Waits


@dataclass(frozen=True, slots=True)
class Proxy:
    """The running proxy. `draining` is set as soon as the shutdown begins."""

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
    running: Running = field(default_factory=Running)

    @property
    def max_body_bytes(self) -> int:
        return self.config.server.max_body_mib * 2**20


PROXY = web.RequestKey("proxy", Proxy)
