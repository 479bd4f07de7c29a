"""Remote OpenAI-compatible servers, and the code shared by all backends for external servers."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import secrets
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import Any, ClassVar
from urllib.parse import urlsplit

import orjson

from llama_smart_proxy.backends.base import (
    BaseProvider,
    Feature,
    Json,
    ModelInfo,
    ModelState,
    Problem,
    ProviderStatus,
    Services,
    UpstreamRequest,
)
from llama_smart_proxy.backends.http.connection import ConnectionPool, Endpoint
from llama_smart_proxy.backends.http.exchange import Timeouts, UpstreamResponse
from llama_smart_proxy.backends.turns import Turns
from llama_smart_proxy.proxy.config import Config, RemoteConfig, UpstreamConfig
from llama_smart_proxy.proxy.errors import BadRequest, UpstreamFailed

logger = logging.getLogger(__name__)

VERSION = re.compile(r"/v\d+[a-z0-9]*$", re.IGNORECASE)
"""The end of a base URL, above which a server has the endpoints that are not OpenAI's (`/props` of llama-server)."""

OUR_VIA = f"1.1 llama-smart-proxy-{secrets.token_hex(4)}"
"""The `Via` header of requests to external servers, unique per run: a request that returns with it has looped."""

_SPEAKS = frozenset({"openai", "anthropic", "native"})

LISTING_TIMEOUT_S = 5.0
LISTING_FRESH_S = 60.0
"""Age in seconds from which a remote's list of models is refreshed in the background."""

LISTING_PAUSE_S = 2.0
"""Minimum interval in seconds between listings for unknown models, and after a failed one."""


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
    """The cached answer to `GET path` of a server, refreshed in the background when it is stale, by one task at a time.

    `on_answer` gets each parsed answer; it raises ValueError, KeyError or TypeError for an invalid one. `error` is the
    failure of the last request, None if it succeeded. `updated_at` is when the last successful request was sent, on the
    event loop's clock.
    """

    def __init__(
        self,
        owner: str,
        connections: ConnectionPool,
        path: str,
        on_answer: Callable[[Any], None],
        *,
        max_age_s: float,
        timeout_s: float = LISTING_TIMEOUT_S,
        log_level: int = logging.WARNING,
    ) -> None:
        self.error: str | None = None
        self.updated_at = -math.inf
        self._owner = owner
        self._connections = connections
        self._path = path
        self._on_answer = on_answer
        self._max_age_s = max_age_s
        self._timeout_s = timeout_s
        self._log_level = log_level
        self._checked_at = -math.inf
        self._invalidated_at = -math.inf
        self._task: asyncio.Task[None] | None = None

    def refresh(self) -> None:
        """Refresh in the background if the answer is stale or invalidated, or there is none."""
        max_age_s = self._max_age_s if self.error is None else LISTING_PAUSE_S
        if self._checked_at <= self._required_since(max_age_s):
            self._start_fetch()

    async def wait_fresh(self, max_age_s: float) -> None:
        """Return once a request newer than `max_age_s` seconds before this call (infinity: any) has ended, whether it
        succeeded or not. Cancelling the caller does not cancel the request."""
        limit = self._required_since(max_age_s)
        while self._checked_at <= limit:
            await asyncio.shield(self._start_fetch())

    def invalidate(self) -> None:
        """Mark the answer as stale."""
        self._invalidated_at = asyncio.get_running_loop().time()

    def fail(self, error: str) -> None:
        """Record a failure of the server, until the next request."""
        if error != self.error:
            logger.log(self._log_level, "%s: %s", self._owner, error)
        self.error = error

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def _required_since(self, max_age_s: float) -> float:
        """The time that the last request must be newer than, or a new one is required."""
        return max(asyncio.get_running_loop().time() - max_age_s, self._invalidated_at)

    def _start_fetch(self) -> asyncio.Task[None]:
        if self._task is None or self._task.done():
            # At most one task; close() ends it.
            self._task = asyncio.get_running_loop().create_task(self._fetch(), name=f"{self._owner}: {self._path}")
        return self._task

    async def _fetch(self) -> None:
        sent_at = asyncio.get_running_loop().time()
        try:
            status, body = await self._connections.fetch(UpstreamRequest("GET", self._path), timeout_s=self._timeout_s)
            if status != 200:
                raise UpstreamFailed(f"GET {self._path} answered {status}")
            self._on_answer(orjson.loads(body))
            self.error = None
            self.updated_at = self._checked_at = sent_at
            return
        except UpstreamFailed as exc:
            self.fail(exc.message)
        except (ValueError, KeyError, TypeError):
            self.fail(f"GET {self._path} returned an invalid answer")
        self._checked_at = asyncio.get_running_loop().time()


class Remote:
    """One remote server: its connections, and the names of its models.

    `models` answers from memory; while the server is down, it keeps its last list.
    """

    def __init__(self, name: str, config: RemoteConfig) -> None:
        self.name = name
        self.config = config
        self.holders = 0
        """How many providers use it that were started and are not closed: more than one while a configuration ends."""
        root = VERSION.sub("", config.url)
        self.connections = connections_to(root, config)
        self._base = config.url.removeprefix(root)
        self.speaks = _SPEAKS | {"responses"} if config.responses else _SPEAKS
        self.filters = config.filters
        most = config.concurrent
        self.turns = Turns(name, most, config.first_byte_timeout_s) if most is not None else None
        self.forwards = tuple(map(str.lower, config.forward_headers))
        self._fixed = config.models is not None
        self._models: tuple[str, ...] = tuple(config.models or ())
        self._items: dict[str, Json] = {}
        self._listing = Listing(
            f"remote {name}",
            self.connections,
            self.path_of("/v1/models"),
            self._set_models,
            max_age_s=LISTING_FRESH_S,
        )

    def path_of(self, path: str) -> str:
        """Where the server has the endpoint `path` of OpenAI's API: below its base URL. Other paths are unchanged."""
        if self._base == "/v1" or not path.startswith(("/v1/", "/chat/completions")):
            return path
        return self._base + path.removeprefix("/v1")

    @property
    def error(self) -> str | None:
        """Why the last listing failed; None if it succeeded."""
        return self._listing.error

    @property
    def models(self) -> tuple[str, ...]:
        """The known model ids; refreshed in the background when stale."""
        self.begin_listing()
        return self._models

    def card(self, model: str) -> ModelInfo:
        """What is known of one of its models."""
        item = self._items.get(model)
        return ModelInfo(model, native={"openai": item} if item else {}).configured(self.config)

    def begin_listing(self) -> None:
        """Refresh the list of models in the background if it is stale and not configured."""
        if not self._fixed:
            self._listing.refresh()

    async def listed(self) -> None:
        """Return once the first listing has ended, whether it succeeded or not."""
        if not self._fixed:
            await self._listing.wait_fresh(math.inf)

    async def reread(self) -> None:
        """Return once the list has been requested again, whether that succeeded or not."""
        if not self._fixed:
            await self._listing.wait_fresh(0.0)

    async def find(self, model: str) -> bool:
        """Whether the server has `model`; refreshes the list if the model is unknown."""
        if model not in self._models and not self._fixed:
            await self._listing.wait_fresh(LISTING_PAUSE_S)
        return model in self._models

    async def close(self) -> None:
        self.connections.close("the proxy is shutting down", code="shutting_down")
        await self._listing.close()

    def _set_models(self, answer: Any) -> None:
        self._items = {str(item["id"]): item for item in answer["data"]}
        self._models = tuple(self._items)


class RemoteModel:
    """`Model` on a remote server, which loads its models itself."""

    kind: ClassVar[str] = "remote"
    codec: ClassVar[str] = "openai"
    features: ClassVar[frozenset[Feature]] = frozenset()
    aliases: ClassVar[Sequence[str]] = ()
    tags: ClassVar[Sequence[str]] = ()
    state: ClassVar[ModelState] = ModelState("loaded")
    output: ClassVar[None] = None

    def __init__(self, remote: Remote, name: str) -> None:
        self.name = name
        self.owner = remote.name
        self.speaks = remote.speaks
        self.forwards = remote.forwards
        self.filters = remote.filters
        self._remote = remote

    def open(self, request: UpstreamRequest) -> AbstractAsyncContextManager[UpstreamResponse]:
        path = self._remote.path_of(request.path)
        sent = request if path == request.path else replace(request, path=path)
        opening, turns = self._remote.connections.request(sent), self._remote.turns
        return opening if turns is None or not request.slot else turns.take(request, opening)

    def prepare(self, body: Json) -> None:
        """No effect."""

    async def load(self, *, wait: bool = True) -> None:
        """No effect."""

    async def unload(self) -> None:
        """No effect."""

    def keep_loaded(self, seconds: float) -> None:
        """No effect."""

    async def delete(self, headers: Sequence[tuple[str, str]]) -> None:
        raise BadRequest(f"model {self.name!r} is part of this proxy's configuration; remove it there")

    async def info(self) -> ModelInfo:
        return self.card

    @property
    def card(self) -> ModelInfo:
        return self._remote.card(self.name)

    async def residence(self) -> None:
        """None: unknown."""

    async def slots(self) -> None:
        """None: unknown."""

    def command_line(self, listen: Endpoint) -> Sequence[str]:
        """None: the server is another's."""
        return ()


class Remotes(BaseProvider):
    """`Provider` of the models of all remotes, in the order of the configuration, by model name and as `remote/model`;
    plain model names take precedence."""

    section: ClassVar[str] = "remotes"
    Config: ClassVar[Any] = dict[str, RemoteConfig]

    def __init__(self, remotes: Sequence[Remote]) -> None:
        super().__init__()
        self._remotes = remotes
        self._started = False

    @classmethod
    def create(cls, config: Config, services: Services) -> Remotes | None:
        """One that has not changed stays, with its list of models."""
        before: Remotes | None = services.before(cls.section)
        kept = {remote.name: remote for remote in before._remotes} if before is not None else {}
        remotes = [
            kept[name] if name in kept and kept[name].config == remote else Remote(name, remote)
            for name, remote in config.remotes.items()
        ]
        return cls(remotes) if remotes else None

    async def start(self) -> None:
        self._started = True
        for remote in self._remotes:
            remote.holders += 1
            remote.begin_listing()

    async def close(self) -> None:
        for remote in self._remotes:
            remote.holders -= self._started
            if remote.holders <= 0:
                await remote.close()
        self._started = False

    async def listed(self) -> None:
        await asyncio.gather(*(remote.listed() for remote in self._remotes))

    async def reread(self) -> None:
        await asyncio.gather(*(remote.reread() for remote in self._remotes))

    def models(self) -> Sequence[RemoteModel]:
        return [RemoteModel(remote, model) for remote in self._remotes for model in remote.models]

    def known(self, name: str, *, pull: bool = True) -> RemoteModel | None:
        candidates = [(remote, name) for remote in self._remotes]
        candidates += [(remote, name.removeprefix(f"{remote.name}/")) for remote in self._remotes]
        return next((RemoteModel(remote, model) for remote, model in candidates if model in remote.models), None)

    async def find(self, name: str, *, pull: bool) -> RemoteModel | None:
        """Asks a remote named in the prefix first, then all at the same time, as one may not answer: the first that has
        the model."""
        for remote in self._remotes:
            if name.startswith(f"{remote.name}/") and (found := await _held(remote, name)) is not None:
                return found
        asked = [asyncio.ensure_future(_held(remote, name)) for remote in self._remotes]
        try:
            for answer in asyncio.as_completed(asked):
                if (found := await answer) is not None:
                    return found
            return None
        finally:
            for task in asked:
                task.cancel()

    def status(self) -> ProviderStatus:
        return ProviderStatus(
            servers=[
                {"name": remote.name, "url": str(remote.connections.endpoint), "models": len(remote.models)}
                | ({"error": remote.error} if remote.error else {})
                for remote in self._remotes
            ]
        )

    async def problems(self) -> Sequence[Problem]:
        """One, if none of the remotes answers, as far as known. None is asked for this: it may be a paid service."""
        errors = [f"{remote.name}: {remote.error}" for remote in self._remotes if remote.error]
        return [Problem("remotes", "; ".join(errors))] if len(errors) == len(self._remotes) else []


async def _held(remote: Remote, name: str) -> RemoteModel | None:
    """The remote's model of that name, which may begin with the remote's."""
    for model in dict.fromkeys((name.removeprefix(f"{remote.name}/"), name)):
        if await remote.find(model):
            return RemoteModel(remote, model)
    return None
