"""Resolves the model name of a request to a model, whichever provider has it; and lists all models."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from typing import Any

from llama_smart_proxy.backends.base import Feature, Management, Model, ModelInfo, ModelState, Provider, ProviderStatus
from llama_smart_proxy.backends.names import checked_length, key_of, other_forms
from llama_smart_proxy.backends.weights.downloads import Download, Downloads
from llama_smart_proxy.proxy.config import Config, ModelConfig
from llama_smart_proxy.proxy.dialects.cards import Cards
from llama_smart_proxy.proxy.errors import BadRequest, ModelNotFound, ProxyError
from llama_smart_proxy.proxy.models.filters import filtered
from llama_smart_proxy.proxy.models.inspection import Look
from llama_smart_proxy.proxy.models.permit import Permit

CAPABILITIES_FRESH_S = 10.0
"""Age in seconds from which the capabilities of a model are read again."""
AWAITED = 256
"""Most models that a list waits for, as it does once for each."""
SHOWN_NAMES = 20
"""Most names listed in an error message."""
PULL_HINT = "; downloading others requires a key of scope admin, or server.inference_keys.may_pull: true"


@dataclass(frozen=True, slots=True)
class Route:
    """Where a request goes. `virtual` is the name of the virtual model that was requested; empty if it was none.
    `asked` is the name in the request; empty if there was none."""

    model: Model
    virtual: str = ""
    asked: str = ""

    @property
    def name(self) -> str:
        """The name of the requested model."""
        return self.virtual or self.model.name

    @property
    def shown(self) -> str:
        """The name in an answer: the one that was asked for."""
        return self.asked or self.model.name

    @property
    def sent(self) -> str:
        """The name for the model's server: the client's spelling of it if the answer repeats that."""
        return self.asked if self.asked and Feature.ECHO in self.model.features and self._is_same else self.model.name

    @property
    def renamed(self) -> bool:
        """Whether the server's answer would have another name than the one asked for."""
        return bool(self.asked) and Feature.ECHO in self.model.features and not self._is_same

    @property
    def _is_same(self) -> bool:
        return self.asked == self.model.name or key_of(self.asked) == key_of(self.model.name)


@dataclass(frozen=True, slots=True)
class Entry:
    """One item of a model list. `model` is None for a virtual model whose base model is not known."""

    id: str
    owner: str
    aliases: Sequence[str]
    model: Model | None
    tags: Sequence[str] = ()
    virtual: ModelConfig | None = None

    @property
    def info(self) -> ModelInfo:
        """What is known of it, from memory."""
        base = self.model.card if self.model is not None else ModelInfo(self.id)
        return base if self.virtual is None else base.configured(self.virtual, self.virtual.title or self.id)

    @property
    def place(self) -> str:
        """Where it runs, for users; empty if that is not known."""
        if self.model is None:
            return ""
        return "this machine" if Feature.FILES in self.model.features else self.model.owner

    def as_openai(self, created: int) -> dict[str, Any]:
        """The item of `/v1/models`, with `status` as llama-server's router mode writes it (Open WebUI reads it). All
        names are in `aliases`, as llama-server lists them. A model that the proxy cannot unload is never `loaded`:
        there would be a button to do so."""
        state = self.model.state if self.model is not None else ModelState("unloaded")
        ours = self.model is not None and Feature.LOADING in self.model.features
        status: dict[str, Any] = {"value": state.value if ours else "unloaded"}
        if state.error:
            status |= {"failed": True, "error": state.error}
        return {
            "id": self.id,
            "object": "model",
            "created": created,
            "owned_by": self.owner,
            "aliases": list(dict.fromkeys([self.id, *self.aliases])),
            "tags": list(self.tags),
            "status": status,
        }


class Router:
    """Finds models in the `providers`, in their order, and in what they have in memory before they query servers.
    `created` is the time of its construction in seconds since 1970. One that is `limited` finds and lists no others
    than its permit allows, as if there were none."""

    def __init__(self, providers: Sequence[Provider], config: Config, downloads: Downloads) -> None:
        self.downloads = downloads
        self.created = int(time.time())
        self._providers = providers
        self._virtual = config.virtual
        self._names = names_by_key(config.models | config.virtual)
        self.cards = Cards()
        self._permit: Permit | None = None
        self._described: set[tuple[str, str]] = set()
        self._capabilities: dict[tuple[str, str], tuple[float, Sequence[str]]] = {}

    def limited(self, permit: Permit | None) -> Router:
        """The same router for a client with this permit; None: all models exist for it."""
        if permit is None:
            return self
        router = copy(self)
        router._permit = permit
        return router

    def including(self, model: Model) -> Router:
        """The same router, in which this model exists: for the agents of a request that has been routed to it."""
        return self.limited(self._permit.including(model.name) if self._permit is not None else None)

    # -- names -----------------------------------------------------------------------------------------------------

    async def resolve(self, name: object, *, pull: bool = True) -> Route:
        """The route for the `model` of a request, which may be empty if there is only one local model.

        With `pull`, a provider may return a model that it downloads for its first request.

        Raises: BadRequest for a name that is not a string or too long, ModelNotFound, or a provider's `missing` error.
        """
        return (await self._resolve(name, pull=pull))[1]

    async def find(self, name: str, *, pull: bool) -> Model | None:
        """The model of that name, other than a virtual one; None if there is none."""
        model = self._permitted((await self._locate(checked_length(name), pull=pull) or (None, None))[1])
        return filtered(model) if model is not None else None

    def known(self, name: str) -> Model | None:
        """Like `find`, but from memory only; never downloads."""
        return self._permitted(self._known(name))

    def _known(self, name: str) -> Model | None:
        return (self._remembered(checked_length(name), pull=False) or (None, None))[1]

    def _permitted(self, model: Model | None) -> Model | None:
        permit = self._permit
        return model if permit is None or model is None or permit.allows((model.name, *model.aliases)) else None

    async def _resolve(self, name: object, *, pull: bool) -> tuple[Provider, Route]:
        if self._permit is None:
            return await self._resolve_any(name, pull=pull)
        return await self._resolve_for(self._permit, name, pull=pull)

    async def _resolve_for(self, permit: Permit, name: object, *, pull: bool) -> tuple[Provider, Route]:
        """The route, if it exists for a client with this permit. What is wrong with another model is not shown."""
        shown = checked_length(name) if isinstance(name, str) else ""
        hint = "" if permit.pulls or not pull else PULL_HINT
        try:
            provider, route = await self._resolve_any(name, pull=pull and permit.pulls)
        except ProxyError as exc:
            if shown and (isinstance(exc, ModelNotFound) or not permit.allows((shown,))):
                raise self._not_found(shown, hint) from None
            raise
        names = (route.model.name, *route.model.aliases)
        if not permit.allows((route.virtual, *self._virtual[route.virtual].aliases) if route.virtual else names):
            raise self._not_found(shown, hint) if shown else BadRequest("model is required", param="model")
        return provider, route

    async def _resolve_any(self, name: object, *, pull: bool) -> tuple[Provider, Route]:
        if not isinstance(name, str) or not name:
            return self._unnamed(name)
        checked_length(name)
        known = self._names.get(name.lower()) or self._spelled(name)
        virtual = known if known in self._virtual else ""
        base = str(self._virtual[virtual].model) if virtual else name
        located = await self._locate(base, pull=pull)
        if located is None:
            for provider in self._providers:
                if (error := provider.missing(base)) is not None:
                    raise error
            raise self._not_found(base)
        model = filtered(located[1], self._virtual[virtual].filters if virtual else None)
        return located[0], Route(model, virtual, name)

    def _spelled(self, name: str) -> str:
        """The configured model of that name in another spelling; empty if there is none."""
        return next((self._names[form.lower()] for form in other_forms(name) if form.lower() in self._names), "")

    async def _locate(self, name: str, *, pull: bool) -> tuple[Provider, Model] | None:
        if (found := self._remembered(name, pull=pull)) is not None:
            return found
        for provider in self._providers:
            model = await provider.find(name, pull=pull) or _in_other_form(provider, name, pull=pull)
            if model is not None:
                return provider, model
        return None

    def _remembered(self, name: str, *, pull: bool) -> tuple[Provider, Model] | None:
        """The first model of exactly this name, else the first of the same name in another spelling."""
        for provider in self._providers:
            model = provider.known(name, pull=pull)
            if model is not None and _is_called(model, name):
                return provider, model
        for provider in self._providers:
            model = provider.known(name, pull=pull) or _in_other_form(provider, name, pull=pull)
            if model is not None:
                return provider, model
        return None

    def _unnamed(self, name: object) -> tuple[Provider, Route]:
        if name is not None and name != "":
            raise BadRequest("model must be a string", param="model")
        first, *others = self._providers
        only = first.default
        if others or only is None:
            raise BadRequest("model is required", param="model")
        return first, Route(filtered(only))

    def _not_found(self, name: str, more_hint: str = "") -> ModelNotFound:
        known = sorted(entry.id for entry in self.catalogue())
        more = f" and {len(known) - SHOWN_NAMES} more" if len(known) > SHOWN_NAMES else ""
        listing = f"known models: {', '.join(known[:SHOWN_NAMES])}{more}" if known else "no model is configured"
        return ModelNotFound(f"model {name[:100]!r} not found", hint=listing + more_hint)

    # -- all models ------------------------------------------------------------------------------------------------

    def models(self) -> list[Model]:
        """Every model other than virtual ones, from memory."""
        return [
            model for provider in self._providers for model in provider.models() if self._permitted(model) is not None
        ]

    def catalogue(self) -> list[Entry]:
        """An entry for every model, from memory: a server that does not respond must not delay the list."""
        entries = [self.entry(Route(model)) for model in self.models()]
        entries += [self._virtual_entry(name, self._known(str(model.model))) for name, model in self._virtual.items()]
        named: dict[str, Entry] = {}
        for entry in entries:
            if self._permit is None or self._permit.allows((entry.id, *entry.aliases)):
                named.setdefault(entry.id, entry)  # of two with the same name, `resolve` returns the first
        return list(named.values())

    def entry(self, route: Route) -> Entry:
        """The entry of one model."""
        model = route.model
        if route.virtual:
            return self._virtual_entry(route.virtual, model)
        return Entry(model.name, model.owner, model.aliases, model, model.tags)

    def _virtual_entry(self, name: str, model: Model | None) -> Entry:
        virtual = self._virtual[name]
        return Entry(name, "llama-smart-proxy", virtual.aliases, model, virtual=virtual)

    def configures(self, name: str) -> bool:
        """Whether the configuration has it as the name or an alias of a model."""
        return name.lower() in self._names

    async def capabilities(self, model: Model) -> Sequence[str]:
        """What the model can do, by Ollama's names; empty if that is unknown. It may be some seconds old: reading the
        header of a file takes a thread, which is too much for every chat."""
        key, now = (model.kind, model.name), time.monotonic()
        read_at, known = self._capabilities.get(key, (-math.inf, ()))
        if now - read_at > CAPABILITIES_FRESH_S:
            known = (await model.info()).capabilities
            self._capabilities[key] = now, known
        return known

    async def described(self, limit_s: float) -> None:
        """Wait until each model has been looked up once, at most `limit_s` seconds, and for none a second time. A long
        list is not waited for."""
        new = {key: model for model in self.models() if (key := (model.kind, model.name)) not in self._described}
        if 0 < len(new) <= AWAITED:
            self._described.update(new)
            with suppress(TimeoutError):
                async with asyncio.timeout(limit_s):
                    await asyncio.gather(*(model.info() for model in new.values()), return_exceptions=True)

    async def listed(self, limit_s: float) -> None:
        """Wait until every provider has listed its models, at most `limit_s` seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await asyncio.gather(*(provider.listed() for provider in self._providers))

    async def reread(self, limit_s: float) -> None:
        """Look for added and removed models now, for at most `limit_s` seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await asyncio.gather(*(provider.reread() for provider in self._providers))

    async def fitting(self, names: Sequence[str]) -> list[list[str]]:
        """`names` in groups of models that can be loaded at the same time; those loaded now come first.

        Raises: ModelNotFound.
        """
        routes = [(name, *(await self._resolve(name, pull=True))) for name in names]
        group: dict[tuple[str, str], int] = {}
        for provider in self._providers:
            own = dict.fromkeys(route.model.name for _, owner, route in routes if owner is provider)
            for number, models in enumerate(await provider.fitting(list(own))):
                group |= {(provider.section, model): number for model in models}
        groups: dict[int, list[str]] = {}
        for name, owner, route in routes:
            groups.setdefault(group[owner.section, route.model.name], []).append(name)
        return [groups[number] for number in sorted(groups)]

    # -- downloads, management, lifetime ---------------------------------------------------------------------------

    def downloading(self) -> list[dict[str, Any]]:
        """The progress of all downloads."""
        found, permit = self.downloads.status(), self._permit
        return found if permit is None else [item for item in found if permit.allows((str(item["model"]),))]

    async def download(self, name: str, headers: Sequence[tuple[str, str]]) -> Download | None:
        """Start the download of a model, by the first provider that can; None if it is available already. `headers` are
        those of the client's request. Raises: BadRequest, ModelNotFound."""
        checked_length(name)
        for provider in self._providers:
            if provider.can_download(name):
                return await provider.download(name, headers)
        raise ModelNotFound(
            f"model {name[:100]!r} cannot be pulled: it is neither configured nor hf.co/org/repo:variant; names of "
            "Ollama's library require the section `ollama` in the configuration of the proxy"
        )

    async def management(self, api: str, model: str | None) -> Management | None:
        """The server that manages models by `api`, if `model` is given the one that has it; None if there is none."""
        for provider in self._providers:
            if (found := await provider.management(api, model)) is not None:
                return found
        return None

    def status(self) -> ProviderStatus:
        """The instances and servers of all providers."""
        statuses, permit = [provider.status() for provider in self._providers], self._permit
        instances = [instance for status in statuses for instance in status.instances]
        return ProviderStatus(
            [item for item in instances if permit is None or self._permitted(self._known(item["model"])) is not None],
            [server for status in statuses for server in status.servers],
        )

    @property
    def looks(self) -> dict[str, Look]:
        """How the problems of each provider are found, by its section."""
        return {provider.section: provider.problems for provider in self._providers}

    async def start(self) -> None:
        """Start every provider."""
        for provider in self._providers:
            await provider.start()

    async def close(self) -> None:
        """Close every provider; may be called repeatedly."""
        for provider in self._providers:
            await provider.close()


def _in_other_form(provider: Provider, name: str, *, pull: bool) -> Model | None:
    """The provider's model of that name in another spelling, from memory."""
    forms = other_forms(name)
    return next((model for form in forms if (model := provider.known(form, pull=pull)) is not None), None)


def _is_called(model: Model, name: str) -> bool:
    """Whether that is its name or an alias, but for case."""
    return name == model.name or name.lower() in map(str.lower, (model.name, *model.aliases))


def names_by_key(models: Mapping[str, ModelConfig]) -> dict[str, str]:
    """Maps every name and alias of `models`, in lower case, to the model's name."""
    return {key.lower(): name for name, model in models.items() for key in (name, *model.aliases)}
