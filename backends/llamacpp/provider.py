"""The models that the proxy runs itself: configured ones, files of `models_dir`, and the local Hugging Face cache."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar

from llama_smart_proxy.backends.base import BaseProvider, ProviderStatus, Services
from llama_smart_proxy.backends.llamacpp.headers import Headers
from llama_smart_proxy.backends.llamacpp.launcher import pool_model
from llama_smart_proxy.backends.llamacpp.model import KIND, LlamaCppModel
from llama_smart_proxy.backends.pool.sockets import SocketFolder, remove_stale
from llama_smart_proxy.backends.threads import run_in_thread
from llama_smart_proxy.backends.weights import hub
from llama_smart_proxy.backends.weights.downloads import Download
from llama_smart_proxy.backends.weights.files import scan_models_dir
from llama_smart_proxy.proxy.config import Config, LlamaCppConfig, ModelConfig
from llama_smart_proxy.proxy.errors import ConfigError, ModelNotFound

logger = logging.getLogger(__name__)

CACHE_FRESH_S = 2.0
"""How old the list of what is in the Hugging Face cache may be before it is read anew."""
CACHE_READ_S = 2.0
"""Longest wait for that; the folder may be on a disk that does not answer."""


class LlamaCpp(BaseProvider):
    """`Provider` of the models in the pool. Names mean configured ones and their aliases first, then files, then what
    is in the cache. It starts and closes the pool."""

    section: ClassVar[str] = "llama_cpp"
    Config: ClassVar[Any] = LlamaCppConfig

    def __init__(self, config: Config, services: Services) -> None:
        super().__init__()
        self._pool = services.pool
        self._downloads = services.downloads
        self._headers = Headers()
        self._config = config.llama_cpp
        self._default_args = config.default_args()
        self._takes_hub_names = config.backend == KIND
        self._sockets = SocketFolder() if config.llama_cpp.transport == "unix" else None
        self._models_dir = config.llama_cpp.models_dir
        self._scanned_ns = -1
        self._files: dict[str, LlamaCppModel] = {}
        self._by_key: dict[str, LlamaCppModel] = {}
        self._reads_cache = config.llama_cpp.hf_cache
        self._cached: dict[str, LlamaCppModel] = {}
        self._cache_read_s = float("-inf")
        self._configured = [
            self._model(name, model) for name, model in config.models.items() if config.backend_of(name) == KIND
        ]
        for spawned in self._configured:
            for key in (spawned.name, *spawned.aliases):
                self._by_key[key.lower()] = spawned

    @classmethod
    def create(cls, config: Config, services: Services) -> LlamaCpp:
        """There always is one: files and the cache come and go."""
        return cls(config, services)

    async def start(self) -> None:
        """Start the pool, and begin to load as many of the models marked `preload` as fit, pinned ones first."""
        await self._pool.start()
        await run_in_thread(remove_stale)
        preloaded = [spawned for spawned in self._configured if spawned.config.preload]
        for spawned in sorted(preloaded, key=lambda spawned: not spawned.config.pinned)[: self._pool.size]:
            self._pool.begin_load(spawned.model)

    async def close(self) -> None:
        await self._pool.close(drain_s=0)
        if self._sockets is not None:
            self._sockets.close()

    # -- models ----------------------------------------------------------------------------------------------------

    async def listed(self) -> None:
        """Return once the list of what is in the cache is at most 2 s old, or could not be read in 2 s."""
        await self._read_cache()

    async def reread(self) -> None:
        """Read `models_dir` and the cache again, and unload the models that are gone from there."""
        before = dict.fromkeys([*self._files.values(), *self._cached.values()])
        self._scanned_ns = -1
        await self._read_cache(at_once=True)
        after = set(self.models())
        for spawned in before:
            if spawned not in after:
                await spawned.unload()

    def models(self) -> Sequence[LlamaCppModel]:
        return [*self._configured, *self._scan().values(), *dict.fromkeys(self._cached.values())]

    def known(self, name: str, *, pull: bool = True) -> LlamaCppModel | None:
        """The model of that name. Case is ignored, and a `:latest` that is not configured."""
        key = name.lower()
        plain = key.removesuffix(":latest")
        found = self._by_key.get(key) or self._by_key.get(plain)
        if found is None and self._models_dir is not None:
            files = self._scan()
            found = files.get(key) or files.get(plain)
        if found is None and self._cached:
            found = self._cached.get(key.replace("huggingface.co/", "hf.co/", 1))
        return found

    async def find(self, name: str, *, pull: bool) -> LlamaCppModel | None:
        if hub.parse_name(name) is not None:
            await self._read_cache(at_once=True)
        elif hub.parse_name(f"{hub.PREFIXES[0]}{name}") is not None:  # a name of many kinds, so not that often
            await self._read_cache()
        return self.known(name)

    @property
    def default(self) -> LlamaCppModel | None:
        """The one there is, apart from the cache."""
        ours = [*self._configured, *self._scan().values()]
        return ours[0] if len(ours) == 1 else None

    async def fitting(self, models: Sequence[str]) -> list[list[str]]:
        return self._pool.fitting(models)

    # -- downloads -------------------------------------------------------------------------------------------------

    def can_download(self, name: str) -> bool:
        """One of its own, and any of the hub if models run here by default."""
        return self.known(name) is not None or (self._takes_hub_names and hub.parse_name(name) is not None)

    async def download(self, name: str, headers: Sequence[tuple[str, str]]) -> Download | None:
        spawned = self.known(name)
        if spawned is not None:
            return await self._pool.begin_download(spawned.model)
        found = hub.parse_name(name)
        if found is None:
            raise ModelNotFound(f"model {name[:100]!r} not found")
        return self._downloads.join(hub.download_name(*found), hub.work(*found))

    def status(self) -> ProviderStatus:
        return ProviderStatus(instances=self._pool.status())

    # -- what is on the disk ---------------------------------------------------------------------------------------

    async def _read_cache(self, *, at_once: bool = False) -> None:
        """Look at the Hugging Face cache again, unless that was done a moment ago."""
        now = asyncio.get_running_loop().time()
        if not self._reads_cache or (not at_once and now - self._cache_read_s < CACHE_FRESH_S):
            return
        self._cache_read_s = now
        with suppress(TimeoutError):
            async with asyncio.timeout(CACHE_READ_S):
                found = await run_in_thread(hub.cached_models)
                self._cached = self._keyed(found)

    def _keyed(self, found: Mapping[str, ModelConfig]) -> dict[str, LlamaCppModel]:
        """The models of the cache under all names they go by: with a quantisation, a file, or, if a repository has
        only one, nothing behind the colon."""
        known = {spawned.name: spawned for spawned in self._cached.values()}
        keyed: dict[str, LlamaCppModel] = {}
        alone = Counter(model.repo for model in found.values())
        for name, model in found.items():
            spawned = known.get(name) or self._model(name, model, cached=True)
            names = [name, f"hf.co/{model.repo}:{model.variant}"]
            names += [key.removeprefix("hf.co/") for key in names]  # llama-server's own names
            names += [f"hf.co/{model.repo}", f"hf.co/{model.repo}:latest"] if alone[model.repo] == 1 else []
            keyed |= {key.lower(): spawned for key in names if key.lower() not in self._by_key}
        return keyed

    async def _remove(self, spawned: LlamaCppModel) -> None:
        """Unload a model of the cache and remove its file."""
        await spawned.unload()
        assert spawned.config.repo is not None and spawned.config.variant is not None
        repo, file = spawned.config.repo, spawned.config.variant
        await run_in_thread(lambda: hub.delete(repo, file))
        await self._read_cache(at_once=True)

    def _scan(self) -> dict[str, LlamaCppModel]:
        """Models of `models_dir` by lower-case name; the folder is read again only when it has changed."""
        if self._models_dir is None:
            return {}
        try:
            changed_ns = self._models_dir.stat().st_mtime_ns
            files = scan_models_dir(self._models_dir) if changed_ns != self._scanned_ns else None
        except (OSError, ConfigError) as exc:
            changed_ns, files = -2, {}
            if self._scanned_ns != changed_ns:
                logger.warning("models_dir cannot be read, its models are not offered: %s", exc)
        self._scanned_ns = changed_ns
        if files is not None:
            self._files = {
                name.lower(): self._files.get(name.lower()) or self._model(name, model)
                for name, model in files.items()
                if name.lower() not in self._by_key
            }
        return self._files

    def _model(self, name: str, model: ModelConfig, *, cached: bool = False) -> LlamaCppModel:
        server, unauthenticated = self._config.server, self._config.allow_unauthenticated
        how = partial(pool_model, unauthenticated=unauthenticated, sockets=self._sockets)
        pooled = how(name, model, server, self._default_args)
        if not cached:
            return LlamaCppModel(self._pool, pooled, model, self._headers)
        aliases = [name.removeprefix("hf.co/")]
        return LlamaCppModel(self._pool, pooled, model, self._headers, self._remove, aliases=aliases)
