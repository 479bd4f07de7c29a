"""The interface between the proxy and its backends: providers, the models they offer, and requests to those.

A provider implements one section of the configuration: the llama.cpp processes, the Ollama hosts, the remote servers.
It finds models by name. A model defines which APIs its server supports, how a request is sent, how it is loaded and
unloaded, and what is known about it. Callers never check the class of either. Backends transfer bytes: nothing in
`backends` depends on chats, dialects or agents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from llama_smart_proxy.backends.http.connection import Endpoint
    from llama_smart_proxy.backends.http.exchange import Timeouts, UpstreamResponse
    from llama_smart_proxy.backends.journal import Journal
    from llama_smart_proxy.backends.pool.launcher import PoolModel
    from llama_smart_proxy.backends.pool.output import Output
    from llama_smart_proxy.backends.pool.pool import Pool
    from llama_smart_proxy.backends.progress import Progress
    from llama_smart_proxy.backends.tasks import Task
    from llama_smart_proxy.backends.weights.downloads import Download, Downloads
    from llama_smart_proxy.proxy import config as configuration
    from llama_smart_proxy.proxy.errors import ProxyError

Json = dict[str, Any]


class Priority(IntEnum):
    """The class of a request for the scheduler; a lower value is served first."""

    PERSON = 0
    TASK = 1  # a background prompt of a chat UI, and side calls for one
    HELPER = 2  # a side call of an agent after the answer
    BATCH = 3


class Feature(StrEnum):
    """Capabilities of a model's server or provider beyond generating."""

    LOADING = "loading"  # the proxy can load and unload the model
    TOKENS = "tokens"  # /tokenize, /detokenize and /apply-template of llama-server
    ECHO = "echo"  # its server's answers contain the model's name as the request spelled it
    FILES = "files"  # its files are on this machine, and its provider can delete those that it downloaded
    RESUMABLE = "resumable"  # its streams go on without their client, by `X-Conversation-Id` of llama-server
    PROGRESS = "progress"  # it reports how much of a prompt it has processed, by "return_progress" of llama-server
    TOOLS = "tools"  # /tools and /mcp of llama-server, which may run commands on its machine


@dataclass(slots=True)  # not frozen: that costs a microsecond, for every request
class UpstreamRequest:
    """One HTTP request to a model's server.

    `path` includes the query string. `headers` are complete except for `Host`, `Content-Length` and credentials, which
    the connection adds. `slot`: the request generates, and occupies one of the server's parallel slots; `/props` or
    `/tokenize` do not. Without `wait`, a request that would have to wait for its model to load or for a free slot fails
    at once (`Overloaded`, code `no_slot_now`). `client` identifies the client, empty if unknown. `prepared` is the
    result of the model's `prepare` for this request. `progress`, if there is one, is kept up to date while it waits,
    and what it waited for is noted in its `journal`. `task` is set for a background prompt.
    """

    method: str
    path: str
    body: bytes = b""
    headers: Sequence[tuple[str, str]] = ()
    slot: bool = True
    wait: bool = True
    priority: Priority = Priority.PERSON
    client: str = ""
    prepared: object = None
    progress: Progress | None = None
    task: Task | None = None
    journal: Journal | None = None


@dataclass(frozen=True, slots=True)
class ModelState:
    """`value` is `loaded`, `loading`, `unloading` (it completes its answers, and accepts no more requests) or
    `unloaded`; `error` is the failure of the last start, if any."""

    value: str
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Residence:
    """A loaded model in memory. `expires_at`: time of unloading if it is not used, in seconds since 1970, infinity for
    never. `size_vram`: bytes on GPUs, 0 if unknown. `context_length`: maximum tokens of one request, 0 if unknown."""

    expires_at: float
    size_vram: int = 0
    context_length: int = 0
    native: Mapping[str, Json] = field(default_factory=dict)
    """The item as the server lists it, by the name of the API: passed on as it is to clients of that API."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is known of a model without loading it; everything but `name` may be unknown (empty, 0).

    `digest` has 64 hexadecimal digits; `modified` is in seconds since 1970; `capabilities` have Ollama's names;
    `metadata` has GGUF's names, with long arrays replaced by empty ones; `num_ctx` is the configured number of tokens
    per request, 0 if not configured; `title`, `description`, `suggestions` and `hidden` are configured, too. `native`
    is as in `Residence`.
    """

    name: str
    digest: str = ""
    modified: float = 0.0
    size_bytes: int = 0
    parameters: int = 0
    format: str = ""
    capabilities: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    num_ctx: int = 0
    title: str = ""
    description: str = ""
    suggestions: Sequence[str] = ()
    hidden: bool | None = None
    native: Mapping[str, Json] = field(default_factory=dict)

    def configured(self, card: configuration.CardConfig, title: str | None = None) -> ModelInfo:
        """This with what the configuration has for the model's card."""
        hidden = self.hidden if card.hidden is None else card.hidden
        suggestions = tuple(card.suggestions)
        description = card.description or ""
        return replace(self, title=title or "", description=description, suggestions=suggestions, hidden=hidden)


class Model(Protocol):
    """One model of a provider.

    `name` is its id on its server, `kind` the kind of server (`llama.cpp`, `ollama`, `remote`, ...; visible to agents),
    `owner` the owner in model lists, `tags` the labels there. `speaks` are the APIs that its server supports: `openai`,
    `responses`, `anthropic`, `ollama`, and `native` for llama-server's own. `codec` is the API used for clients of any
    other API (see `proxy.dialects.UPSTREAM_CODECS`). `forwards` are patterns, in lower case, of the client's headers
    about its user and with its credentials that the server gets. `filters` are applied to requests before `prepare`.
    """

    @property
    def name(self) -> str: ...
    @property
    def aliases(self) -> Sequence[str]: ...
    @property
    def tags(self) -> Sequence[str]: ...
    @property
    def kind(self) -> str: ...
    @property
    def owner(self) -> str: ...
    @property
    def speaks(self) -> frozenset[str]: ...
    @property
    def codec(self) -> str: ...
    @property
    def features(self) -> frozenset[Feature]: ...
    @property
    def forwards(self) -> tuple[str, ...]: ...
    @property
    def filters(self) -> configuration.FiltersConfig | None: ...
    @property
    def state(self) -> ModelState:
        """From memory, at once."""

    @property
    def output(self) -> Output | None:
        """What its server prints; None if that is no process of this proxy."""

    def open(self, request: UpstreamRequest) -> AbstractAsyncContextManager[UpstreamResponse]:
        """Find or start the server, send `request`, and yield the response once its headers are received. Leaving the
        context releases everything at once.

        Raises: `Overloaded`, `StartFailed`, `UpstreamFailed`, `ModelNotFound`.
        """

    def prepare(self, body: Json) -> object:
        """Adapt the parsed body of a request, in the API of `codec` or one of `speaks`, for the server (Ollama's
        `num_ctx`). The result is to be passed in `UpstreamRequest.prepared`. Raises: `BadRequest`."""

    async def load(self, *, wait: bool = True) -> None:
        """Load the model; without `wait`, return as soon as loading has begun, if the server supports that. No effect
        without the feature `LOADING`. Raises: as `open`."""

    async def unload(self) -> None:
        """Unload the model once its answers are complete; if it is idle, before this returns."""

    def keep_loaded(self, seconds: float) -> None:
        """Set how long it stays loaded when idle (0: not at all, infinity: forever). Servers may ignore it."""

    async def delete(self, headers: Sequence[tuple[str, str]]) -> None:
        """Delete its files; `headers` are the client's, for an external server. Raises: `BadRequest` if it is
        configured or cannot be deleted, `UpstreamRefused`."""

    async def info(self) -> ModelInfo:
        """What is known about it, from its file or its server's listing."""

    @property
    def card(self) -> ModelInfo:
        """As `info`, from memory, at once; what is not there yet is looked up in the background."""

    async def residence(self) -> Residence | None:
        """None if it is not loaded, or if that is unknown."""

    async def slots(self) -> int | None:
        """How many answers its server generates at the same time, which bounds `n` of a request; None if unknown. Loads
        the model if it must. Raises: as `open`."""

    def command_line(self, listen: Endpoint) -> Sequence[str]:
        """The command that would start its server there; empty if the proxy does not. Blocks. Raises: `StartFailed`."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What keeps models from being served. `where` is the path of the setting (`models.m.path`), or the section;
    `message` is one line. With `fatal`, the proxy refuses to start. `harmless`: for `check` and the log only."""

    where: str
    message: str
    fatal: bool = False
    harmless: bool = False

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


@dataclass(slots=True)
class ProviderStatus:
    """Status for operators, in `/health`: `instances` are the proxy's own processes, `servers` external ones; an entry
    with the key `error` has failed."""

    instances: list[Json] = field(default_factory=list)
    servers: list[Json] = field(default_factory=list)


class Management(Protocol):
    """The model management endpoints of an external server, for one API (Ollama's `/api/copy`, `/api/create`,
    `/api/blobs` ...). `url`, `headers` and `timeouts` are for separate HTTP clients (uploads)."""

    @property
    def url(self) -> str: ...
    @property
    def headers(self) -> Sequence[tuple[str, str]]: ...
    @property
    def timeouts(self) -> Timeouts: ...
    def open(self, request: UpstreamRequest) -> AbstractAsyncContextManager[UpstreamResponse]: ...
    def changed(self) -> None:
        """Invalidate its listings."""


@dataclass(frozen=True, slots=True)
class Services:
    """Shared by all providers: the downloads in progress, and the pool of server processes. `before` is the provider
    of a section that the new one replaces, if there is one, to take over what has not changed."""

    downloads: Downloads
    pool: Pool
    before: Callable[[str], Any] = lambda section: None


class Provider(Protocol):
    """One source of models. Methods that are not coroutines answer from memory, and refresh stale data in the
    background."""

    section: ClassVar[str]
    """Its key in the configuration."""
    Config: ClassVar[Any]
    """The pydantic type of the value under that key: a model, or a mapping of models."""

    @classmethod
    def create(cls, config: configuration.Config, services: Services) -> Provider | None:
        """The provider for a configuration; None if that does not use it."""

    async def start(self) -> None:
        """Clean up leftovers, preload models, start listing servers. Returns soon."""

    async def close(self) -> None:
        """Stop everything it has started; may be called repeatedly."""

    async def listed(self) -> None:
        """Return once the first listing has ended, whether it succeeded or not."""

    async def reread(self) -> None:
        """Look for added and removed models now; what it has in memory may be a moment old otherwise."""

    def models(self) -> Sequence[Model]:
        """All of its models."""

    def known(self, name: str, *, pull: bool = True) -> Model | None:
        """The model of that name, from memory. Without `pull`, requests to it do not download it."""

    async def find(self, name: str, *, pull: bool) -> Model | None:
        """As `known`, after a refresh. With `pull`, also a model that its first request would download."""

    def missing(self, name: str) -> ProxyError | None:
        """Why it is unknown whether it has the model; None if that is known."""

    @property
    def default(self) -> Model | None:
        """The model for requests that name none."""

    def can_download(self, name: str) -> bool:
        """Whether it is responsible for downloads of `name`."""

    async def download(self, name: str, headers: Sequence[tuple[str, str]]) -> Download | None:
        """The download of `name`, in progress or new; None if it is already available. Raises: `BadRequest`,
        `ModelNotFound`."""

    async def fitting(self, models: Sequence[str]) -> list[list[str]]:
        """The names of its `models` in groups that can be loaded at the same time; loaded ones first."""

    async def management(self, api: str, model: str | None) -> Management | None:
        """The management endpoints for an API; of the server that has `model`, if it is given."""

    def status(self) -> ProviderStatus: ...

    def pooled(self) -> Iterable[PoolModel]:
        """Its models as the pool of server processes knows them, if they run there."""

    async def problems(self) -> Sequence[Problem]:
        """What is missing now of the files, programs and servers it is configured with; looked up at each call, outside
        of the event loop, before `start` too. `check`, the log at start and `/health` report it."""


class BaseProvider:
    """A `Provider` of `models` that are all known from the start, and of which nothing is to be fetched or managed. A
    subclass adds `section`, `Config` and `create`, and replaces what differs."""

    def __init__(self, models: Sequence[Model] = ()) -> None:
        self._models = models
        self._by_name = {key.lower(): model for model in models for key in (model.name, *model.aliases)}

    async def start(self) -> None:
        """Nothing to begin."""

    async def close(self) -> None:
        """Nothing to end."""

    async def listed(self) -> None:
        """Nothing to learn."""

    async def reread(self) -> None:
        """Nothing changes."""

    def models(self) -> Sequence[Model]:
        return self._models

    def known(self, name: str, *, pull: bool = True) -> Model | None:
        """Case is ignored, and a `:latest` that is no part of the model's name."""
        key = name.lower()
        return self._by_name.get(key) or self._by_name.get(key.removesuffix(":latest"))

    async def find(self, name: str, *, pull: bool) -> Model | None:
        return self.known(name, pull=pull)

    def missing(self, name: str) -> ProxyError | None:
        """It always knows whether it has a model."""
        return None

    @property
    def default(self) -> Model | None:
        """The model, if it is the only one."""
        return self._models[0] if len(self._models) == 1 else None

    def can_download(self, name: str) -> bool:
        return False

    async def download(self, name: str, headers: Sequence[tuple[str, str]]) -> Download | None:
        """Not called, as there is nothing that it `can_download`."""
        return None

    async def fitting(self, models: Sequence[str]) -> list[list[str]]:
        """All can be loaded at one time."""
        return [list(models)]

    async def management(self, api: str, model: str | None) -> Management | None:
        """No server manages these models."""
        return None

    def status(self) -> ProviderStatus:
        """Nothing to report; processes of the pool are reported by the provider that starts the pool."""
        return ProviderStatus()

    def pooled(self) -> Iterable[PoolModel]:
        """None."""
        return []

    async def problems(self) -> Sequence[Problem]:
        """None."""
        return []
