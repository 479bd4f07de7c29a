"""The models of the Ollama hosts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from llama_smart_proxy.backends.base import Problem, ProviderStatus, Services
from llama_smart_proxy.backends.ollama.host import OllamaHost
from llama_smart_proxy.backends.ollama.hosts import Hosts
from llama_smart_proxy.backends.ollama.model import KIND, OllamaModel
from llama_smart_proxy.backends.pool.launcher import PoolModel
from llama_smart_proxy.backends.weights.downloads import Download
from llama_smart_proxy.proxy.config import Config, OllamaConfig
from llama_smart_proxy.proxy.errors import UpstreamFailed


class Ollama:
    """`Provider` of the hosts' models, of this backend's configured models, and of models that may be pulled."""

    section: ClassVar[str] = "ollama"
    Config: ClassVar[Any] = OllamaConfig

    def __init__(self, hosts: Hosts, paths: Mapping[str, str] | None = None) -> None:
        """`paths` are those of the configured models in the file, by name."""
        self._hosts = hosts
        self._paths = paths or {}

    @classmethod
    def create(cls, config: Config, services: Services) -> Ollama | None:
        if not config.uses_ollama:
            return None
        own = {name: model for name, model in config.models.items() if config.backend_of(name) == KIND}
        before: Ollama | None = services.before(cls.section)
        known = before._hosts if before is not None else None
        hosts = Hosts(config.ollama, services.downloads, own, services.pool.times, known)
        return cls(hosts, {name: config.path_of(name) for name in own})

    async def start(self) -> None:
        self._hosts.start()

    async def close(self) -> None:
        await self._hosts.close()

    async def listed(self) -> None:
        await self._hosts.listed()

    async def reread(self) -> None:
        await self._hosts.listed()

    def models(self) -> Sequence[OllamaModel]:
        return [self._hosts.model(name) for name in self._hosts.models]

    def known(self, name: str, *, pull: bool = True) -> OllamaModel | None:
        own_name = self._hosts.known(name)
        return self._hosts.model(own_name, pull=pull, asked=name) if own_name is not None else None

    async def find(self, name: str, *, pull: bool) -> OllamaModel | None:
        own_name = await self._hosts.find(name)
        if own_name is None and pull and self._hosts.may_pull(name):
            own_name = name
        return self._hosts.model(own_name, pull=pull, asked=name) if own_name is not None else None

    def missing(self, name: str) -> UpstreamFailed | None:
        """The error if no host is available."""
        error = self._hosts.missing(name)
        return error if isinstance(error, UpstreamFailed) else None

    @property
    def default(self) -> None:
        """None: the model must be named."""

    def can_download(self, name: str) -> bool:
        """Any name: only the registries can tell which models exist."""
        return True

    async def download(self, name: str, headers: Sequence[tuple[str, str]]) -> Download:
        """The pull by a host, also of a model that exists, to update it. Raises: BadRequest."""
        return self._hosts.pull(name, headers)

    async def fitting(self, models: Sequence[str]) -> list[list[str]]:
        """One group: the hosts manage their memory themselves."""
        return [list(models)]

    async def management(self, api: str, model: str | None) -> OllamaHost | None:
        return await self._hosts.host_for(model) if api == KIND else None

    def status(self) -> ProviderStatus:
        return ProviderStatus(servers=self._hosts.status())

    def pooled(self) -> Sequence[PoolModel]:
        """None."""
        return ()

    async def problems(self) -> Sequence[Problem]:
        """That no host answers (while one does, requests go there), or which configured models no host has or pulls."""
        await self._hosts.listed()
        if (error := self._hosts.down) is not None:
            return [Problem("ollama.host", error)]
        reason = "no Ollama host has it, and ollama.pull is never"
        return [Problem(self._paths[name], reason) for name in self._hosts.unavailable(list(self._paths))]
