"""One Ollama server: what it holds and has loaded, how busy we keep it, and how it pulls a model.

Source of all wire facts: the API reference of Ollama (`/api/tags`, `/api/ps`, `/api/version`, `/api/pull`).
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeGuard

import orjson

from llama_smart_proxy.backends.base import Json, UpstreamRequest
from llama_smart_proxy.backends.http.connection import ConnectionPool
from llama_smart_proxy.backends.http.exchange import Timeouts, UpstreamResponse
from llama_smart_proxy.backends.names import key_of
from llama_smart_proxy.backends.openai import Listing, connections_to, credentials
from llama_smart_proxy.backends.weights.downloads import Progress
from llama_smart_proxy.proxy.config import OllamaConfig, checked_name
from llama_smart_proxy.proxy.errors import ModelNotFound, UpstreamFailed

LISTING_TIMEOUT_S = 2.0
"""Longest a host is waited for that should say what it has; in the background, or for a model that no host knows."""
TAGS_FRESH_S = 300.0
LOADED_FRESH_S = 3.0
"""How old `tags` and `loaded` may be before they are asked for anew, in the background."""
PULL_IDLE_S = 1800.0
"""Longest silence within a pull: an Ollama that verifies a large file on a slow disk says nothing for minutes."""
MAX_CONTEXT = 2**31 - 1
"""Largest context size in tokens that is believed; Ollama takes no larger number."""
_LACKING = re.compile(r"^[:/-]|[:/](?=[:/]|$)")
"""Where a part of a name is empty, or a flag might begin."""
LINE_LIMIT = 1024 * 1024
"""Longest progress line accepted, in bytes."""
PULL_FAILED = "pull_failed"
"""Code of the error for a pull that Ollama gave up, with its words: asked again at once it would say the same."""
JSON_HEADERS = [("Content-Type", "application/json")]
NO_SUCH_MODEL = ("file does not exist", "not found", "does not exist")
"""Words of Ollama about a model that the registry does not have."""


class OllamaHost:
    """One Ollama server, and `Management` of its models, which are known by their `key_of`.

    `tags` are the items of /api/tags as they came, newest model first; a server that is down keeps those it last gave.
    `in_flight` counts the requests it is answering, `using` those for each model.
    """

    def __init__(self, url: str, config: OllamaConfig) -> None:
        self.connections = connections_to(url, config)
        self.url = str(self.connections.endpoint)
        self.headers = credentials(config)
        self.tags: dict[str, Json] = {}
        self.version: str | None = None
        self.in_flight = 0
        self.using: Counter[str] = Counter()
        self._ps: dict[str, Json] = {}
        self._pulls = connections_to(url, config, idle_timeout_s=max(PULL_IDLE_S, config.idle_timeout_s))
        self._tags_listing = self._listing("/api/tags", self._take_tags, TAGS_FRESH_S, logging.WARNING)
        # One warning is enough for a host that is down.
        self._ps_listing = self._listing("/api/ps", self._take_ps, LOADED_FRESH_S, logging.DEBUG)
        self._version_listing = self._listing("/api/version", self._take_version, TAGS_FRESH_S, logging.DEBUG)

    def _listing(self, path: str, take: Callable[[Any], None], fresh_s: float, log_level: int) -> Listing:
        owner = f"ollama {self.url}"
        return Listing(
            owner, self.connections, path, take, fresh_s=fresh_s, timeout_s=LISTING_TIMEOUT_S, log_level=log_level
        )

    @property
    def _listings(self) -> tuple[Listing, ...]:
        return self._tags_listing, self._ps_listing, self._version_listing

    @property
    def timeouts(self) -> Timeouts:
        """Those of its connections."""
        return self.connections.timeouts

    # -- what it has -----------------------------------------------------------------------------------------------

    @property
    def error(self) -> str | None:
        """Why it did not answer the last time; None if it did."""
        return self._tags_listing.error or self._ps_listing.error

    @property
    def loaded(self) -> dict[str, Json]:
        """The items of /api/ps as they came; none of a server that does not answer."""
        return self._ps if self._ps_listing.error is None else {}

    @property
    def loaded_at(self) -> float:
        """When it was asked for `loaded`, on the event loop's clock."""
        return self._ps_listing.heard_at

    def has_loaded(self, key: str) -> bool:
        """Whether it has the model in memory, or will have: it is not listed while it loads."""
        return key in self.loaded or self.using[key] > 0

    def context_length(self, key: str) -> int:
        """The context size that the model is loaded with; 0 if it is not loaded, or the host tells none."""
        size = self.loaded.get(key, {}).get("context_length")
        return size if isinstance(size, int) and 0 < size <= MAX_CONTEXT else 0

    def refresh(self) -> None:
        """Have what is old asked for anew in the background."""
        for listing in self._listings:
            listing.refresh()

    async def listed(self, age_s: float) -> None:
        """Return once `tags` are younger than `age_s` seconds or could not be had, after 2 s at the latest."""
        await self._tags_listing.younger_than(age_s)

    def changed(self) -> None:
        """Models were made or deleted, or began to be."""
        self._tags_listing.outdated()
        self._ps_listing.outdated()

    async def looked_up(self, age_s: float) -> None:
        """The same for `loaded`."""
        await self._ps_listing.younger_than(age_s)

    # -- what it does ----------------------------------------------------------------------------------------------

    def open(self, request: UpstreamRequest, key: str = "") -> AbstractAsyncContextManager[UpstreamResponse]:
        """Send `request`, which is about the model `key`, if about any."""
        return self._exchange(self.connections, request, key)

    async def pull(self, name: str, headers: Sequence[tuple[str, str]], tell: Callable[[Progress], None]) -> None:
        """Have it pull a model; returns once it lists it. Cancelling breaks the pull off; Ollama keeps what it has. Of
        the `headers` of the request for it, those are passed on that show its way: hosts may be proxies, in a circle.

        Raises: ModelNotFound in Ollama's words, UpstreamFailed, with code `pull_failed` if Ollama said why.
        """
        lines = _PullLines(tell)
        body = orjson.dumps({"model": name, "stream": True})
        via = [pair for pair in headers if pair[0].lower() == "via"]
        request = UpstreamRequest("POST", "/api/pull", body, [*JSON_HEADERS, *via], slot=False)
        async with self._exchange(self._pulls, request, "") as response:
            await response.pipe(lines)
        lines.end(name)
        await self.listed(0)

    async def close(self) -> None:
        for connections in (self.connections, self._pulls):
            connections.close("the proxy is shutting down", code="shutting_down")
        for listing in self._listings:
            await listing.close()

    @asynccontextmanager
    async def _exchange(
        self, connections: ConnectionPool, request: UpstreamRequest, key: str
    ) -> AsyncIterator[UpstreamResponse]:
        self.in_flight += 1
        self.using[key] += 1
        exchange = connections.request(request)
        try:
            try:
                response = await exchange.__aenter__()
            except UpstreamFailed as exc:
                self._ps_listing.fail(exc.message)  # not so what is raised later: it need not be the host's fault
                raise
            try:
                yield response
            finally:
                await exchange.__aexit__(None, None, None)
        finally:
            self.in_flight -= 1
            self.using[key] -= 1
            if not self.using[key]:
                del self.using[key]

    # -- what it says ----------------------------------------------------------------------------------------------

    def _take_tags(self, answer: Any) -> None:
        self.tags = _by_key(answer["models"])

    def _take_ps(self, answer: Any) -> None:
        self._ps = _by_key(answer["models"])

    def _take_version(self, answer: Any) -> None:
        self.version = str(answer["version"])


def _by_key(items: Any) -> dict[str, Json]:
    """The items of a listing, each with `name` and `model`: Open WebUI lists nothing at all if one lacks its name."""
    found: dict[str, Json] = {}
    for item in map(dict, items or ()):
        name = item.get("name") or item.get("model")
        if is_name(name):
            found.setdefault(key_of(name), {**item, "name": name, "model": item.get("model") or name})
    return found


def is_name(name: object) -> TypeGuard[str]:
    """Whether it can be the name of a model."""
    try:
        return isinstance(name, str) and bool(checked_name(name)) and not _LACKING.search(name)
    except ValueError:
        return False


class _PullLines:
    """A `Sink` for the answer to /api/pull: lines of JSON, the last one telling success or the error."""

    def __init__(self, tell: Callable[[Progress], None]) -> None:
        self._tell = tell
        self._held = b""
        self._last: Json = {}

    def feed(self, data: bytes) -> bool:
        *lines, self._held = (self._held + data).split(b"\n")
        for line in lines:
            self._take(line)
        return len(self._held) <= LINE_LIMIT

    async def drained(self) -> None:
        raise UpstreamFailed(f"Ollama sent a line over {LINE_LIMIT} bytes about a pull")

    def end(self, name: str) -> None:
        """The answer is complete. Raises: ModelNotFound, UpstreamFailed."""
        self._take(self._held)
        if "error" in self._last:
            words = str(self._last["error"])
            if any(part in words for part in NO_SUCH_MODEL):
                raise ModelNotFound(f"model '{name}' not found: {words}")
            raise UpstreamFailed(f"Ollama could not pull '{name}': {words}", code=PULL_FAILED)
        if self._last.get("status") != "success":
            raise UpstreamFailed(f"Ollama broke off the pull of '{name}'")

    def _take(self, line: bytes) -> None:
        if not line.strip():
            return
        try:
            self._last = dict(orjson.loads(line))
        except (ValueError, TypeError):
            self._last = {}  # if it was the last one, the pull has failed
            return
        if "error" not in self._last and self._last.get("status") != "success":
            self._tell(self._last)
