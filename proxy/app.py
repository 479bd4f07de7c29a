"""The proxy: what lives as long as the process, and the generation of the current configuration."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from aiohttp import web

from llama_smart_proxy.backends.feed import Feed
from llama_smart_proxy.backends.pool.load_times import LoadTimes
from llama_smart_proxy.backends.pool.pool import Pool
from llama_smart_proxy.backends.threads import log_failure, run_in_thread
from llama_smart_proxy.backends.weights.downloads import Downloads
from llama_smart_proxy.proxy.api.state import Proxy
from llama_smart_proxy.proxy.config import Config
from llama_smart_proxy.proxy.dialects import Dialect
from llama_smart_proxy.proxy.fetching import Fetcher, Pages
from llama_smart_proxy.proxy.generation import Generation, Lasting, Parts
from llama_smart_proxy.proxy.knowledge.knowledge import Knowledge
from llama_smart_proxy.proxy.knowledge.reading.reader import DocumentReader
from llama_smart_proxy.proxy.metrics import Metrics
from llama_smart_proxy.proxy.models.router import Router
from llama_smart_proxy.proxy.store import History, ProxyMemory, Store, state_dir
from llama_smart_proxy.proxy.stream.embedder import PoolEmbedder
from llama_smart_proxy.proxy.tracing import tracing_for

logger = logging.getLogger(__name__)


class App:
    """Answers requests, each by the generation that is current when it begins, between `start` and `close`.

    `followers` are called with each new configuration when it applies.

    Raises: ConfigError for missing agents or modules, and for invalid options of agents.
    """

    def __init__(self, config: Config) -> None:
        parts = Parts.of(config)
        url = config.store.get_secret_value() if config.store is not None else ""
        folder = state_dir(config.state_dir, os.environ)
        store = Store(folder, url)
        history = History(store, most=config.history.requests, days=config.history.days)
        feed = Feed()
        downloads = Downloads(feed)
        pool = Pool(config.server_pool, downloads, LoadTimes(feed, ProxyMemory(store)))
        metrics = Metrics(lambda name: any(model.name == name for model in self.proxy.router.models()), pool.totals)
        tracing = tracing_for(config, os.environ)
        knowledge = Knowledge(folder, url, config.knowledge, PoolEmbedder(self._models), DocumentReader())
        pages = Pages(Fetcher(), DocumentReader())
        self.lasting = Lasting(store, history, feed, downloads, pool, metrics, knowledge, pages, tracing=tracing)
        self.generation = Generation(config, parts, self.lasting, self._latest)
        self.followers: list[Callable[[Config], None]] = []
        self._ending: dict[Generation, asyncio.Task[None]] = {}

    @property
    def proxy(self) -> Proxy:
        """What the requests that begin now carry."""
        return self.generation.proxy

    @property
    def ending(self) -> int:
        """How many earlier configurations requests still use."""
        return len(self._ending)

    def _models(self) -> tuple[Config, Router]:
        return self.generation.config, self.generation.router

    def _latest(self) -> Proxy:
        return self.generation.proxy

    def __call__(self, http: Any) -> Awaitable[web.StreamResponse]:
        """Answer a request."""
        return self.generation.dispatcher(http)

    def dialect_of(self, path: str) -> Dialect:
        """The API in which errors are reported at `path`."""
        return self.generation.dispatcher.dialect_of(path)

    async def start(self) -> None:
        """Open the store, clear away what an earlier run left behind, and start the generation."""
        if self.proxy.config.state_dir is not None or "STATE_DIRECTORY" in os.environ or self.lasting.store.is_remote:
            self.lasting.store.begin(lambda sql: None)
        await self.lasting.pool.start()
        self.lasting.metrics.lag.watch()
        self.generation.dispatcher.hosts.learn_own()
        await self.generation.start()
        await self.generation.plugins.start()
        await self.lasting.knowledge.start()

    async def prepared(self, config: Config) -> Generation:
        """The generation of a new configuration, ready to apply. Until it does, nothing has changed.

        Raises: ConfigError, as for a new `App`.
        """
        before = self.generation
        parts = await run_in_thread(partial(Parts.of, config, before))
        generation = Generation(config, parts, self.lasting, self._latest, before)
        try:
            await generation.prepare()
        except BaseException:
            await generation.close()
            raise
        return generation

    async def apply(self, generation: Generation) -> list[str]:
        """Let the requests that begin from now on be answered by `generation`. Returns the names of the models whose
        processes are replaced. The generation before is closed after its last request."""
        before, config = self.generation, generation.config
        replaced = self.lasting.pool.configure(config.server_pool, generation.pooled)
        self.generation = generation
        self.lasting.knowledge.configure(config.knowledge)
        for follow in self.followers:
            follow(config)
        try:
            await generation.start()
        except Exception:  # of a backend that a module adds
            logger.exception("not all of the new configuration could be started")
        finally:
            task = asyncio.get_running_loop().create_task(self._end(before), name="end of a configuration")
            self._ending[before] = task
            task.add_done_callback(partial(log_failure, logger))
        return replaced

    async def _end(self, generation: Generation) -> None:
        await generation.ended()
        await self.lasting.downloads.ended()  # one may come by its connections
        await generation.close()
        del self._ending[generation]

    async def close(self) -> None:
        """Stop agents, processes and connections. If it is cancelled, what is to be stored is."""
        try:
            await self.lasting.knowledge.close()
            await self._close_generations()
        finally:
            self.lasting.store.close()
        self.lasting.metrics.lag.stop()
        await self.lasting.pages.close()
        await self.stop_models()
        if self.lasting.tracing is not None:
            await self.lasting.tracing.close()

    async def _close_generations(self) -> None:
        await self.lasting.conversations.close()
        before = dict(self._ending)
        for task in before.values():
            task.cancel()
        if before:
            await asyncio.wait(before.values())
        for generation in (*before, self.generation):
            await generation.close()

    async def stop_models(self) -> None:
        """Cancel all downloads, stop all processes and close the connections to servers; may be called repeatedly."""
        await self.lasting.pool.close(drain_s=0)
        for generation in (*self._ending, self.generation):
            await generation.router.close()
