"""Servers somebody else runs: any OpenAI-compatible API, reached by the same relay."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AbstractAsyncContextManager
from urllib.parse import urlsplit

import orjson

from backends import Call
from backends.connection import ConnectionPool, Endpoint
from backends.exchange import Response, Timeouts
from proxy.config import RemoteConfig
from proxy.errors import UpstreamFailed

logger = logging.getLogger(__name__)

LISTING_TIMEOUT_S = 5.0
LISTING_FRESH_S = 60.0
"""How old the list of a remote's models may be before it is fetched anew, in the background."""

LISTING_PAUSE_S = 2.0
"""Least time between two listings that requests for unknown models cause."""


class Remote:
    """One remote server: its connections, and the models it offers.

    `models` answers from memory at once; a server that is down keeps the list it last gave.
    """

    def __init__(self, name: str, config: RemoteConfig) -> None:
        parts = urlsplit(config.url)
        tls = parts.scheme == "https"
        endpoint = Endpoint(parts.hostname or "", parts.port or (443 if tls else 80), tls, parts.path)
        key = config.api_key.get_secret_value() if config.api_key else ""
        self.name = name
        self.connections = ConnectionPool(
            endpoint,
            headers=[("Authorization", f"Bearer {key}")] if key else [],
            timeouts=Timeouts(config.connect_timeout_s, config.first_byte_timeout_s, config.idle_timeout_s),
        )
        self.error: str | None = None
        self._fixed = config.models is not None
        self._models: tuple[str, ...] = tuple(config.models or ())
        self._listed_at = float("-inf")
        self._listing: asyncio.Task[None] | None = None

    @property
    def models(self) -> tuple[str, ...]:
        """The model ids known now; asks the server again in the background when they are old."""
        self.begin_listing()
        return self._models

    def begin_listing(self) -> None:
        """Have the list of models fetched if it is old and not given by the configuration."""
        if not self._fixed and asyncio.get_running_loop().time() - self._listed_at > LISTING_FRESH_S:
            self._refresh()

    async def find(self, model: str) -> bool:
        """Whether the server has `model`, asking it if memory says no and was not refreshed just now."""
        age_s = asyncio.get_running_loop().time() - self._listed_at
        if model not in self._models and not self._fixed and age_s > LISTING_PAUSE_S:
            await asyncio.shield(self._refresh())
        return model in self._models

    def open(self, call: Call) -> AbstractAsyncContextManager[Response]:
        return self.connections.request(call)

    async def close(self) -> None:
        self.connections.close("the proxy is shutting down", code="shutting_down")
        if self._listing is not None:
            self._listing.cancel()
            await asyncio.wait([self._listing])

    def _refresh(self) -> asyncio.Task[None]:
        if self._listing is None or self._listing.done():
            # One task at most, held here and ended by close().
            self._listing = asyncio.get_running_loop().create_task(self._list(), name=f"models of {self.name}")
        return self._listing

    async def _list(self) -> None:
        try:
            status, body = await self.connections.fetch(Call("GET", "/v1/models"), timeout_s=LISTING_TIMEOUT_S)
            if status != 200:
                raise UpstreamFailed(f"GET /v1/models answered {status}")
            self._models = tuple(str(item["id"]) for item in orjson.loads(body)["data"])
            self.error = None
        except UpstreamFailed as exc:
            self._note(exc.message)
        except (ValueError, KeyError, TypeError):
            self._note("GET /v1/models did not answer a list of models")
        self._listed_at = asyncio.get_running_loop().time()

    def _note(self, error: str) -> None:
        if error != self.error:
            logger.warning("remote %s: %s", self.name, error)
        self.error = error
