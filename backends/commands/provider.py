"""The configured models whose servers are started by commands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from llama_smart_proxy.backends.base import Json, ModelInfo, Problem, Services
from llama_smart_proxy.backends.commands.launcher import CommandLauncher
from llama_smart_proxy.backends.pool.launcher import PoolModel, settings_of
from llama_smart_proxy.backends.pool.pool import Pool
from llama_smart_proxy.backends.pool.spawned import SpawnedModel, SpawnedProvider, to_load
from llama_smart_proxy.backends.threads import run_in_thread
from llama_smart_proxy.proxy.config import Config, ModelConfig

KIND = "command"


class CommandModel(SpawnedModel):
    """`Model` for one whose server is started by a command."""

    def __init__(self, pool: Pool, name: str, config: ModelConfig, passthrough: Sequence[str], *, helper: bool) -> None:
        self.launcher = CommandLauncher.of(name, config, passthrough)
        pooled = PoolModel(name, self.launcher, helper=helper, **settings_of(config))
        super().__init__(pool, pooled, kind=KIND, aliases=config.aliases)
        self.config = config
        self.filters = config.filters
        self.speaks = frozenset(config.apis)

    def prepare(self, body: Json) -> None:
        """Give the request the name that its server has for the model."""
        if self.config.served_name is not None:
            body["model"] = self.config.served_name

    @property
    def card(self) -> ModelInfo:
        return ModelInfo(self.name).configured(self.config, self.config.title)


class Commands(SpawnedProvider):
    """`Provider` of the models with `cmd`."""

    section: ClassVar[str] = "commands"
    Config: ClassVar[Any] = dict[str, ModelConfig]

    def __init__(self, pool: Pool, models: Sequence[CommandModel], before: Commands | None = None) -> None:
        super().__init__(pool, models)
        self._own = models
        self._to_load = to_load(models, before._own if before is not None else None)

    @classmethod
    def create(cls, config: Config, services: Services) -> Commands | None:
        own = {name: model for name, model in config.models.items() if config.backend_of(name) == KIND}
        passthrough = config.passthrough
        models = [
            CommandModel(services.pool, name, model, passthrough, helper=config.is_helper(name, model))
            for name, model in own.items()
        ]
        return cls(services.pool, models, services.before(cls.section)) if models else None

    async def start(self) -> None:
        """Begin to load the models marked `preload`, pinned ones first, at most as many as the pool has places."""
        for model in self._pool.first([model.model for model in self._to_load]):
            self._pool.begin_load(model)

    async def problems(self) -> Sequence[Problem]:
        """Commands whose program is missing."""
        found = await run_in_thread(lambda: [(model.name, model.launcher.missing()) for model in self._own])
        return [Problem(f"models.{name}", missing) for name, missing in found if missing is not None]
