"""From the model name in a request to the backend that holds the model; and the catalogue of all there are."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Any

from backends.models import scan_models_dir
from backends.pool import Pool
from backends.remote import Remote
from backends.spawned import SpawnedModel
from proxy.config import Config, OllamaConfig, RemoteConfig
from proxy.errors import BadRequest, ConfigError, ModelNotFound

logger = logging.getLogger(__name__)

SHOWN_NAMES = 20
"""Most names listed in an error message."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a request goes: `backend`, and the id by which it knows the model."""

    backend: SpawnedModel | Remote
    model: str


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
    """Knows every model. Lookup order: configured models, their aliases, `models_dir`, remotes in config order."""

    def __init__(self, config: Config, pool: Pool) -> None:
        self.pool = pool
        self.remotes = [Remote(name, remote) for name, remote in config.remotes.items()]
        by_ollama = [name for name in config.models if config.backend_of(name) == "ollama"]
        if by_ollama or config.backend == "ollama" or "ollama" in config.model_fields_set:
            self.remotes.append(Remote("ollama", _ollama(config.ollama)))
        self.created = int(time.time())
        self._models_dir = config.llama_cpp.models_dir
        self._scanned_ns = -1
        self._configured = {
            name: SpawnedModel(pool, name, model) for name, model in config.models.items() if name not in by_ollama
        }
        self._found: dict[str, SpawnedModel] = {}
        self._by_key: dict[str, SpawnedModel] = {}
        for name, spawned in self._configured.items():
            for key in (name, *spawned.model.aliases):
                self._by_key[key.lower()] = spawned

    async def resolve(self, name: object) -> Target:
        """The target for the `model` of a request; with one local model in all, none need be named.

        Raises: BadRequest for a name that is no text, ModelNotFound.
        """
        if not isinstance(name, str) or not name:
            return self._unnamed(name)
        target = self._known(name) or await self._ask_around(name)
        if target is None:
            raise self._not_found(name)
        return target

    def _known(self, name: str) -> Target | None:
        """The target of that name as far as memory goes: a model of ours, one of a remote, `remote/model`."""
        spawned = self.local(name)
        if spawned is not None:
            return Target(spawned, spawned.name)
        for remote in self.remotes:
            if name in remote.models:
                return Target(remote, name)
        for remote in self.remotes:
            own = name.removeprefix(f"{remote.name}/")
            if own in remote.models:
                return Target(remote, own)
        return None

    async def _ask_around(self, name: str) -> Target | None:
        """The same after asking the remotes what they have now, first the one that the name begins with."""
        for remote in sorted(self.remotes, key=lambda remote: not name.startswith(f"{remote.name}/")):
            for model in dict.fromkeys((name.removeprefix(f"{remote.name}/"), name)):
                if await remote.find(model):
                    return Target(remote, model)
        return None

    def _unnamed(self, name: object) -> Target:
        if name is not None and name != "":
            raise BadRequest("model must be a string", param="model")
        ours = [*self._configured.values(), *self._scan().values()]
        if len(ours) != 1 or self.remotes:
            raise BadRequest("model is required", param="model")
        return Target(ours[0], ours[0].name)

    def _not_found(self, name: str) -> ModelNotFound:
        known = sorted(entry.id for entry in self.catalogue())
        more = f" and {len(known) - SHOWN_NAMES} more" if len(known) > SHOWN_NAMES else ""
        listing = f"known models: {', '.join(known[:SHOWN_NAMES])}{more}" if known else "no model is configured"
        return ModelNotFound(f"model {name[:100]!r} not found; {listing}", param="model")

    def local(self, name: str) -> SpawnedModel | None:
        """The model we would run ourselves under this name. Case is ignored, and a `:latest` that is not configured."""
        key = name.lower()
        plain = key.removesuffix(":latest")
        found = self._by_key.get(key) or self._by_key.get(plain)
        if found is None and self._models_dir is not None:
            files = self._scan()
            found = files.get(key) or files.get(plain)
        return found

    def catalogue(self) -> list[Entry]:
        """Every model, from memory: no server is asked, so a dead one delays nobody."""
        entries = [self._local_entry(spawned) for spawned in (*self._configured.values(), *self._scan().values())]
        seen = {entry.id for entry in entries}
        for remote in self.remotes:
            for model in remote.models:
                if model not in seen:
                    seen.add(model)
                    entries.append(_remote_entry(remote, model))
        return entries

    def entry(self, target: Target) -> Entry:
        """The line of one model."""
        if isinstance(target.backend, SpawnedModel):
            return self._local_entry(target.backend)
        return _remote_entry(target.backend, target.model)

    def start(self) -> None:
        """Begin to learn what the remotes offer."""
        for remote in self.remotes:
            remote.begin_listing()

    async def close(self) -> None:
        for remote in self.remotes:
            await remote.close()

    def _local_entry(self, spawned: SpawnedModel) -> Entry:
        state = self.pool.state(spawned.name)
        error = self.pool.failed(spawned.name) if state == "unloaded" else None
        return Entry(spawned.name, "llama.cpp", state, list(spawned.model.aliases), error)

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
            self._found = {
                name.lower(): self._found.get(name.lower()) or SpawnedModel(self.pool, name, model)
                for name, model in files.items()
                if name.lower() not in self._by_key
            }
        return self._found


def _remote_entry(remote: Remote, model: str) -> Entry:
    return Entry(model, remote.name, "loaded")


def _ollama(config: OllamaConfig) -> RemoteConfig:
    """An Ollama is reached through its OpenAI-compatible API."""
    return RemoteConfig(
        url=config.url,
        models=config.models,
        connect_timeout_s=config.connect_timeout_s,
        first_byte_timeout_s=config.first_byte_timeout_s,
        idle_timeout_s=config.idle_timeout_s,
    )
