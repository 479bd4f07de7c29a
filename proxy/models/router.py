"""From the model name in a request to the backend that holds the model; and the catalogue of all there are."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from llama_smart_proxy.backends.base import Model
from llama_smart_proxy.backends.llamacpp.spawned import SpawnedModel
from llama_smart_proxy.backends.ollama.hosts import Hosts
from llama_smart_proxy.backends.openai import Remote, RemoteModel
from llama_smart_proxy.backends.pool.pool import Pool
from llama_smart_proxy.backends.weights import hub
from llama_smart_proxy.backends.weights.downloads import Downloads
from llama_smart_proxy.proxy.config import Config, ModelConfig
from llama_smart_proxy.proxy.errors import BadRequest, ModelNotFound, UpstreamFailed
from llama_smart_proxy.proxy.models.local import LocalModels

SHOWN_NAMES = 20
"""Most names listed in an error message."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a request goes: `backend`, and the id by which it knows the model. `virtual` is the name of the virtual
    model that was asked for, if it was one."""

    backend: Model
    model: str
    virtual: str = ""

    @property
    def name(self) -> str:
        """The model that was asked for."""
        return self.virtual or self.model


@dataclass(slots=True)
class Entry:
    """One line of a model list."""

    id: str
    owner: str
    state: str
    aliases: list[str] = field(default_factory=list)
    error: str | None = None

    def as_openai(self, created: int) -> dict[str, Any]:
        """The item of `/v1/models`, with `status` as llama-server's router mode writes it (Open WebUI reads it)."""
        status: dict[str, Any] = {"value": self.state}
        if self.error:
            status |= {"failed": True, "error": self.error}
        return {
            "id": self.id,
            "object": "model",
            "created": created,
            "owned_by": self.owner,
            "aliases": self.aliases,
            "status": status,
        }


class Router:
    """Knows every model. Lookup order: configured models and their aliases, `models_dir`, the local Hugging Face cache,
    remotes in config order, the Ollama hosts."""

    def __init__(self, config: Config, pool: Pool, downloads: Downloads) -> None:
        self.pool = pool
        self.downloads = downloads
        self.local = LocalModels(config, pool)
        self.remotes = [Remote(name, remote) for name, remote in config.remotes.items()]
        self.ollama: Hosts | None = None
        if config.uses_ollama:
            by_ollama = {name: model for name, model in config.models.items() if config.backend_of(name) == "ollama"}
            self.ollama = Hosts(config.ollama, downloads, by_ollama)
        self.created = int(time.time())
        self._names = spelled(config.models | config.virtual)
        self._base = {name: str(model.model) for name, model in config.virtual.items()}
        self._virtual_aliases = {name: list(model.aliases) for name, model in config.virtual.items()}
        self._places = config.server_pool.size

    async def resolve(self, name: object, *, pull: bool = True) -> Target:
        """The target for the `model` of a request; with one local model in all, none need be named.

        With `pull`, a model that nobody has is looked for on the hub of an Ollama, once it is asked.

        Raises: BadRequest for a name that is no text, ModelNotFound.
        """
        if not isinstance(name, str) or not name:
            return self._unnamed(name)
        key = name.lower()
        if (known := self._names.get(key) or self._names.get(key.removesuffix(":latest"))) in self._base:
            return replace(await self._find(self._base[known], pull=pull), virtual=known)
        return await self._find(name, pull=pull)

    async def _find(self, name: str, *, pull: bool) -> Target:
        target = self._known(name) or await self._ask_around(name)
        if target is None and pull and self.ollama is not None and self.ollama.may_pull(name):
            return Target(self.ollama.model(name), name)
        if target is None:
            if self.ollama is not None and isinstance(error := self.ollama.missing(name), UpstreamFailed):
                raise error
            raise self._not_found(name)
        return target

    def _known(self, name: str) -> Target | None:
        """The target of that name as far as memory goes: a model of ours, one of a remote, `remote/model`."""
        spawned = self.local.get(name)
        if spawned is not None:
            return Target(spawned, spawned.name)
        for remote in self.remotes:
            if name in remote.models:
                return Target(RemoteModel(remote, name), name)
        for remote in self.remotes:
            own = name.removeprefix(f"{remote.name}/")
            if own in remote.models:
                return Target(RemoteModel(remote, own), own)
        return self._of_ollama(self.ollama.known(name)) if self.ollama is not None else None

    async def _ask_around(self, name: str) -> Target | None:
        """The same after looking at the cache again, and asking all servers what they have now."""
        if hub.parse_name(name) is not None:
            await self.local.refresh(at_once=True)
            if (spawned := self.local.get(name)) is not None:
                return Target(spawned, spawned.name)
        for remote in sorted(self.remotes, key=lambda remote: not name.startswith(f"{remote.name}/")):
            for model in dict.fromkeys((name.removeprefix(f"{remote.name}/"), name)):
                if await remote.find(model):
                    return Target(RemoteModel(remote, model), model)
        return self._of_ollama(await self.ollama.find(name)) if self.ollama is not None else None

    def _of_ollama(self, model: str | None) -> Target | None:
        return Target(self.ollama.model(model), model) if self.ollama is not None and model is not None else None

    def _unnamed(self, name: object) -> Target:
        if name is not None and name != "":
            raise BadRequest("model must be a string", param="model")
        only = self.local.only_one
        if only is None or self.remotes or self.ollama is not None:
            raise BadRequest("model is required", param="model")
        return Target(only, only.name)

    def _not_found(self, name: str) -> ModelNotFound:
        known = sorted(entry.id for entry in self.catalogue())
        more = f" and {len(known) - SHOWN_NAMES} more" if len(known) > SHOWN_NAMES else ""
        listing = f"known models: {', '.join(known[:SHOWN_NAMES])}{more}" if known else "no model is configured"
        return ModelNotFound(f"model {name[:100]!r} not found", hint=listing)

    def catalogue(self) -> list[Entry]:
        """Every model, from memory: no server is asked, so a dead one delays nobody."""
        entries = [_entry(spawned) for spawned in self.local.all()]
        for remote in self.remotes:
            entries += [_entry(RemoteModel(remote, model)) for model in remote.models]
        if self.ollama is not None:
            entries += [_entry(self.ollama.model(model)) for model in self.ollama.models]
        states = {entry.id: entry.state for entry in entries}
        for name, base in self.virtual.items():
            state = states.get(base, "unloaded")
            entries.append(Entry(name, "llama-smart-proxy", state, self._virtual_aliases[name]))
        named: dict[str, Entry] = {}
        for entry in entries:
            named.setdefault(entry.id, entry)  # of two with the same name the first is the one served
        return list(named.values())

    @property
    def virtual(self) -> dict[str, str]:
        """The virtual models, and the id of the model that each of them is, as far as memory goes."""
        return {name: target.model if (target := self._known(base)) else base for name, base in self._base.items()}

    async def fitting(self, names: Sequence[str]) -> list[list[str]]:
        """`names` in groups of models that can be loaded at one time; first those that are. Only models of ours take a
        place. Raises: ModelNotFound."""
        targets = [(name, await self.resolve(name)) for name in names]
        ours = {target.model for _, target in targets if isinstance(target.backend, SpawnedModel)}
        loaded = [model for model in ours if self.pool.state(model) == "loaded"]
        order = [*loaded, *sorted(ours - set(loaded))]
        room = max(1, self._places - self.pool.pinned_besides(ours))
        group = {model: position // room for position, model in enumerate(order)}
        groups: dict[int, list[str]] = {}
        for name, target in targets:
            groups.setdefault(group.get(target.model, 0) if target.model in ours else 0, []).append(name)
        return [groups[number] for number in sorted(groups)]

    def entry(self, target: Target) -> Entry:
        """The line of one model."""
        if target.virtual:
            entry = self.entry(replace(target, virtual=""))
            aliases = self._virtual_aliases[target.virtual]
            return replace(entry, id=target.virtual, owner="llama-smart-proxy", aliases=aliases)
        return _entry(target.backend)

    async def heard_of_all(self, limit_s: float) -> None:
        """Return when every source of models has been heard of once since the start, or after `limit_s` seconds."""
        asked: list[Any] = [remote.listed() for remote in self.remotes]
        if self.ollama is not None:
            asked.append(self.ollama.listed())
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await asyncio.gather(self.local.refresh(), *asked)

    def start(self) -> None:
        """Begin to learn what the servers of others offer."""
        for remote in self.remotes:
            remote.begin_listing()
        if self.ollama is not None:
            self.ollama.start()

    async def close(self) -> None:
        await self.downloads.close()
        for remote in self.remotes:
            await remote.close()
        if self.ollama is not None:
            await self.ollama.close()


def spelled(models: Mapping[str, ModelConfig]) -> dict[str, str]:
    """The names of `models` by all their names in lower case."""
    return {key.lower(): name for name, model in models.items() for key in (name, *model.aliases)}


def _entry(model: Model) -> Entry:
    return Entry(model.name, model.owner, model.state.value, list(model.aliases), model.state.error)
