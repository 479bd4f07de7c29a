"""The proxy: what lives as long as the process, and the generation of the current configuration."""

from __future__ import annotations

import os
from collections.abc import Awaitable
from typing import Any

from aiohttp import web

from llama_smart_proxy.backends.feed import Feed
from llama_smart_proxy.backends.pool.load_times import LoadTimes
from llama_smart_proxy.backends.pool.pool import Pool
from llama_smart_proxy.backends.weights.downloads import Downloads
from llama_smart_proxy.proxy.api.state import Proxy
from llama_smart_proxy.proxy.config import Config
from llama_smart_proxy.proxy.dialects import Dialect
from llama_smart_proxy.proxy.generation import Generation, Lasting
from llama_smart_proxy.proxy.store import History, ProxyMemory, Store, state_dir


class App:
    """Answers requests, each by the generation that is current when it begins, between `start` and `close`.

    Raises: as `Generation`.
    """

    def __init__(self, config: Config) -> None:
        url = config.store.get_secret_value() if config.store is not None else ""
        store = Store(state_dir(config.state_dir, os.environ), url)
        history = History(store, most=config.history.requests, days=config.history.days)
        feed = Feed()
        downloads = Downloads(feed)
        pool = Pool(config.server_pool, downloads, LoadTimes(feed, ProxyMemory(store)))
        self.lasting = Lasting(store, history, feed, downloads, pool)
        self.generation = Generation(config, self.lasting, lambda: self.proxy)

    @property
    def proxy(self) -> Proxy:
        """What the requests that begin now carry."""
        return self.generation.proxy

    def __call__(self, http: Any) -> Awaitable[web.StreamResponse]:
        """Answer a request."""
        return self.generation.dispatcher(http)

    def dialect_of(self, path: str) -> Dialect:
        """The API in which errors are reported at `path`."""
        return self.generation.dispatcher.dialect_of(path)

    async def start(self) -> None:
        """Open the store, clear away what an earlier run left behind, and start the generation."""
        if self.proxy.config.state_dir is not None or "STATE_DIRECTORY" in os.environ:
            await self.lasting.store.open()
        await self.lasting.pool.start()
        await self.generation.start()

    async def close(self) -> None:
        """Stop agents, processes and connections."""
        await self.lasting.conversations.close()
        await self.generation.close()
        self.lasting.store.close()
        await self.stop_models()

    async def stop_models(self) -> None:
        """Cancel all downloads, stop all processes and close the connections to servers; may be called repeatedly."""
        await self.lasting.pool.close(drain_s=0)
        await self.generation.router.close()
