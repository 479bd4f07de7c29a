"""Models in server processes of the pool: lease an instance, send the request to it. For any launcher."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import ClassVar, Protocol, TypeVar

from llama_smart_proxy.backends.base import (
    BaseProvider,
    Feature,
    Json,
    ModelInfo,
    ModelState,
    Residence,
    UpstreamRequest,
)
from llama_smart_proxy.backends.http.connection import Endpoint
from llama_smart_proxy.backends.http.exchange import UpstreamResponse
from llama_smart_proxy.backends.pool.launcher import PoolModel
from llama_smart_proxy.backends.pool.output import Output
from llama_smart_proxy.backends.pool.pool import Pool
from llama_smart_proxy.backends.tasks import BROKEN_OFF
from llama_smart_proxy.proxy.config import FiltersConfig, ModelConfig
from llama_smart_proxy.proxy.errors import BadRequest, UpstreamFailed

DYING_S = 0.25
"""A broken connection is often the first sign of a crash; the exit is noticed within this many seconds of it."""

NOT_LISTENING = (ConnectionRefusedError, FileNotFoundError)
"""Causes of a failed connection to a process of ours that has given up its address, as a busy one does not."""


class SpawnedModel:
    """`Model` for one in the pool. Its process is started by the first request, and serves all of them.

    As it is, for servers that have an OpenAI API; a subclass may declare more.
    """

    codec: ClassVar[str] = "openai"
    speaks: frozenset[str] = frozenset({"openai"})
    features: frozenset[Feature] = frozenset({Feature.LOADING})
    tags: Sequence[str] = ()
    forwards: ClassVar[tuple[str, ...]] = ()
    filters: FiltersConfig | None = None

    def __init__(self, pool: Pool, model: PoolModel, *, kind: str, aliases: Sequence[str] = ()) -> None:
        self.name = model.name
        self.kind = kind
        self.owner = kind
        self.aliases = aliases
        self.pool = pool
        self.model = model

    @property
    def state(self) -> ModelState:
        value = self.pool.state(self.name)
        return ModelState(value, self.pool.failed(self.name) if value == "unloaded" else None)

    @property
    def output(self) -> Output:
        return self.pool.output(self.model)

    @asynccontextmanager
    async def open(self, request: UpstreamRequest) -> AsyncIterator[UpstreamResponse]:
        async with self.pool.lease(self.model, request) as lease:
            instance = lease.instance
            try:
                async with instance.connections.request(request) as response:
                    yield response
                    if response.broken and (request.task is None or not request.task.broken):  # part of the stream
                        await instance.wait_stopped(DYING_S)
                    instance.worked |= response.complete
            except UpstreamFailed as exc:
                if exc.status == 502 and exc.code != BROKEN_OFF:
                    if isinstance(exc.__cause__, NOT_LISTENING):
                        self.pool.retire(lease, exc.message)
                    await instance.wait_stopped(DYING_S)  # so that the next request starts a new instance
                raise

    def prepare(self, body: Json) -> object:
        """Nothing: its configuration decides."""
        return None

    async def load(self, *, wait: bool = True) -> None:
        if wait:
            await self.pool.load(self.model)
        else:
            self.pool.begin_load(self.model)

    async def unload(self) -> None:
        await self.pool.unload(self.name)

    def keep_loaded(self, seconds: float) -> None:
        self.pool.set_keep_alive(self.model, seconds)

    async def delete(self, headers: Sequence[tuple[str, str]]) -> None:
        raise BadRequest(f"model {self.name!r} is part of this proxy's configuration; remove it there")

    async def info(self) -> ModelInfo:
        return self.card

    @property
    def card(self) -> ModelInfo:
        return ModelInfo(self.name)

    async def residence(self) -> Residence | None:
        expires_at = self.pool.expires_at(self.name)
        return Residence(expires_at) if expires_at is not None else None

    async def slots(self) -> int:
        return await self.pool.load(self.model)

    def command_line(self, listen: Endpoint) -> Sequence[str]:
        return self.model.launcher.preview()(listen, "").argv


class SpawnedProvider(BaseProvider):
    """A `Provider` of models in the pool that are all known from the start; see `BaseProvider`."""

    def __init__(self, pool: Pool, models: Sequence[SpawnedModel]) -> None:
        super().__init__(models)
        self._pool = pool
        self._spawned = models

    async def fitting(self, models: Sequence[str]) -> list[list[str]]:
        return self._pool.fitting(models)

    def pooled(self) -> Sequence[PoolModel]:
        return [spawned.model for spawned in self._spawned]


class Configured(Protocol):
    """A model of the pool that the configuration has."""

    model: PoolModel
    config: ModelConfig

    @property
    def name(self) -> str: ...
    @property
    def state(self) -> ModelState: ...


M = TypeVar("M", bound=Configured)


def to_load(models: Sequence[M], before: Sequence[M] | None = None) -> list[M]:
    """Those marked `preload`, the pinned ones first. Of a configuration that replaces another one, which had the models
    `before`: those that are newly marked, and of the marked and the pinned ones those whose process is replaced."""
    known = {model.name: model for model in before} if before is not None else {}
    found = [model for model in models if _is_to_load(model, known.get(model.name))]
    return sorted(found, key=lambda model: not model.config.pinned)


def _is_to_load(model: M, before: M | None) -> bool:
    if before is None or (model.config.preload and not before.config.preload):
        return model.config.preload
    stays = model.model.same(before.model)
    return not stays and (model.config.preload or model.config.pinned) and before.state.value in ("loaded", "loading")
