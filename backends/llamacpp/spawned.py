"""A model in a llama-server of our own: lease an instance, send the request to it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import ClassVar

from llama_smart_proxy.backends.base import Feature, Json, ModelInfo, ModelState, Residence, UpstreamRequest
from llama_smart_proxy.backends.http.exchange import UpstreamResponse
from llama_smart_proxy.backends.llamacpp.headers import Headers
from llama_smart_proxy.backends.pool.pool import Pool
from llama_smart_proxy.proxy.config import ModelConfig
from llama_smart_proxy.proxy.errors import BadRequest, UpstreamFailed

KIND = "llama.cpp"
DYING_S = 0.25
"""A broken connection is often the first sign of a crash; the exit is noticed within this many seconds of it."""


class SpawnedModel:
    """`Model` for one in the pool. Its process is started when first asked for, and is shared.

    `remove` deletes its files; without it, it cannot be deleted.
    """

    kind: ClassVar[str] = KIND
    owner: ClassVar[str] = KIND
    codec: ClassVar[str] = KIND
    speaks: ClassVar[frozenset[str]] = frozenset({"openai", "responses", "anthropic", "native"})
    features: ClassVar[frozenset[Feature]] = frozenset({Feature.LOADING, Feature.TOKENS})

    def __init__(
        self,
        pool: Pool,
        name: str,
        model: ModelConfig,
        headers: Headers,
        remove: Callable[[SpawnedModel], Awaitable[None]] | None = None,
    ) -> None:
        self.pool = pool
        self.name = name
        self.model = model
        self._headers = headers
        self._remove = remove

    @property
    def aliases(self) -> Sequence[str]:
        return self.model.aliases

    @property
    def state(self) -> ModelState:
        value = self.pool.state(self.name)
        return ModelState(value, self.pool.failed(self.name) if value == "unloaded" else None)

    @asynccontextmanager
    async def open(self, request: UpstreamRequest) -> AsyncIterator[UpstreamResponse]:
        async with self.pool.lease(self.name, self.model, slot=request.slot, wait=request.wait) as instance:
            try:
                async with instance.connections.request(request) as response:
                    yield response
                    if response.broken:  # told in-stream
                        await instance.wait_stopped(DYING_S)
                    instance.worked |= response.complete
            except UpstreamFailed as exc:
                if exc.status == 502:
                    await instance.wait_stopped(DYING_S)  # so that whoever comes next meets a fresh instance
                raise

    def prepare(self, body: Json) -> None:
        """Nothing: its configuration decides."""

    async def load(self, *, wait: bool = True) -> None:
        if wait:
            await self.pool.load(self.name, self.model)
        else:
            self.pool.begin_load(self.name, self.model)

    async def unload(self) -> None:
        await self.pool.unload(self.name)

    def keep_loaded(self, seconds: float) -> None:
        self.pool.set_keep_alive(self.name, self.model, seconds)

    async def delete(self, headers: Sequence[tuple[str, str]]) -> None:
        if self._remove is None:
            raise BadRequest(f"model {self.name!r} is part of this proxy's configuration; remove it there")
        await self._remove(self)

    async def info(self) -> ModelInfo:
        """Raises: `StartFailed` when the system has no more threads."""
        return await self._headers.info(self.name, self.model)

    async def residence(self) -> Residence | None:
        """`size_vram` is 0: llama-server does not report how much of the model it put on a GPU."""
        expires_at = self.pool.expires_at(self.name)
        if expires_at is None:
            return None
        info = await self.info()
        trained = info.metadata.get(f"{info.metadata.get('general.architecture')}.context_length")
        each = trained // (self.model.parallel or 1) if isinstance(trained, int) else 0
        return Residence(expires_at, context_length=info.num_ctx or each)
