"""What the rest of the program knows of whoever runs models: providers, the models they offer, and requests to those.

A provider is one section of the configuration: the llama.cpp processes, the Ollama hosts, the remote servers. It finds
models by name. A model answers for itself: which APIs its server takes as they are, how a request is opened, how it is
loaded and unloaded, what is known about it. The class of either is never asked for. Bytes only: nothing in `backends`
knows a chat, a dialect or an agent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from llama_smart_proxy.backends.http.exchange import Timeouts, UpstreamResponse
    from llama_smart_proxy.backends.pool.pool import Pool
    from llama_smart_proxy.backends.weights.downloads import Download, Downloads
    from llama_smart_proxy.proxy import config as configuration
    from llama_smart_proxy.proxy.errors import ProxyError

Json = dict[str, Any]


class Priority(IntEnum):
    """The class of a request, for whoever schedules it; a lower value is served first."""

    PERSON = 0
    TASK = 1  # a background prompt of a chat UI
    HELPER = 2  # a question that an agent asks
    BATCH = 3


class Feature(StrEnum):
    """What a model's server, or its provider, can do beyond generating."""

    LOADING = "loading"  # the proxy can have the model loaded and unloaded
    TOKENS = "tokens"  # /tokenize, /detokenize and /apply-template of llama-server


@dataclass(slots=True)  # not frozen: that costs a microsecond, for every request
class UpstreamRequest:
    """One HTTP request to a model's server.

    `path` includes the query string. `headers` are complete but for `Host`, `Content-Length` and credentials, which the
    connection adds. `slot`: the request generates, and so occupies one of the server's parallel slots; otherwise it is
    a question (`/props`, `/tokenize`). Without `wait`, a request that would have to wait until its model is loaded or
    has a free slot fails at once (`Overloaded`, code `no_slot_now`). `client` identifies who asks, empty if unknown.
    `prepared` is what the model's `prepare` returned for this request.
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


@dataclass(frozen=True, slots=True)
class ModelState:
    """`value` is `loaded`, `loading` or `unloaded`; `error` is why the last start failed, if it did."""

    value: str
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Residence:
    """A loaded model in memory.

    `expires_at`: seconds since 1970 when it is unloaded unless it is used, infinity for never. `size_vram`: bytes on
    GPUs, 0 if unknown. `context_length`: tokens that one request may have, 0 if unknown.
    """

    expires_at: float
    size_vram: int = 0
    context_length: int = 0
    native: Mapping[str, Json] = field(default_factory=dict)
    """The item as the server lists it, by the name of the API: passed on as it is to clients of that API."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What is known of a model without loading it; everything but `name` may be unknown (empty, 0).

    `digest` has 64 hexadecimal digits; `modified` counts seconds since 1970; `capabilities` are named as by Ollama;
    `metadata` has GGUF's names, and an array too long to keep is empty there; `num_ctx` is how many tokens the
    configuration gives one request, 0 if it does not say.
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
    native: Mapping[str, Json] = field(default_factory=dict)
    """The item as the server lists it, by the name of the API: passed on as it is to clients of that API."""


class Model(Protocol):
    """One model of a provider.

    `name` is the id by which its server knows it, `kind` who runs it (`llama.cpp`, `ollama`, `remote`, ...; agents see
    it), `owner` what model lists show for that. `speaks` are the APIs that its server takes as they are: `openai`,
    `responses`, `anthropic`, `ollama`, and `native` for llama-server's own. `codec` names the API (see
    `proxy.dialects.UPSTREAM_CODECS`) in which it is asked on behalf of clients of any other one.
    """

    @property
    def name(self) -> str: ...
    @property
    def aliases(self) -> Sequence[str]: ...
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
    def state(self) -> ModelState:
        """From memory, at once."""

    def open(self, request: UpstreamRequest) -> AbstractAsyncContextManager[UpstreamResponse]:
        """Find or start the server, send `request`, and yield the response once its headers are in. Leaving the context
        gives everything back, at once, however it is left.

        Raises: `Overloaded`, `StartFailed`, `UpstreamFailed`, `ModelNotFound`.
        """

    def prepare(self, body: Json) -> object:
        """Adapt the parsed body of a request, in the API of `codec` or one of `speaks`, to what its server is best
        asked (Ollama's `num_ctx`); the return value goes into `UpstreamRequest.prepared`. Raises: `BadRequest`."""

    async def load(self, *, wait: bool = True) -> None:
        """Have it loaded; without `wait` return as soon as that has begun, where the server allows it. Nothing where
        `LOADING` is not among the features. Raises: as `open`."""

    async def unload(self) -> None:
        """Free its memory once its answers are complete; an idle one has stopped when this returns."""

    def keep_loaded(self, seconds: float) -> None:
        """Stay loaded that long when idle (0 not at all, infinity for ever), until the process ends. May do nothing."""

    async def delete(self, headers: Sequence[tuple[str, str]]) -> None:
        """Remove its files; `headers` are those of the client's request, for a server of somebody else. Raises:
        `BadRequest` for what is configured or cannot be deleted, `UpstreamRefused`."""

    async def info(self) -> ModelInfo:
        """What is known of it, from its file or from what its server lists."""

    async def residence(self) -> Residence | None:
        """None when it is not loaded, or its server does not say."""


@dataclass(slots=True)
class ProviderStatus:
    """For operators, as `/health` shows it: `instances` are processes of ours, `servers` those of others; an entry with
    the key `error` makes that a problem."""

    instances: list[Json] = field(default_factory=list)
    servers: list[Json] = field(default_factory=list)


class Management(Protocol):
    """The endpoints of a server of somebody else that change which models it holds, for one API (Ollama's `/api/copy`,
    `/api/create`, `/api/blobs` ...). `url`, `headers` and `timeouts` are for a client of their own (uploads)."""

    @property
    def url(self) -> str: ...
    @property
    def headers(self) -> Sequence[tuple[str, str]]: ...
    @property
    def timeouts(self) -> Timeouts: ...
    def open(self, request: UpstreamRequest) -> AbstractAsyncContextManager[UpstreamResponse]: ...
    def changed(self) -> None:
        """What it lists may differ from now on."""


@dataclass(frozen=True, slots=True)
class Services:
    """What providers share: the downloads under way, and the pool of server processes."""

    downloads: Downloads
    pool: Pool


class Provider(Protocol):
    """One source of models. Methods that are no coroutines answer from memory at once, and have what is old asked for
    in the background."""

    section: ClassVar[str]
    """Its key in the configuration."""
    Config: ClassVar[Any]
    """The type of what may stand under that key, for pydantic: a model, or a mapping of some."""

    @classmethod
    def create(cls, config: configuration.Config, services: Services) -> Provider | None:
        """The provider for a whole configuration; None if that does not use it."""

    async def start(self) -> None:
        """Begin: clear away leftovers, preload, learn what servers offer. Returns soon."""

    async def close(self) -> None:
        """End everything it has begun; may be called again."""

    async def listed(self) -> None:
        """Return once it has learned, or failed to learn, what there is since the start."""

    def models(self) -> Sequence[Model]:
        """All it offers."""

    def known(self, name: str, *, pull: bool = True) -> Model | None:
        """The model of that name, as far as memory goes. Without `pull`, no request to it has it fetched."""

    async def find(self, name: str, *, pull: bool) -> Model | None:
        """The same after looking again. With `pull`, also one that would be fetched at its first request."""

    def missing(self, name: str) -> ProxyError | None:
        """Why it cannot say whether it has the model, if it cannot."""

    @property
    def default(self) -> Model | None:
        """The model that a request means which names none."""

    def can_download(self, name: str) -> bool:
        """Whether a download of `name` is its business."""

    async def download(self, name: str, headers: Sequence[tuple[str, str]]) -> Download | None:
        """The download that makes `name` available, the one under way or a new one; None if it is there. Raises:
        `BadRequest`, `ModelNotFound`."""

    async def fitting(self, models: Sequence[str]) -> list[list[str]]:
        """`models` of its own, by name, in groups that can be loaded at one time; first those that are loaded."""

    async def management(self, api: str, model: str | None) -> Management | None:
        """Where requests go that manage the models of an API; of the server that has `model`, if one is named."""

    def status(self) -> ProviderStatus: ...


class BaseProvider:
    """A `Provider` of `models` that are all known from the start, and of which nothing is to be fetched or managed.

    A subclass adds `section`, `Config` and `create`, and replaces what differs.
    """

    def __init__(self, models: Sequence[Model] = ()) -> None:
        self._models = models
        self._by_name = {key.lower(): model for model in models for key in (model.name, *model.aliases)}

    async def start(self) -> None:
        """Nothing to begin."""

    async def close(self) -> None:
        """Nothing to end."""

    async def listed(self) -> None:
        """Nothing to learn."""

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
