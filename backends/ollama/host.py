"""One Ollama server: its models, which of them are loaded, its requests in flight, and pulling a model.

Source of all wire facts: the API reference of Ollama (`/api/tags`, `/api/ps`, `/api/version`, `/api/pull`).
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from datetime import datetime
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
"""Time limit in seconds for a host's listings."""
TAGS_FRESH_S = 300.0
LOADED_FRESH_S = 3.0
"""Age in seconds from which `tags` and `loaded` are refreshed in the background."""
PULL_IDLE_S = 1800.0
"""Idle timeout of a pull: while Ollama verifies a large file on a slow disk, it sends nothing for minutes."""
MAX_CONTEXT = 2**31 - 1
"""Largest valid context size in tokens; Ollama accepts no larger number."""
_INVALID_PART = re.compile(r"^[:/-]|[:/](?=[:/]|$)")
"""Matches an empty part of a name, or the beginning of a flag."""
LINE_LIMIT = 1024 * 1024
"""Longest progress line accepted, in bytes."""
PULL_FAILED = "pull_failed"
"""Error code of a pull that Ollama reported as failed: a retry at once would fail in the same way."""
JSON_HEADERS = [("Content-Type", "application/json")]
NO_SUCH_MODEL = ("file does not exist", "not found", "does not exist")
"""Parts of Ollama's error messages for a model that the registry does not have."""


class OllamaHost:
    """One Ollama server, and `Management` of its models, which are identified by their `key_of`.

    `tags` are the items of /api/tags, newest model first; while the server is down, those of its last answer.
    `in_flight` counts its requests in progress, `using` those for each model.
    """

    def __init__(self, url: str, config: OllamaConfig) -> None:
        self.connections = connections_to(url, config)
        self.asked = _asked(url, config)
        self.holders = 0
        """How many providers use it that were started and are not closed: more than one while a configuration ends."""
        self.url = str(self.connections.endpoint)
        self.headers = credentials(config)
        self.tags: dict[str, Json] = {}
        self.version: str | None = None
        self.in_flight = 0
        self.using: Counter[str] = Counter()
        self._ps: dict[str, Json] = {}
        self._pulls = connections_to(url, config, idle_timeout_s=max(PULL_IDLE_S, config.idle_timeout_s))
        self._tags_listing = self._listing("/api/tags", self._set_tags, TAGS_FRESH_S, logging.WARNING)
        # One warning is enough for a host that is down.
        self._ps_listing = self._listing("/api/ps", self._set_ps, LOADED_FRESH_S, logging.DEBUG)
        self._version_listing = self._listing("/api/version", self._set_version, TAGS_FRESH_S, logging.DEBUG)

    def _listing(self, path: str, on_answer: Callable[[Any], None], max_age_s: float, log_level: int) -> Listing:
        owner = f"ollama {self.url}"
        return Listing(
            owner,
            self.connections,
            path,
            on_answer,
            max_age_s=max_age_s,
            timeout_s=LISTING_TIMEOUT_S,
            log_level=log_level,
        )

    @property
    def _listings(self) -> tuple[Listing, ...]:
        return self._tags_listing, self._ps_listing, self._version_listing

    @property
    def timeouts(self) -> Timeouts:
        """The timeouts of its connections."""
        return self.connections.timeouts

    # -- state ------------------------------------------------------------------------------------------------------

    @property
    def error(self) -> str | None:
        """Why the last listing failed; None if it succeeded."""
        return self._tags_listing.error or self._ps_listing.error

    @property
    def loaded(self) -> dict[str, Json]:
        """The items of /api/ps; empty if the server does not answer."""
        return self._ps if self._ps_listing.error is None else {}

    @property
    def loaded_at(self) -> float:
        """When `loaded` was requested, on the event loop's clock."""
        return self._ps_listing.updated_at

    @property
    def status(self) -> Json:
        """It for operators; with `error` if its last listing failed."""
        entry: Json = {"name": "ollama", "url": self.url, "version": self.version, "models": len(self.tags)}
        entry |= {"loaded": [item["name"] for item in self.loaded.values()], "in_flight": self.in_flight}
        return entry | ({"error": self.error} if self.error else {})

    def has_loaded(self, key: str) -> bool:
        """Whether the model is loaded, or has requests: Ollama does not list it while it loads."""
        return key in self.loaded or self.using[key] > 0

    def keeps(self, key: str, since: float) -> bool:
        """Whether the server has listed the model as loaded after `since`, on the event loop's clock, and to stay."""
        item = self.loaded.get(key) if self.loaded_at > since else None
        return item is not None and seconds_of(item.get("expires_at")) > time.time()

    def context_length(self, key: str) -> int:
        """The context size that the model is loaded with; 0 if it is not loaded, or unknown."""
        size = self.loaded.get(key, {}).get("context_length")
        return size if isinstance(size, int) and 0 < size <= MAX_CONTEXT else 0

    def refresh(self) -> None:
        """Refresh stale listings in the background."""
        for listing in self._listings:
            listing.refresh()

    async def refresh_tags(self, max_age_s: float) -> None:
        """Return once `tags` are younger than `max_age_s` seconds, or the listing has failed, after 2 s at the
        latest."""
        await self._tags_listing.wait_fresh(max_age_s)

    def changed(self) -> None:
        """Invalidate the listings after models were created or deleted."""
        self._tags_listing.invalidate()
        self._ps_listing.invalidate()

    async def refresh_loaded(self, max_age_s: float) -> None:
        """As `refresh_tags`, for `loaded`."""
        await self._ps_listing.wait_fresh(max_age_s)

    # -- operations -------------------------------------------------------------------------------------------------

    def open(self, request: UpstreamRequest, key: str = "") -> AbstractAsyncContextManager[UpstreamResponse]:
        """Send `request`; `key` is the model that it uses, empty for none."""
        return self._exchange(self.connections, request, key)

    async def pull(self, name: str, headers: Sequence[tuple[str, str]], report: Callable[[Progress], None]) -> None:
        """Pull a model; returns once it is listed. Cancellation aborts the pull; Ollama keeps the partial download. Of
        the client's `headers` only `Via` is passed on, to detect loops between proxies.

        Raises: ModelNotFound with Ollama's message; UpstreamFailed, with code `pull_failed` if Ollama reported an
        error.
        """
        lines = _PullLines(report)
        body = orjson.dumps({"model": name, "stream": True})
        via = [pair for pair in headers if pair[0].lower() == "via"]
        request = UpstreamRequest("POST", "/api/pull", body, [*JSON_HEADERS, *via], slot=False)
        async with self._exchange(self._pulls, request, "") as response:
            await response.pipe(lines)
        lines.end(name)
        await self.refresh_tags(0)

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
                self._ps_listing.fail(exc.message)  # later failures need not be the host's fault
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

    # -- listings ---------------------------------------------------------------------------------------------------

    def _set_tags(self, answer: Any) -> None:
        self.tags = _by_key(answer["models"])

    def _set_ps(self, answer: Any) -> None:
        self._ps = _by_key(answer["models"])

    def _set_version(self, answer: Any) -> None:
        self.version = str(answer["version"])


def _by_key(items: Any) -> dict[str, Json]:
    """The items of a listing, each with `name` and `model`: Open WebUI shows no model at all if one has no name."""
    found: dict[str, Json] = {}
    for item in map(dict, items or ()):
        name = item.get("name") or item.get("model")
        if is_name(name):
            found.setdefault(key_of(name), {**item, "name": name, "model": item.get("model") or name})
    return found


def seconds_of(when: object) -> float:
    """An ISO 8601 time in seconds since 1970; infinity for an invalid one."""
    with suppress(ValueError, OverflowError, OSError):
        return datetime.fromisoformat(str(when)).timestamp()
    return math.inf


def is_name(name: object) -> TypeGuard[str]:
    """Whether `name` is valid as the name of a model."""
    try:
        return isinstance(name, str) and bool(checked_name(name)) and not _INVALID_PART.search(name)
    except ValueError:
        return False


class _PullLines:
    """A `Sink` for the answer to /api/pull: lines of JSON, of which the last reports success or the error."""

    def __init__(self, report: Callable[[Progress], None]) -> None:
        self._report = report
        self._held = b""
        self._last: Json = {}

    def feed(self, data: bytes) -> bool:
        *lines, self._held = (self._held + data).split(b"\n")
        for line in lines:
            self._process(line)
        return len(self._held) <= LINE_LIMIT

    async def drained(self) -> None:
        raise UpstreamFailed(f"Ollama sent a line over {LINE_LIMIT} bytes about a pull")

    def end(self, name: str) -> None:
        """The answer is complete. Raises: ModelNotFound, UpstreamFailed."""
        self._process(self._held)
        if "error" in self._last:
            message = str(self._last["error"])
            if any(part in message for part in NO_SUCH_MODEL):
                raise ModelNotFound(f"model '{name}' not found: {message}")
            raise UpstreamFailed(f"Ollama could not pull '{name}': {message}", code=PULL_FAILED)
        if self._last.get("status") != "success":
            raise UpstreamFailed(f"Ollama ended the pull of '{name}' early")

    def _process(self, line: bytes) -> None:
        if not line.strip():
            return
        try:
            self._last = dict(orjson.loads(line))
        except (ValueError, TypeError):
            self._last = {}  # if it was the last one, the pull has failed
            return
        if "error" not in self._last and self._last.get("status") != "success":
            self._report(self._last)


def hosts_of(config: OllamaConfig, kept: Sequence[OllamaHost]) -> list[OllamaHost]:
    """The hosts of a configuration; those among `kept` that have not changed, and new ones."""
    known = {host.asked: host for host in kept}
    return [known.get(_asked(url, config)) or OllamaHost(url, config) for url in config.urls]


def _asked(url: str, config: OllamaConfig) -> tuple[object, ...]:
    """All that its connections depend on."""
    limits = config.connect_timeout_s, config.first_byte_timeout_s, config.idle_timeout_s
    return url, *credentials(config), limits
