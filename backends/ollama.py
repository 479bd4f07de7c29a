"""Ollama servers as one: which of them answers a request, and models that none of them has yet."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from backends import Call
from backends.downloads import Download, Downloads, Progress
from backends.exchange import Response
from backends.ollama_host import Json, OllamaHost, key_of
from backends.remote import LISTING_PAUSE_S
from backends.sweep import Sweeper
from proxy.config import ModelConfig, OllamaConfig, checked_name
from proxy.errors import BadRequest, ModelNotFound, UpstreamFailed

logger = logging.getLogger(__name__)

LOADED_STALE_S = 30.0
"""How old the knowledge of what is loaded may be for a request to go by it."""


@dataclass(slots=True)
class _Context:
    """The `num_ctx` last asked of a model, and when it was last in use, on the event loop's clock."""

    size: int = 0
    used_at: float = -math.inf


class Ollama:
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
        self._watch = Sweeper(LOADED_STALE_S, self._look)

    # -- what there is ---------------------------------------------------------------------------------------------

    @property
    def models(self) -> tuple[str, ...]:
        """The names of all models: those that the hosts list, as these write them, and those of the configuration."""
        held = {key_of(item["name"]): str(item["name"]) for item in self.items()}
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

    def status(self) -> list[dict[str, Any]]:
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
        if not self._held(key) and _is_name(name):
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

    def model(self, name: str) -> OllamaModel:
        """The model of that name, whether a host has it yet or not."""
        return OllamaModel(self, name)

    def may_pull(self, name: str) -> bool:
        """Whether a request for a model that no host has would have it pulled."""
        return self._pulls and _is_name(name) and self._serves(key_of(name))

    def pull(self, name: str) -> Download:
        """The download of the model, by the host that has it, else by the least busy one: the one under way, or a new
        one. Allowed whatever `ollama.pull` says: that is about requests that need the model.

        It raises ModelNotFound in Ollama's words, UpstreamFailed. Raises: BadRequest.
        """
        if not _is_name(name):
            raise BadRequest("invalid model name", param="model")
        return self._downloads.join(key_of(name), partial(self._pull, name))

    def num_ctx(self, name: str, asked: int | None) -> int | None:
        """See `OllamaModel.num_ctx`."""
        key = key_of(name)
        if key in self._pinned:
            return self._pinned[key]
        self._forget_unloaded()
        self._watch.wake()
        context = self._contexts.setdefault(key, _Context())
        if asked is not None and asked > 0:
            sizes = [int(host.loaded[key].get("context_length") or 0) for host in self.hosts if key in host.loaded]
            context.size = max(asked, context.size, *sizes)
        self.used(name)
        return context.size or None

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
            if context.used_at < looked_at and not any(host.has_loaded(key) for host in self.hosts):
                del self._contexts[key]

    async def _pull(self, name: str, tell: Callable[[Progress], None]) -> None:
        key = key_of(name)
        failure = UpstreamFailed("no Ollama host is configured")
        for host in sorted(self._ranked(key), key=lambda host: (host.error is not None, key not in host.tags)):
            try:
                return await host.pull(name, tell)
            except UpstreamFailed as exc:
                failure = exc
        raise failure

    # -- hosts -----------------------------------------------------------------------------------------------------

    def _serves(self, key: str) -> bool:
        return self._serves_all or key in self._named

    def _held(self, key: str) -> bool:
        return any(key in host.tags for host in self.hosts)

    def _ranked(self, key: str) -> list[OllamaHost]:
        return sorted(self.hosts, key=lambda host: (host.error is not None, not host.has_loaded(key), host.in_flight))

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

    def missing(self, name: str) -> ModelNotFound | UpstreamFailed:
        """Why there is no host for the model: none has it, or none answers."""
        errors = [host.error for host in self.hosts if host.error is not None]
        if len(errors) == len(self.hosts):
            return UpstreamFailed(f"no Ollama host answers: {'; '.join(errors)}")
        return ModelNotFound(f"model {name[:100]!r} not found")


class OllamaModel:
    """`Backend` for one model on whichever host is best placed; pulled first if none has it and that is allowed."""

    speaks: ClassVar[frozenset[str]] = OllamaHost.speaks

    def __init__(self, ollama: Ollama, name: str) -> None:
        self.ollama = ollama
        self.name = name
        self._key = key_of(name)

    def num_ctx(self, asked: int | None) -> int | None:
        """The context size to send for a client that asked for `asked` tokens, or for none; None: send none.

        A pinned one (`ctx` of the configured model) is always that. Otherwise it only grows: a request never asks for
        less than the model is loaded with, because any other size, also a smaller one, makes Ollama load the model
        anew. Once the model was unloaded, it begins afresh. A size that Ollama itself chose is never asked for, unless
        a client wants one that is smaller.
        """
        return self.ollama.num_ctx(self.name, asked)

    @asynccontextmanager
    async def open(self, call: Call) -> AsyncIterator[Response]:
        """Raises: BadRequest, ModelNotFound, UpstreamFailed."""
        async with AsyncExitStack() as stack:
            try:
                yield await self._begin(call, stack)
            finally:
                self.ollama.used(self.name)

    async def _begin(self, call: Call, stack: AsyncExitStack) -> Response:
        response = await self._try_holders(call, stack)
        if response is None:
            if not self.ollama.may_pull(self.name):
                raise self.ollama.missing(self.name)
            await self.ollama.pull(self.name).wait()
            response = await self._try_holders(call, stack)
        if response is None:
            raise UpstreamFailed(f"Ollama has pulled '{self.name}' and does not list it")
        return response

    async def _try_holders(self, call: Call, stack: AsyncExitStack) -> Response | None:
        """The answer of the first host that gives one; None if none has the model.

        A host that cannot be reached is passed over. So is one that says it has no such model, if it no longer lists
        it: somebody has deleted it there.
        """
        failure: UpstreamFailed | None = None
        for host in await self.ollama.holders(self.name):
            try:
                response = await stack.enter_async_context(host.open(call, self._key))
            except UpstreamFailed as exc:
                logger.warning("%s did not answer for %s: %s", host.url, self.name, exc)
                failure = exc
                continue
            if response.status == 404:
                await host.listed(0)
            if self._key in host.tags:
                return response
            await stack.aclose()
        if failure is not None:
            raise failure
        return None


def _is_name(name: str) -> bool:
    """Whether `name` can be a model's, so that Ollama may be asked to pull it."""
    try:
        return bool(checked_name(name))
    except ValueError:
        return False
