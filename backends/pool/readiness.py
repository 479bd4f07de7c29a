"""When a server that was just started may be sent requests: it is ready, and it is the one we started."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from typing import TypeVar

from llama_smart_proxy.backends.base import UpstreamRequest
from llama_smart_proxy.backends.http.connection import REDIRECTED, ConnectionPool
from llama_smart_proxy.proxy.config import PoolConfig
from llama_smart_proxy.proxy.errors import StartFailed, UpstreamFailed

T = TypeVar("T")

POLL_S = 0.015
ANSWER_S = 2.0
PREPARE_S = 60.0
"""Longest wait for a disk with a model's files, which may have to spin up, be mounted first, or not answer at all."""
ANY_KEY = "what answers there takes any key"


class NotOurs(Exception):
    """Another process answers on the port, or listens there."""


class Foreign(NotOurs):
    """The system reports that another process than the one that was started listens there."""

    def __init__(self) -> None:
        super().__init__("another process listens there")


class TakesAnyKey(NotOurs):
    """What answers on the port takes any key: another process, or a server of ours that does not enforce its key.
    `remedy` is a clause on what the operator can do about the latter."""

    def __init__(self, remedy: str) -> None:
        super().__init__(ANY_KEY)
        self.remedy = remedy


def new_key() -> str:
    """A random API key."""
    return secrets.token_urlsafe(24)


async def wait_until(attempt: Callable[[float], Awaitable[T | None]], patience_s: Callable[[], float]) -> T:
    """Call `attempt` with the seconds that it may take until it returns something; return that.

    `patience_s` is called before each attempt and returns the seconds that are left.

    Raises: what `patience_s` raises; what `attempt` raises but `UpstreamFailed`, after which it is called again;
    `NotOurs` for a redirect.
    """
    while True:
        left_s = patience_s()
        try:
            result = await attempt(min(ANSWER_S, left_s))
        except UpstreamFailed as exc:
            if exc.code == REDIRECTED:
                raise NotOurs("what answers there redirects") from exc
            result = None
        if result is not None:
            return result
        await asyncio.sleep(min(POLL_S, left_s))


async def is_up(connections: ConnectionPool, path: str, timeout_s: float) -> bool | None:
    """True if `GET path` returns 200, else None."""
    status, _ = await connections.fetch(UpstreamRequest("GET", path, slot=False), timeout_s=timeout_s)
    return True if status == 200 else None


async def prove_ours(
    connections: ConnectionPool,
    patience_s: Callable[[], float],
    *,
    health_path: str,
    keyed_path: str,
    remedy: str = "",
) -> bytes:
    """Wait until the server of `connections` is ready, and return its answer to `GET keyed_path`.

    `connections` carry a key that only our own child received. A server on that port is ours only if it refuses a wrong
    key and accepts the right one for `keyed_path`; the right one is not sent to it before. `health_path` requires none.

    Raises: `NotOurs`, with a `remedy` its subclass `TakesAnyKey`; what `patience_s` raises.
    """
    # random, as one that is known in advance could be refused on purpose
    wrong = [("Authorization", f"Bearer {new_key()}")]
    stranger = ConnectionPool(connections.endpoint, headers=wrong)

    async def attempt(timeout_s: float) -> bytes | None:
        keyed = UpstreamRequest("GET", keyed_path, slot=False)
        if not await is_up(stranger, health_path, timeout_s):
            return None
        status, _ = await stranger.fetch(keyed, timeout_s=timeout_s)
        if status == 503:
            return None
        if status not in (401, 403):
            raise TakesAnyKey(remedy) if remedy else NotOurs(ANY_KEY)
        status, body = await connections.fetch(keyed, timeout_s=timeout_s)
        if status in (401, 403):
            raise NotOurs("what answers there does not take our key")
        return body if status == 200 else None

    try:
        return await wait_until(attempt, patience_s)
    finally:
        stranger.close("done")


async def read_within(config: PoolConfig, name: str, look: Awaitable[T]) -> T:
    """The result of a look at the files of the model `name`. Raises: `StartFailed` when their disk does not answer."""
    limit_s = min(PREPARE_S, config.load_timeout_s)
    try:
        async with asyncio.timeout(limit_s):
            return await look
    except TimeoutError as exc:
        message = f"Model '{name}' did not load: its files could not be read within {limit_s:g} s."
        raise StartFailed(message, status=504, code="model_load_timeout") from exc
