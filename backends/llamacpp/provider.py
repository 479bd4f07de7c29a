"""The models that the proxy runs itself: configured ones, files of `models_dir`, and the local Hugging Face cache."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from llama_smart_proxy.backends.base import BaseProvider, Problem, ProviderStatus, Services
from llama_smart_proxy.backends.llamacpp.headers import Headers
from llama_smart_proxy.backends.llamacpp.launcher import pool_model
from llama_smart_proxy.backends.llamacpp.model import KIND, LlamaCppModel
from llama_smart_proxy.backends.llamacpp.problems import problems
from llama_smart_proxy.backends.pool.launcher import PoolModel
from llama_smart_proxy.backends.pool.spawned import to_load
from llama_smart_proxy.backends.threads import Looks, run_in_thread
from llama_smart_proxy.backends.weights import hub
from llama_smart_proxy.backends.weights.downloads import Download
from llama_smart_proxy.backends.weights.models_dir import FRESH_S, ModelFile, ModelsDir, Scan, key
from llama_smart_proxy.proxy.config import Config, LlamaCppConfig, ModelConfig
from llama_smart_proxy.proxy.errors import ModelNotFound

logger = logging.getLogger(__name__)

CACHE_FRESH_S = 2.0
"""How old the list of what is in the Hugging Face cache may be before it is read anew."""
LOOK_S = 2.0
"""Longest wait for a look at the cache or at `models_dir`, which may be on a disk that does not answer."""


class LlamaCpp(BaseProvider):
    """`Provider` of the models in the pool. Names mean configured ones and their aliases first, then files, then what
    is in the cache."""

    section: ClassVar[str] = "llama_cpp"
    Config: ClassVar[Any] = LlamaCppConfig

    def __init__(self, config: Config, services: Services) -> None:
        super().__init__()
        self._pool = services.pool
        self._downloads = services.downloads
        self._config = config
        self._default_args = config.default_args()
        self._headers = Headers(self._default_args)
        self._takes_hub_names = config.backend == KIND
        self._sockets = services.pool.sockets if config.llama_cpp.transport == "unix" else None
        self._models_dir = ModelsDir.of(config)
        self._folder_looks: Looks[Scan] | None = None
        if self._models_dir is not None:
            what = f"models_dir {config.llama_cpp.models_dir}"
            self._folder_looks = Looks(what, self._models_dir.look, self._offer, LOOK_S)
        self._scan = Scan()
        self._found: Mapping[str, ModelConfig] = {}
        self._started = False
        self._files: dict[str, LlamaCppModel] = {}
        self._aliases: dict[str, LlamaCppModel] = {}
        self._replaced: list[LlamaCppModel] = []
        self._by_key: dict[str, LlamaCppModel] = {}
        self._cached: dict[str, LlamaCppModel] = {}
        self._cache_looks: Looks[dict[str, ModelConfig]] | None = None
        if config.llama_cpp.hf_cache:
            self._cache_looks = Looks("the Hugging Face cache", hub.cached_models, self._offer_cached, LOOK_S)
        self._configured = [
            self._model(name, model) for name, model in config.models.items() if config.backend_of(name) == KIND
        ]
        for spawned in self._configured:
            for own in (spawned.name, *spawned.aliases):
                self._by_key[own.lower()] = spawned
        self._to_load = to_load(self._configured)
        if (before := services.before(self.section)) is not None:
            self._take_over(before)

    @classmethod
    def create(cls, config: Config, services: Services) -> LlamaCpp:
        """There always is one: files and the cache come and go."""
        return cls(config, services)

    def _take_over(self, before: LlamaCpp) -> None:
        """Offer the files that were known, and load only what has changed."""
        self._headers.take_over(before._headers)
        if self._models_dir is not None and before._models_dir is not None:
            self._offer(self._models_dir.take_over(before._models_dir))
        if self._cache_looks is not None:
            self._offer_cached(before._found)
        self._to_load = to_load(self._configured, before._configured)

    async def start(self) -> None:
        """Begin to load as many of the models marked `preload` as fit, pinned ones first. Returns when it is known what
        is in `models_dir`, unless that does not answer."""
        self._started = True
        await self._look_at_folder()
        for model in self._pool.first([spawned.model for spawned in self._to_load]):
            self._pool.begin_load(model)

    # -- models ----------------------------------------------------------------------------------------------------

    async def listed(self) -> None:
        """Return once the list of what is in `models_dir` is up to date, and that of the cache at most 2 s old, or once
        a disk has not answered for 2 s."""
        await self._look_at_folder()
        await self._look_at_cache(CACHE_FRESH_S)

    async def reread(self) -> None:
        """Read `models_dir` and the cache again, and unload the models that are gone from there."""
        before = dict.fromkeys([*self._files.values(), *self._cached.values()])
        if self._models_dir is not None:
            self._models_dir.forget()
        await self._look_at_folder()
        await self._look_at_cache()
        after = set(self.models())
        for spawned in before:
            if spawned not in after:
                await spawned.unload()

    def models(self) -> Sequence[LlamaCppModel]:
        return [*self._configured, *self._files.values(), *dict.fromkeys(self._cached.values())]

    def known(self, name: str, *, pull: bool = True) -> LlamaCppModel | None:
        """The model of that name. Case is ignored, and a `:latest` that is not configured."""
        lowered = name.lower()
        found = self._by_key.get(lowered) or self._by_key.get(lowered.removesuffix(":latest"))
        if found is None and self._files:
            own = key(name)
            found = self._files.get(own) or self._aliases.get(own)
        if found is None and self._cached:
            found = self._cached.get(lowered.replace("huggingface.co/", "hf.co/", 1))
        return found

    async def find(self, name: str, *, pull: bool) -> LlamaCppModel | None:
        await self._look_at_folder()
        if (found := self.known(name)) is not None:
            return found
        if hub.parse_name(name) is not None:
            await self._look_at_cache()
        elif hub.parse_name(f"{hub.PREFIXES[0]}{name}") is not None:  # a name of many kinds, so not that often
            await self._look_at_cache(CACHE_FRESH_S)
        return self.known(name)

    @property
    def default(self) -> LlamaCppModel | None:
        """The one there is, apart from the cache."""
        ours = [*self._configured, *self._files.values()]
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

    def pooled(self) -> Sequence[PoolModel]:
        return [spawned.model for spawned in self.models()]

    async def problems(self) -> Sequence[Problem]:
        await self._look_at_folder()
        return [*await run_in_thread(lambda: problems(self._config)), *self._disk_problems()]

    def _disk_problems(self) -> Iterator[Problem]:
        folder, cache = "llama_cpp.models_dir", "llama_cpp.hf_cache"
        if self._scan.error:
            yield Problem(folder, self._scan.error, fatal=self._scan.gone)
        for remark in self._scan.remarks:
            yield Problem(folder, remark, harmless=True)
        for where, looks in ((folder, self._folder_looks), (cache, self._cache_looks)):
            if looks is not None and looks.stalled:
                yield Problem(where, "the disk does not answer; what was known of it last is offered")

    # -- what is on the disk ---------------------------------------------------------------------------------------

    async def _look_at_folder(self) -> None:
        """Return once what is in `models_dir` is known; models whose file is another one now are unloaded."""
        if self._folder_looks is not None:
            await self._folder_looks.look()
        while self._replaced:
            await self._replaced.pop().unload()

    async def _rescan(self) -> bool:
        if self._folder_looks is None:
            return True
        await self._folder_looks.look(FRESH_S)
        return not self._folder_looks.stalled

    async def _look_at_cache(self, fresh_s: float = 0.0) -> None:
        """Look at the Hugging Face cache again, unless that was done less than `fresh_s` ago."""
        if self._cache_looks is not None:
            await self._cache_looks.look(fresh_s)

    def _offer(self, scan: Scan) -> None:
        """Offer what was found in `models_dir`. What is remarkable about it is logged once, if the proxy runs."""
        if scan is self._scan:
            return
        if self._started and scan.error and scan.error != self._scan.error:
            offered = "its models are not" if scan.gone else "what was known of it last is"
            logger.warning("models_dir cannot be read, %s offered: %s", offered, scan.error)
        for remark in scan.remarks if self._started else ():
            if remark not in self._scan.remarks:
                logger.warning("models_dir: %s", remark)
        before, self._scan = self._files, scan
        self._files = {own: self._of_file(before.get(own), file) for own, file in scan.models.items()}
        self._aliases = {alias: self._files[key(file.name)] for alias, file in scan.aliases.items()}

    def _of_file(self, known: LlamaCppModel | None, file: ModelFile) -> LlamaCppModel:
        if known is None or (known.name, known.aliases, known.config.path) != (file.name, file.aliases, file.path):
            if known is not None:
                self._replaced.append(known)
            known = self._model(file.name, ModelConfig(path=file.path), aliases=file.aliases)
        known.file, known.rescan = file, self._rescan
        return known

    def _offer_cached(self, found: Mapping[str, ModelConfig]) -> None:
        self._found, self._cached = found, self._keyed(found)

    def _keyed(self, found: Mapping[str, ModelConfig]) -> dict[str, LlamaCppModel]:
        """The models of the cache under all names they go by: with a quantisation, a file, or, if a repository has
        only one, nothing behind the colon."""
        known = {spawned.name: spawned for spawned in self._cached.values()}
        keyed: dict[str, LlamaCppModel] = {}
        alone = Counter(model.repo for model in found.values())
        for name, model in found.items():
            spawned = known.get(name) or self._model(name, model, cached=True, aliases=[name.removeprefix("hf.co/")])
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
        await self._look_at_cache()

    def _model(
        self, name: str, model: ModelConfig, *, cached: bool = False, aliases: Sequence[str] = ()
    ) -> LlamaCppModel:
        settings = self._config.llama_cpp
        pooled = pool_model(
            *(name, model, settings.server, self._default_args),
            unauthenticated=settings.allow_unauthenticated,
            sockets=self._sockets,
            passthrough=self._config.passthrough,
            helper=self._config.is_helper(name, model),
        )
        remove = self._remove if cached else None
        return LlamaCppModel(self._pool, pooled, model, self._headers, remove, aliases=aliases)
