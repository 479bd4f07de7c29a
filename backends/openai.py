"""Servers somebody else runs: any OpenAI-compatible API, reached by the same relay; and what all such servers share."""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, ClassVar
from urllib.parse import urlsplit

import orjson

from llama_smart_proxy.backends.base import (
    Feature,
    Json,
    ModelInfo,
    ModelState,
    ProviderStatus,
    Services,
    UpstreamRequest,
)
from llama_smart_proxy.backends.http.connection import ConnectionPool, Endpoint
from llama_smart_proxy.backends.http.exchange import Timeouts, UpstreamResponse
from llama_smart_proxy.proxy.config import Config, RemoteConfig, UpstreamConfig
from llama_smart_proxy.proxy.errors import BadRequest, UpstreamFailed

logger = logging.getLogger(__name__)

OUR_VIA = f"1.1 llama-smart-proxy-{secrets.token_hex(4)}"
"""The `Via` of all we send to servers of others, another one in each run: a request that comes back to us with it went
round in a circle."""

LISTING_TIMEOUT_S = 5.0
LISTING_FRESH_S = 60.0
"""How old the list of a remote's models may be before it is fetched anew, in the background."""

LISTING_PAUSE_S = 2.0
"""Least time between two listings that requests for unknown models cause, and after one that failed."""


def connections_to(url: str, config: UpstreamConfig, *, idle_timeout_s: float | None = None) -> ConnectionPool:
    """Connections to the server at `url`, with the key and the time limits of `config`."""
    parts = urlsplit(url)
    tls = parts.scheme == "https"
    return ConnectionPool(
        Endpoint(parts.hostname or "", parts.port or (443 if tls else 80), tls, parts.path),
        headers=[("Via", OUR_VIA), *credentials(config)],
        timeouts=Timeouts(
            config.connect_timeout_s, config.first_byte_timeout_s, idle_timeout_s or config.idle_timeout_s
        ),
    )


def credentials(config: UpstreamConfig) -> list[tuple[str, str]]:
    """The headers that carry the key, if there is one."""
    key = config.api_key.get_secret_value() if config.api_key else ""
    return [("Authorization", f"Bearer {key}")] if key else []


class Listing:
    """What `GET path` of a server says, asked in the background whenever it is old: one question at a time.

    `take` gets each answer, parsed; it raises ValueError, KeyError or TypeError for one of another shape. `error` says
    why the last question got no answer. `heard_at` is when the last one that did was sent, on the event loop's clock.
    """

    def __init__(
        self,
        owner: str,
        connections: ConnectionPool,
        path: str,
        take: Callable[[Any], None],
        *,
        fresh_s: float,
        timeout_s: float = LISTING_TIMEOUT_S,
        log_level: int = logging.WARNING,
    ) -> None:
        self.error: str | None = None
        self.heard_at = -math.inf
        self._owner = owner
        self._connections = connections
        self._path = path
        self._take = take
        self._fresh_s = fresh_s
        self._timeout_s = timeout_s
        self._log_level = log_level
        self._known_at = -math.inf
        self._outdated_at = -math.inf
        self._task: asyncio.Task[None] | None = None

    def refresh(self) -> None:
        """Ask in the background if the answer is old or outdated, or if there was none."""
        fresh_s = self._fresh_s if self.error is None else LISTING_PAUSE_S
        if self._known_at <= self._limit(fresh_s):
            self._ask()

    async def younger_than(self, age_s: float) -> None:
        """Return once the server was asked less than `age_s` seconds before this call (infinite: ever), with or without
        an answer. Whoever waits may leave: the question is asked to its end."""
        limit = self._limit(age_s)
        while self._known_at <= limit:
            await asyncio.shield(self._ask())

    def outdated(self) -> None:
        """From now on the server would say something else."""
        self._outdated_at = asyncio.get_running_loop().time()

    def fail(self, error: str) -> None:
        """The server is known not to answer, if only until it is asked again."""
        if error != self.error:
            logger.log(self._log_level, "%s: %s", self._owner, error)
        self.error = error

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def _limit(self, age_s: float) -> float:
        """When the server must have been asked at the latest, or it has to be asked anew."""
        return max(asyncio.get_running_loop().time() - age_s, self._outdated_at)

    def _ask(self) -> asyncio.Task[None]:
        if self._task is None or self._task.done():
            # One task at most, held here and ended by close().
            self._task = asyncio.get_running_loop().create_task(self._fetch(), name=f"{self._owner}: {self._path}")
        return self._task

    async def _fetch(self) -> None:
        sent_at = asyncio.get_running_loop().time()
        try:
            status, body = await self._connections.fetch(UpstreamRequest("GET", self._path), timeout_s=self._timeout_s)
            if status != 200:
                raise UpstreamFailed(f"GET {self._path} answered {status}")
            self._take(orjson.loads(body))
            self.error = None
            self.heard_at = self._known_at = sent_at
            return
        except UpstreamFailed as exc:
            self.fail(exc.message)
        except (ValueError, KeyError, TypeError):
            self.fail(f"GET {self._path} did not answer what it should")
        self._known_at = asyncio.get_running_loop().time()


class Remote:
    """One remote server: its connections, and the names of the models it offers.

    `models` answers from memory at once; a server that is down keeps the list it last gave.
    """

    def __init__(self, name: str, config: RemoteConfig) -> None:
        self.name = name
        self.connections = connections_to(config.url, config)
        self._fixed = config.models is not None
        self._models: tuple[str, ...] = tuple(config.models or ())
        self._listing = Listing(
            f"remote {name}", self.connections, "/v1/models", self._take_models, fresh_s=LISTING_FRESH_S
        )

    @property
    def error(self) -> str | None:
        """Why the models could not be listed the last time."""
        return self._listing.error

    @property
    def models(self) -> tuple[str, ...]:
        """The model ids known now; asks the server again in the background when they are old."""
        self.begin_listing()
        return self._models

    def begin_listing(self) -> None:
        """Have the list of models fetched if it is old and not given by the configuration."""
        if not self._fixed:
            self._listing.refresh()

    async def listed(self) -> None:
        """Return once the server has been asked for its models since the start, with or without an answer."""
        if not self._fixed:
            await self._listing.younger_than(math.inf)

    async def find(self, model: str) -> bool:
        """Whether the server has `model`, asking it if memory says no and was not refreshed just now."""
        if model not in self._models and not self._fixed:
            await self._listing.younger_than(LISTING_PAUSE_S)
        return model in self._models

    async def close(self) -> None:
        self.connections.close("the proxy is shutting down", code="shutting_down")
        await self._listing.close()

    def _take_models(self, answer: Any) -> None:
        self._models = tuple(str(item["id"]) for item in answer["data"])


class RemoteModel:
    """`Model` for one of a remote server, which loads its models itself."""

    kind: ClassVar[str] = "remote"
    codec: ClassVar[str] = "openai"
    speaks: ClassVar[frozenset[str]] = frozenset({"openai", "responses", "anthropic", "native"})
    features: ClassVar[frozenset[Feature]] = frozenset()
    aliases: ClassVar[Sequence[str]] = ()
    state: ClassVar[ModelState] = ModelState("loaded")

    def __init__(self, remote: Remote, name: str) -> None:
        self.name = name
        self.owner = remote.name
        self._connections = remote.connections

    def open(self, request: UpstreamRequest) -> AbstractAsyncContextManager[UpstreamResponse]:
        return self._connections.request(request)

    def prepare(self, body: Json) -> None:
        """Nothing is known of the server that would call for it."""

    async def load(self, *, wait: bool = True) -> None:
        """Nothing."""

    async def unload(self) -> None:
        """Nothing."""

    def keep_loaded(self, seconds: float) -> None:
        """Nothing."""

    async def delete(self, headers: Sequence[tuple[str, str]]) -> None:
        raise BadRequest(f"model {self.name!r} is part of this proxy's configuration; remove it there")

    async def info(self) -> ModelInfo:
        return ModelInfo(self.name)

    async def residence(self) -> None:
        """Nothing is known of it."""


class Remotes:
    """`Provider` of the models of all remotes, in the order of the configuration, by their own names and as
    `remote/model`; own names count first."""

    section: ClassVar[str] = "remotes"
    Config: ClassVar[Any] = dict[str, RemoteConfig]

    def __init__(self, remotes: Sequence[Remote]) -> None:
        self._remotes = remotes

    @classmethod
    def create(cls, config: Config, services: Services) -> Remotes | None:
        return cls([Remote(name, remote) for name, remote in config.remotes.items()]) if config.remotes else None

    async def start(self) -> None:
        for remote in self._remotes:
            remote.begin_listing()

    async def close(self) -> None:
        for remote in self._remotes:
            await remote.close()

    async def listed(self) -> None:
        await asyncio.gather(*(remote.listed() for remote in self._remotes))

    def models(self) -> Sequence[RemoteModel]:
        return [RemoteModel(remote, model) for remote in self._remotes for model in remote.models]

    def known(self, name: str, *, pull: bool = True) -> RemoteModel | None:
        spelled = [(remote, name) for remote in self._remotes]
        spelled += [(remote, name.removeprefix(f"{remote.name}/")) for remote in self._remotes]
        return next((RemoteModel(remote, model) for remote, model in spelled if model in remote.models), None)

    async def find(self, name: str, *, pull: bool) -> RemoteModel | None:
        """A remote that the name begins with is asked first, so that no other one delays the answer."""
        for remote in sorted(self._remotes, key=lambda remote: not name.startswith(f"{remote.name}/")):
            for model in dict.fromkeys((name.removeprefix(f"{remote.name}/"), name)):
                if await remote.find(model):
                    return RemoteModel(remote, model)
        return None

    def missing(self, name: str) -> None:
        """Nothing: a remote that is down has what it last listed."""

    @property
    def default(self) -> None:
        """None: which of them is meant must be named."""

    def can_download(self, name: str) -> bool:
        return False

    async def download(self, name: str, headers: Sequence[tuple[str, str]]) -> None:
        """Nothing: `can_download` nothing."""

    async def fitting(self, models: Sequence[str]) -> list[list[str]]:
        """One group: their servers load them themselves."""
        return [list(models)]

    async def management(self, api: str, model: str | None) -> None:
        """Nothing: their servers hold what they like."""

    def status(self) -> ProviderStatus:
        return ProviderStatus(
            servers=[
                {"name": remote.name, "url": str(remote.connections.endpoint), "models": len(remote.models)}
                | ({"error": remote.error} if remote.error else {})
                for remote in self._remotes
            ]
        )
