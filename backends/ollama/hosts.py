"""Ollama servers as one: which of them answers a request, and models that none of them has yet."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from llama_smart_proxy.backends.base import Json
from llama_smart_proxy.backends.http.exchange import UpstreamResponse
from llama_smart_proxy.backends.http.sweep import Sweeper
from llama_smart_proxy.backends.names import key_of
from llama_smart_proxy.backends.ollama.host import PULL_FAILED, OllamaHost, is_name
from llama_smart_proxy.backends.ollama.model import OllamaModel
from llama_smart_proxy.backends.openai import LISTING_PAUSE_S
from llama_smart_proxy.backends.weights.downloads import Download, Downloads, Progress
from llama_smart_proxy.proxy.config import ModelConfig, OllamaConfig
from llama_smart_proxy.proxy.errors import BadRequest, ModelNotFound, ProxyError, UpstreamFailed

logger = logging.getLogger(__name__)

Headers = Sequence[tuple[str, str]]

LOADED_STALE_S = 30.0
"""How old the knowledge of what is loaded may be for a request to go by it."""
REFUSAL_KEPT_S = 10.0
"""How long requests for a model that Ollama could not pull get the same error, without another try."""


@dataclass(slots=True)
class _Context:
    """What requests have shown about the context sizes of one model.

    `worked` is the largest that was answered with, `trying` are those of requests that wait for their answer, `failed`
    is the last one that had no success. `used_at` is when the model was last in use, on the event loop's clock.
    """

    worked: int = 0
    trying: list[int] = field(default_factory=list)
    failed: int = 0
    used_at: float = -math.inf

    def size(self, loaded: list[int]) -> int:
        """The size to send, 0 for none, if a host or more has the model `loaded` with these.

        One that is only being tried counts too, or clients that begin together would have the model loaded in turns;
        but not if it failed before: nobody else shall fail with it.
        """
        if self.failed in loaded:  # who asked for it left before the answer
            self.worked = max(self.worked, self.failed)
        return max(self.worked, *(size for size in self.trying if size != self.failed), 0)

    async def tried(self, size: int, answer: Awaitable[UpstreamResponse]) -> UpstreamResponse:
        """The `answer` to a request with that size; it shows whether the size works."""
        self.trying.append(size)
        worked = False
        try:
            response = await answer
            worked = response.status == 200
            return response
        finally:
            self.trying.remove(size)
            if worked:
                self.worked = max(self.worked, size)
            else:
                self.failed = size


class Hosts:
    """All Ollama hosts, and the models of backend `ollama` that are `configured`, by name. Names are Ollama's: their
    case does not matter, nor does a `:latest` that is there or missing.

    What is no coroutine answers from memory at once, and has what is old asked for in the background.
    """

    def __init__(self, config: OllamaConfig, downloads: Downloads, configured: Mapping[str, ModelConfig]) -> None:
        self.hosts = [OllamaHost(url, config) for url in config.urls]
        self._pulls = config.pull == "auto"
        self._downloads = downloads
        self._named = {key_of(name): name for name in (*configured, *(config.models or ()))}
        self._serves_all = config.models is None
        self._pinned = {key_of(name): model.ctx for name, model in configured.items() if model.ctx}
        self._contexts: dict[str, _Context] = {}
        self._refusals: dict[str, tuple[float, ProxyError]] = {}
        self._watch = Sweeper(LOADED_STALE_S, self._look)

    # -- what there is ---------------------------------------------------------------------------------------------

    @property
    def models(self) -> tuple[str, ...]:
        """The names of all models: those that the hosts list, as these write them, and those of the configuration."""
        held = {key_of(item["name"]): str(item["name"]) for item in (*self.items(), *self.loaded())}
        return tuple((held | {key: name for key, name in self._named.items() if key not in held}).values())

    def items(self) -> list[Json]:
        """What /api/tags answers: the items of all hosts; of a model that several have, the item of the first one."""
        return self._merged(lambda host: host.tags)

    def loaded(self) -> list[Json]:
        """What /api/ps answers, likewise."""
        return self._merged(lambda host: host.loaded)

    def has_loaded(self, name: str) -> bool:
        """Whether a host has the model in memory."""
        self._refresh()
        return any(key_of(name) in host.loaded for host in self.hosts)

    @property
    def version(self) -> str | None:
        """Ollama's version, of the first host that told it."""
        return next((host.version for host in self.hosts if host.version), None)

    def status(self) -> list[Json]:
        """Each host, for operators; `error` only if it did not answer the last time."""
        return [
            {
                "name": "ollama",
                "url": host.url,
                "version": host.version,
                "models": len(host.tags),
                "loaded": [item["name"] for item in host.loaded.values()],
                "in_flight": host.in_flight,
            }
            | ({"error": host.error} if host.error else {})
            for host in self.hosts
        ]

    def known(self, name: str) -> str | None:
        """The name by which the hosts know the model, or the configuration; None if none of them does."""
        key = key_of(name)
        if not self._serves(key):
            return None
        self._refresh()
        held = (str(host.tags[key]["name"]) for host in self.hosts if key in host.tags)
        return next(held, self._named.get(key))

    async def find(self, name: str) -> str | None:
        """The same, after asking all hosts anew if memory says no."""
        await self.holders(name)
        return self.known(name)

    async def holders(self, name: str) -> list[OllamaHost]:
        """The hosts that have the model, best first: one that answers, that has it loaded, that is least busy."""
        key = key_of(name)
        if not self._serves(key):
            return []
        self._refresh()
        if not self._held(key) and is_name(name):
            await self._ask_around(key)
        for host in self.hosts if len(self.hosts) > 1 else ():
            if host.error is None:
                await host.looked_up(LOADED_STALE_S)  # all of them were asked above, if need be
        return [host for host in self._ranked(key) if key in host.tags]

    async def host_for(self, name: str | None) -> OllamaHost:
        """The host that a request about the model goes to. A model that none has, or None, goes to the first that
        answers: always the same one, so that what is sent in parts (blobs, create) meets there."""
        found = await self.holders(name) if name is not None else []
        return found[0] if found else min(self.hosts, key=lambda host: host.error is not None)

    def start(self) -> None:
        """Begin to learn what the hosts have."""
        self._refresh()

    async def listed(self) -> None:
        """Return once every host has said what it has, or has been given up for now: after 2 s at the latest."""
        self._refresh()
        for host in self.hosts:
            await host.listed(math.inf)

    async def looked_up(self) -> None:
        """Return once `loaded` is what the hosts say now: after 2 s at the latest. Those that did not answer the last
        time are not waited for."""
        await asyncio.gather(*(host.looked_up(0) for host in self.hosts if host.error is None))

    async def close(self) -> None:
        self._watch.stop()
        for host in self.hosts:
            await host.close()

    # -- models ----------------------------------------------------------------------------------------------------

    def model(self, name: str, *, pull: bool = True) -> OllamaModel:
        """The model of that name, whether a host has it yet or not. With `pull`, a request to one that none has may
        have it pulled."""
        return OllamaModel(self, name, pull=pull)

    def item(self, name: str) -> Json | None:
        """Its item of /api/tags, from the first host that has it."""
        return self._first(name, lambda host: host.tags)

    def loaded_item(self, name: str) -> Json | None:
        """Its item of /api/ps, likewise."""
        return self._first(name, lambda host: host.loaded)

    def may_pull(self, name: str) -> bool:
        """Whether a request for a model that no host has would have it pulled."""
        return self._pulls and is_name(name) and self._serves(key_of(name))

    def pull(self, name: str, headers: Headers = ()) -> Download:
        """The download of the model, by the host that has it, else by the least busy one: the one under way, or a new
        one. Allowed whatever `ollama.pull` says: that is about requests that need the model. `headers` are those of the
        request for it.

        It raises ModelNotFound in Ollama's words, UpstreamFailed (code `pull_failed` if these are of something else).
        Raises: BadRequest.
        """
        if not is_name(name):
            raise BadRequest("invalid model name", param="model")
        key = key_of(name)
        return self._downloads.join(
            f"ollama {key}", partial(self._pull, key, name, headers)
        )  # the hub's have other names

    async def pulled(self, name: str, headers: Headers) -> None:
        """Return once the model has been pulled for a request. What Ollama said against it holds for 10 s.

        Raises: what the download raises.
        """
        until, refusal = self._refusals.get(key_of(name), (-math.inf, None))
        if refusal is not None and asyncio.get_running_loop().time() < until:
            raise refusal.with_traceback(None)
        await self.pull(name, headers).wait()

    def num_ctx(self, name: str, asked: int | None) -> int | None:
        """The context size to send with a request about the model, for a client that asked for `asked` tokens, or for
        none; None: send none.

        A pinned one (`ctx` of the configured model) is always that. Otherwise it only grows: a request never asks for
        less than the model is loaded with, because any other size, also a smaller one, makes Ollama load the model
        anew. But a size is kept for others only once a request with it was answered with status 200, or Ollama says
        that the model is loaded with it. Once the model was unloaded, it begins afresh. A size that Ollama itself chose
        is never asked for, unless a client wants one that is smaller.
        """
        key = key_of(name)
        if key in self._pinned:
            return self._pinned[key]
        self._forget_unloaded()
        loaded = [host.context_length(key) for host in self.hosts]
        size = self._contexts[key].size(loaded) if key in self._contexts else 0
        if asked is not None and asked > 0:
            size = max(asked, size, *loaded)
        return size or None

    async def tried(self, name: str, num_ctx: int | None, answer: Awaitable[UpstreamResponse]) -> UpstreamResponse:
        """The `answer` to a request about the model with this `num_ctx`, which is kept for others if it works."""
        key = key_of(name)
        if num_ctx is None or key in self._pinned:
            return await answer
        self._watch.wake()
        return await self._contexts.setdefault(key, _Context()).tried(num_ctx, answer)

    def used(self, name: str) -> None:
        """The model may be loaded from now on, although no host has said so yet."""
        if (context := self._contexts.get(key_of(name))) is not None:
            context.used_at = asyncio.get_running_loop().time()

    def _look(self) -> bool:
        """Now and then, as long as there are sizes to forget: they would stay for ever if nobody looked in time."""
        self._refresh()
        self._forget_unloaded()
        return bool(self._contexts)

    def _forget_unloaded(self) -> None:
        """Forget the context sizes of models of which every host that answers has said since that they are gone."""
        looked_at = min((host.loaded_at for host in self.hosts if host.error is None), default=math.inf)
        for key, context in list(self._contexts.items()):
            in_use = context.trying or any(host.has_loaded(key) for host in self.hosts)
            if context.used_at < looked_at and not in_use:
                del self._contexts[key]

    async def _pull(self, key: str, name: str, headers: Headers, tell: Callable[[Progress], None]) -> None:
        now = asyncio.get_running_loop().time
        self._refusals = {key: kept for key, kept in self._refusals.items() if now() < kept[0]}
        self._refusals.pop(key, None)
        try:
            await self._pull_somewhere(key, name, headers, tell)
        except (ModelNotFound, UpstreamFailed) as exc:
            if exc.code in (ModelNotFound.code, PULL_FAILED):
                self._refusals[key] = now() + REFUSAL_KEPT_S, exc
            raise

    async def _pull_somewhere(self, key: str, name: str, headers: Headers, tell: Callable[[Progress], None]) -> None:
        failure: UpstreamFailed | None = None
        for host in sorted(self._ranked(key), key=lambda host: (host.error is not None, key not in host.tags)):
            try:
                return await host.pull(name, headers, tell)
            except UpstreamFailed as exc:
                if failure is None or failure.code != PULL_FAILED:  # which says more than what came of the others
                    failure = exc
        raise failure or UpstreamFailed("no Ollama host is configured")

    # -- hosts -----------------------------------------------------------------------------------------------------

    def _serves(self, key: str) -> bool:
        return self._serves_all or key in self._named

    def _held(self, key: str) -> bool:
        return any(key in host.tags for host in self.hosts)

    def _ranked(self, key: str) -> list[OllamaHost]:
        return sorted(self.hosts, key=lambda host: (host.error is not None, not host.has_loaded(key), host.in_flight))

    def likeliest(self, key: str) -> OllamaHost:
        """The host that would be asked first."""
        return self._ranked(key)[0]

    def _refresh(self) -> None:
        for host in self.hosts:
            host.refresh()

    async def _ask_around(self, key: str) -> None:
        """Have the hosts list what they have now, those that were down only if the others do not have it."""
        for down in (False, True):
            hosts = [host for host in self.hosts if (host.error is not None) is down]
            await asyncio.gather(*(host.listed(LISTING_PAUSE_S) for host in hosts))
            if self._held(key):
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
        """Why there is no host for the model: none has it, or none answers."""
        errors = [host.error for host in self.hosts if host.error is not None]
        if len(errors) == len(self.hosts):
            return UpstreamFailed(f"no Ollama host answers: {'; '.join(errors)}")
        return ModelNotFound(f"model {name[:100]!r} not found")
