"""Combines Ollama servers: selects the host of a request, and pulls models that no host has."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial

from llama_smart_proxy.backends.base import Json, ModelInfo, UpstreamRequest
from llama_smart_proxy.backends.http.exchange import UpstreamResponse
from llama_smart_proxy.backends.http.sweep import Sweeper
from llama_smart_proxy.backends.journal import StepKind, noted
from llama_smart_proxy.backends.names import key_of
from llama_smart_proxy.backends.ollama.context import LOOK_S, Context
from llama_smart_proxy.backends.ollama.host import PULL_FAILED, OllamaHost, hosts_of, is_name
from llama_smart_proxy.backends.ollama.model import KIND, OllamaModel
from llama_smart_proxy.backends.openai import LISTING_PAUSE_S
from llama_smart_proxy.backends.pool.load_times import LoadTimes
from llama_smart_proxy.backends.progress import described
from llama_smart_proxy.backends.weights.downloads import Download, Downloads, Progress
from llama_smart_proxy.proxy.config import FiltersConfig, ModelConfig, OllamaConfig, is_ollama_name
from llama_smart_proxy.proxy.errors import BadRequest, ModelNotFound, ProxyError, UpstreamFailed, own

logger = logging.getLogger(__name__)

Headers = Sequence[tuple[str, str]]

LISTED_FRESH_S = 1.0
"""Maximum age in seconds of the list of a host's models for listing them."""
LOADED_STALE_S = 30.0
"""Maximum age in seconds of the list of loaded models for selecting a host."""
REFUSAL_KEPT_S = 10.0
"""Seconds for which requests for a model that Ollama could not pull get the same error without a retry."""


class Hosts:
    """All Ollama hosts, and the `configured` models of the backend `ollama`, by name. Names are compared as Ollama
    does: case-insensitively, and `:latest` is optional. What is known of servers that were there `before` is kept.

    Methods that are not coroutines answer from memory, and refresh stale listings in the background.
    """

    def __init__(
        self,
        config: OllamaConfig,
        downloads: Downloads,
        configured: Mapping[str, ModelConfig],
        times: LoadTimes | None = None,
        before: Hosts | None = None,
    ) -> None:
        self.hosts: list[OllamaHost] = hosts_of(config, before.hosts if before is not None else [])
        self._started = False
        self._pulls = config.pull == "auto"
        self._downloads = downloads
        self.times = times or LoadTimes(downloads.feed)
        self._named = {key_of(name): name for name in (*configured, *(config.models or ()))}
        self._aliases = {key_of(name): tuple(model.aliases) for name, model in configured.items()}
        self._by_alias = {key_of(alias): name for name, model in configured.items() for alias in model.aliases}
        self._serves_all = config.models is None
        self._pinned = {key_of(name): model.ctx for name, model in configured.items() if model.ctx}
        self._cards = {key_of(name): model for name, model in configured.items()}
        self._unloading: dict[str, float] = {}  # since when, on the event loop's clock
        self._contexts: dict[str, Context] = {}
        self._defaults: dict[str, int] = {}
        if before is not None:
            self._unloading, self._contexts, self._defaults = before._unloading, before._contexts, before._defaults
        self._refusals: dict[str, tuple[float, ProxyError]] = {}
        self._sweeper = Sweeper(LOADED_STALE_S, self._sweep)

    # -- models and state ------------------------------------------------------------------------------------------

    @property
    def models(self) -> tuple[str, ...]:
        """The names of all models: those listed by the hosts, in their spelling, and those of the configuration."""
        held = {key_of(item["name"]): str(item["name"]) for item in (*self.items(), *self.loaded())}
        return tuple((held | {key: name for key, name in self._named.items() if key not in held}).values())

    def items(self) -> list[Json]:
        """The items of /api/tags of all hosts; for a model on several hosts, the item of the first one."""
        return self._merged(lambda host: host.tags)

    def loaded(self) -> list[Json]:
        """The items of /api/ps, likewise."""
        return self._merged(lambda host: host.loaded)

    def has_loaded(self, name: str) -> bool:
        """Whether a host has the model in memory."""
        self._refresh()
        return any(key_of(name) in host.loaded for host in self.hosts)

    def state(self, name: str) -> str:
        """`loaded`, `unloaded`, or `unloading`: from `begin_unload` on until no host has it, or it is used again."""
        key, loaded = key_of(name), self.has_loaded(name)
        since = self._unloading.get(key)
        if since is None:
            return "loaded" if loaded else "unloaded"
        if any(host.keeps(key, since) for host in self.hosts):
            del self._unloading[key]
            return "loaded"
        if loaded or any(host.using[key] for host in self.hosts):
            return "unloading"
        del self._unloading[key]
        return "unloaded"

    def begin_use(self, name: str) -> None:
        """A request for the model begins, so that its host keeps it."""
        if self._unloading:
            self._unloading.pop(key_of(name), None)

    def begin_unload(self, name: str) -> None:
        """Its hosts will unload the model once its answers are complete."""
        self._unloading[key_of(name)] = asyncio.get_running_loop().time()
        for host in self.hosts:
            host.changed()

    @property
    def version(self) -> str | None:
        """The version of the first host whose version is known."""
        return next((host.version for host in self.hosts if host.version), None)

    def status(self) -> list[Json]:
        """The status of each host, for operators; with `error` if its last listing failed."""
        return [host.status for host in self.hosts]

    def known(self, name: str) -> str | None:
        """The model's name in the spelling of the hosts, or of the configuration; None if it is unknown. `name` may be
        an alias of the configuration."""
        key = key_of(self.real_name(name))
        if not self._serves(key):
            return None
        self._refresh()
        held = (str(host.tags[key]["name"]) for host in self.hosts if key in host.tags)
        return next(held, self._named.get(key))

    async def find(self, name: str) -> str | None:
        """As `known`, after refreshing the listings of all hosts if the model is unknown."""
        await self.holders(self.real_name(name))
        return self.known(name)

    def real_name(self, name: str) -> str:
        """The name of the configured model of which `name` is an alias; `name` itself if it is none."""
        return self._by_alias.get(key_of(name), name) if self._by_alias else name

    def aliases(self, name: str) -> Sequence[str]:
        """The aliases of the model in the configuration."""
        return self._aliases.get(key_of(name), ())

    async def holders(self, name: str) -> list[OllamaHost]:
        """The hosts that have the model, best first: available, with the model loaded, least busy."""
        key = key_of(name)
        if not self._serves(key):
            return []
        self._refresh()
        if not self._has(key) and is_name(name):
            await self._update_holders(key)
        for host in self.hosts if len(self.hosts) > 1 else ():
            if host.error is None:
                await host.refresh_loaded(LOADED_STALE_S)  # those with errors were retried above if required
        return [host for host in self._ranked(key) if key in host.tags]

    async def host_for(self, name: str | None) -> OllamaHost:
        """The host for a request about the model. For an unknown model, or None, it is the first available one: always
        the same, so that the parts of one operation (blobs, create) go to the same host."""
        found = await self.holders(name) if name is not None else []
        return found[0] if found else min(self.hosts, key=lambda host: host.error is not None)

    def start(self) -> None:
        """Start listing the hosts' models."""
        self._started = True
        for host in self.hosts:
            host.holders += 1
        self._refresh()

    async def listed(self) -> None:
        """Return once every host has been listed, an available one a moment ago, or its listing has failed: after 2 s
        at the latest. Models come and go in Ollama itself, so a list that is asked for is a new one."""
        self._refresh()
        ages = [LISTED_FRESH_S if host.error is None else math.inf for host in self.hosts]
        await asyncio.gather(*(host.refresh_tags(age) for host, age in zip(self.hosts, ages, strict=True)))

    async def refresh_loaded(self) -> None:
        """Refresh `loaded` from the hosts, except those whose last listing failed; returns after 2 s at the latest."""
        await asyncio.gather(*(host.refresh_loaded(0) for host in self.hosts if host.error is None))

    async def close(self) -> None:
        self._sweeper.stop()
        for host in self.hosts:
            host.holders -= self._started
            if host.holders <= 0:
                await host.close()
        self._started = False

    # -- models ----------------------------------------------------------------------------------------------------

    def model(self, name: str, *, pull: bool = True, asked: str = "") -> OllamaModel:
        """The model of that name, which need not exist yet. With `pull`, a request to it may pull it. `asked` is the
        client's name for it."""
        return OllamaModel(self, name, pull=pull, asked=asked)

    def item(self, name: str) -> Json | None:
        """Its item of /api/tags, from the first host that has it."""
        return self._first(name, lambda host: host.tags)

    def card(self, name: str) -> ModelInfo:
        """What is known of it: its item of /api/tags, and the configuration."""
        item, key = self.item(name), key_of(name)
        info = ModelInfo(name, num_ctx=self._pinned.get(key) or 0, native={KIND: item} if item is not None else {})
        return info.configured(self._cards[key], self._cards[key].title) if key in self._cards else info

    def filters(self, name: str) -> FiltersConfig | None:
        """Those of the configuration."""
        configured = self._cards.get(key_of(name))
        return configured.filters if configured is not None else None

    def loaded_item(self, name: str) -> Json | None:
        """Its item of /api/ps, likewise."""
        return self._first(name, lambda host: host.loaded)

    def may_pull(self, name: str) -> bool:
        """Whether a request for this model, if no host has it, pulls it."""
        return self._pulls and is_ollama_name(name) and self._serves(key_of(name))

    def pull(self, name: str, headers: Headers = ()) -> Download:
        """The download of the model in progress, or a new one, by the host that has it, else by the least busy one.
        Independent of `ollama.pull`, which applies to requests that use the model. `headers` are the client's.

        The download raises ModelNotFound with Ollama's message, or UpstreamFailed (code `pull_failed` for any other
        error reported by Ollama). Raises: BadRequest.
        """
        if not is_ollama_name(name):
            raise BadRequest("invalid model name", param="model")
        key = key_of(name)
        return self._downloads.join(
            f"ollama {key}", partial(self._pull, key, name, headers)
        )  # differs from the names of downloads from the hub

    async def ensure_pulled(self, name: str, request: UpstreamRequest) -> None:
        """Return once the model has been pulled for `request`. A refusal by Ollama is cached for 10 s.

        Raises: what the download raises.
        """
        until, refusal = self._refusals.get(key_of(name), (-math.inf, None))
        if refusal is not None and asyncio.get_running_loop().time() < until:
            raise own(refusal)
        download = self.pull(name, request.headers)
        with described(request.progress, download.described), noted(request.journal, StepKind.DOWNLOAD, name):
            await download.wait()

    def num_ctx(self, name: str, requested: int | None) -> int | None:
        """The context size in tokens to send with a request for the model; None to send none. `requested` is the
        client's.

        A configured `ctx` always takes precedence. Otherwise the size only grows: it is never smaller than the one the
        model is loaded with, because any other size, also a smaller one, makes Ollama reload the model. A size applies
        to other requests only once a request with it returned status 200, or Ollama lists the model as loaded with it.
        It is reset when the model is unloaded.

        A request without a size gets that of others only if it is not smaller than Ollama's own, as far as that is
        known. A size chosen by Ollama itself is sent only if a client requests a smaller one.
        """
        key = key_of(name)
        if key in self._pinned:
            return self._pinned[key]
        self._forget_unloaded()
        loaded = self._loaded_sizes(key)
        size = self._contexts[key].size(loaded) if key in self._contexts else 0
        if requested is not None and requested > 0:
            return max(requested, size, *loaded)
        default = self._defaults.get(key) or max(self._defaults.values(), default=0)
        return size if 0 < default <= size else None

    async def track_context(
        self, name: str, num_ctx: int | None, answer: Awaitable[UpstreamResponse]
    ) -> UpstreamResponse:
        """Await the `answer` to a request with this `num_ctx`, which applies to other requests if it succeeds; without
        one, Ollama's own size is looked up afterwards, unless it has been."""
        key = key_of(name)
        if key in self._pinned:
            return await answer
        self._sweeper.wake()
        context = self._contexts.setdefault(key, Context())
        if num_ctx is not None:
            return await context.track(num_ctx, answer)
        before = [] if context.looked else self._loaded_sizes(key)
        response = await answer
        if response.status == 200 and not context.looked and not context.pending:
            context.looked = True
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self.refresh_loaded()
            if (default := context.default_of(before, self._loaded_sizes(key))) > 0:
                self._defaults[key] = default
        return response

    def _loaded_sizes(self, key: str) -> list[int]:
        return [host.context_length(key) for host in self.hosts]

    def mark_used(self, name: str) -> None:
        """Record a use of the model: it may be loaded although no host lists it yet."""
        if (context := self._contexts.get(key_of(name))) is not None:
            context.used_at = asyncio.get_running_loop().time()

    def _sweep(self) -> bool:
        """Called periodically while there are context sizes, so that they are reset also without requests."""
        self._refresh()
        self._forget_unloaded()
        return bool(self._contexts)

    def _forget_unloaded(self) -> None:
        """Reset the context sizes of models that no available host has listed as loaded since their last use."""
        looked_at = min((host.loaded_at for host in self.hosts if host.error is None), default=math.inf)
        for key, context in list(self._contexts.items()):
            in_use = context.pending or any(host.has_loaded(key) for host in self.hosts)
            if context.used_at < looked_at and not in_use:
                del self._contexts[key]

    async def _pull(self, key: str, name: str, headers: Headers, report: Callable[[Progress], None]) -> None:
        now = asyncio.get_running_loop().time
        self._refusals = {key: kept for key, kept in self._refusals.items() if now() < kept[0]}
        self._refusals.pop(key, None)
        try:
            await self._pull_from_hosts(key, name, headers, report)
        except (ModelNotFound, UpstreamFailed) as exc:
            if exc.code in (ModelNotFound.code, PULL_FAILED):
                self._refusals[key] = now() + REFUSAL_KEPT_S, exc
            raise

    async def _pull_from_hosts(self, key: str, name: str, headers: Headers, report: Callable[[Progress], None]) -> None:
        failure: UpstreamFailed | None = None
        for host in sorted(self._ranked(key), key=lambda host: (host.error is not None, key not in host.tags)):
            try:
                return await host.pull(name, headers, report)
            except UpstreamFailed as exc:
                if failure is None or failure.code != PULL_FAILED:  # Ollama's own message is the most specific one
                    failure = exc
        raise failure or UpstreamFailed("no Ollama host is configured")

    # -- hosts -----------------------------------------------------------------------------------------------------

    def _serves(self, key: str) -> bool:
        return self._serves_all or key in self._named

    def _has(self, key: str) -> bool:
        return any(key in host.tags for host in self.hosts)

    def _ranked(self, key: str) -> list[OllamaHost]:
        return sorted(self.hosts, key=lambda host: (host.error is not None, not host.has_loaded(key), host.in_flight))

    def best_host(self, key: str) -> OllamaHost:
        """The preferred host for the model."""
        return self._ranked(key)[0]

    def _refresh(self) -> None:
        for host in self.hosts:
            host.refresh()

    async def _update_holders(self, key: str) -> None:
        """Refresh the hosts' listings; those that were down only if the others do not have the model."""
        for down in (False, True):
            hosts = [host for host in self.hosts if (host.error is not None) is down]
            await asyncio.gather(*(host.refresh_tags(LISTING_PAUSE_S) for host in hosts))
            if self._has(key):
                return

    def _merged(self, source: Callable[[OllamaHost], dict[str, Json]]) -> list[Json]:
        self._refresh()
        merged: dict[str, Json] = {}
        for host in self.hosts:
            for key, item in source(host).items():
                if self._serves(key):
                    merged.setdefault(key, item)
        return list(merged.values())

    def _first(self, name: str, source: Callable[[OllamaHost], dict[str, Json]]) -> Json | None:
        key = key_of(name)
        return next((found for host in self.hosts if (found := source(host).get(key)) is not None), None)

    def missing(self, name: str) -> ModelNotFound | UpstreamFailed:
        """The error for a model without a host: none has it, or none is available."""
        return UpstreamFailed(self.down) if self.down is not None else ModelNotFound(f"model {name[:100]!r} not found")

    def unavailable(self, names: Sequence[str]) -> list[str]:
        """Those that no host has, and that a request does not pull; none while a host does not answer, as it may."""
        if any(host.error is not None for host in self.hosts):
            return []
        return [name for name in names if not self._has(key_of(name)) and not self.may_pull(name)]

    @property
    def down(self) -> str | None:
        """Why no host is available; None if one is, as far as known."""
        errors = [host.error for host in self.hosts if host.error is not None]
        return f"no Ollama host answers: {'; '.join(errors)}" if len(errors) == len(self.hosts) else None
