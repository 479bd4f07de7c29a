"""The models the proxy runs itself: configured ones, the files of `models_dir`, and the local Hugging Face cache."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress

from llama_smart_proxy.backends.llamacpp.headers import Headers
from llama_smart_proxy.backends.llamacpp.spawned import SpawnedModel
from llama_smart_proxy.backends.pool.pool import Pool
from llama_smart_proxy.backends.threads import in_thread
from llama_smart_proxy.backends.weights import hub
from llama_smart_proxy.backends.weights.files import scan_models_dir
from llama_smart_proxy.proxy.config import Config, ModelConfig
from llama_smart_proxy.proxy.errors import ConfigError

logger = logging.getLogger(__name__)

CACHE_FRESH_S = 2.0
"""How old the list of what is in the Hugging Face cache may be before it is read anew."""
CACHE_READ_S = 2.0
"""Longest wait for that; the folder may be on a disk that does not answer."""


class LocalModels:
    """Finds a model by name: configured ones and their aliases first, then files, then the cache."""

    def __init__(self, config: Config, pool: Pool) -> None:
        self._pool = pool
        self._headers = Headers()
        self._models_dir = config.llama_cpp.models_dir
        self._scanned_ns = -1
        self._files: dict[str, SpawnedModel] = {}
        self._by_key: dict[str, SpawnedModel] = {}
        self._reads_cache = config.llama_cpp.hf_cache
        self._cached: dict[str, SpawnedModel] = {}
        self._cache_read_s = float("-inf")
        self._configured = [
            SpawnedModel(pool, name, model, self._headers)
            for name, model in config.models.items()
            if config.backend_of(name) == "llama.cpp"
        ]
        for spawned in self._configured:
            for key in (spawned.name, *spawned.model.aliases):
                self._by_key[key.lower()] = spawned

    def get(self, name: str) -> SpawnedModel | None:
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

    def all(self) -> Iterator[SpawnedModel]:
        """Every model, from memory, each once."""
        yield from self._configured
        yield from self._scan().values()
        yield from dict.fromkeys(self._cached.values())

    @property
    def only_one(self) -> SpawnedModel | None:
        """The model that a request means that names none: the one there is, apart from the cache."""
        ours = [*self._configured, *self._scan().values()]
        return ours[0] if len(ours) == 1 else None

    async def refresh(self, *, at_once: bool = False) -> None:
        """Look at the Hugging Face cache again, unless that was done a moment ago."""
        now = asyncio.get_running_loop().time()
        if not self._reads_cache or (not at_once and now - self._cache_read_s < CACHE_FRESH_S):
            return
        self._cache_read_s = now
        with suppress(TimeoutError):
            async with asyncio.timeout(CACHE_READ_S):
                found = await in_thread(hub.cached_models)
                self._cached = self._keyed(found)

    def _keyed(self, found: Mapping[str, ModelConfig]) -> dict[str, SpawnedModel]:
        """The models of the cache under all names they go by: with a quantisation, a file, or, if a repository has
        only one, nothing behind the colon."""
        known = {spawned.name: spawned for spawned in self._cached.values()}
        keyed: dict[str, SpawnedModel] = {}
        alone = Counter(model.repo for model in found.values())
        for name, model in found.items():
            spawned = known.get(name) or SpawnedModel(self._pool, name, model, self._headers, self._remove)
            names = [name, f"hf.co/{model.repo}:{model.variant}"]
            names += [f"hf.co/{model.repo}", f"hf.co/{model.repo}:latest"] if alone[model.repo] == 1 else []
            keyed |= {key.lower(): spawned for key in names if key.lower() not in self._by_key}
        return keyed

    async def _remove(self, spawned: SpawnedModel) -> None:
        """Unload a model of the cache and remove its file."""
        await spawned.unload()
        assert spawned.model.repo is not None and spawned.model.variant is not None
        repo, file = spawned.model.repo, spawned.model.variant
        await in_thread(lambda: hub.delete(repo, file))
        await self.refresh(at_once=True)

    def _scan(self) -> dict[str, SpawnedModel]:
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
                name.lower(): self._files.get(name.lower()) or SpawnedModel(self._pool, name, model, self._headers)
                for name, model in files.items()
                if name.lower() not in self._by_key
            }
        return self._files
