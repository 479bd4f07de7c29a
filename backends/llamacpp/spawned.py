"""A model in a llama-server of our own: lease an instance, send the call to it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import ClassVar

from llama_smart_proxy.backends.base import UpstreamRequest
from llama_smart_proxy.backends.http.exchange import UpstreamResponse
from llama_smart_proxy.backends.pool.pool import Pool
from llama_smart_proxy.proxy.config import ModelConfig
from llama_smart_proxy.proxy.errors import UpstreamFailed

DYING_S = 0.25
"""A broken connection is often the first sign of a crash; the exit is noticed within this many seconds of it."""


class SpawnedModel:
    """`Backend` for one configured model. Its process is started when first asked for, and is shared."""

    speaks: ClassVar[frozenset[str]] = frozenset({"openai", "responses", "anthropic", "native"})

    def __init__(self, pool: Pool, name: str, model: ModelConfig) -> None:
        self.pool = pool
        self.name = name
        self.model = model

    @asynccontextmanager
    async def open(self, call: UpstreamRequest) -> AsyncIterator[UpstreamResponse]:
        async with self.pool.lease(self.name, self.model, slot=call.slot, wait=call.wait) as instance:
            try:
                async with instance.connections.request(call) as response:
                    yield response
                    if response.broken:  # told in-stream
                        await instance.wait_stopped(DYING_S)
                    instance.worked |= response.complete
            except UpstreamFailed as exc:
                if exc.status == 502:
                    await instance.wait_stopped(DYING_S)  # so that whoever comes next meets a fresh instance
                raise
