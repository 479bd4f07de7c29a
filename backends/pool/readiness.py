"""When a server that was just started may be given requests: it is ready, and it is the one we started."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

from llama_smart_proxy.backends.base import UpstreamRequest
from llama_smart_proxy.backends.http.connection import ConnectionPool
from llama_smart_proxy.proxy.errors import UpstreamFailed

POLL_S = 0.015
ANSWER_S = 2.0

HEALTH = UpstreamRequest("GET", "/health", slot=False)
PROPS = UpstreamRequest("GET", "/props", slot=False)


class NotOurs(Exception):
    """Another process answers on the port, or listens there."""


async def prove_ours(connections: ConnectionPool, patience_s: Callable[[], float]) -> int:
    """Wait until the server behind `connections` serves its model; return its number of parallel slots.

    `connections` carry a key that only our own child was told. Whoever answers on the port counts as it only when it
    refuses a wrong key and takes the right one; the right one is not shown to it before. `patience_s` is asked before
    each attempt how many seconds it may take, and ends the waiting by raising.

    Raises: `NotOurs`; what `patience_s` raises.
    """
    stranger = ConnectionPool(connections.endpoint, headers=[("Authorization", "Bearer a-wrong-key")])
    try:
        while True:
            left_s = patience_s()
            try:
                slots = await _ask(stranger, connections, min(ANSWER_S, left_s))
            except UpstreamFailed:
                slots = None
            if slots is not None:
                return slots
            await asyncio.sleep(min(POLL_S, left_s))
    finally:
        stranger.close("done")


async def _ask(stranger: ConnectionPool, connections: ConnectionPool, timeout_s: float) -> int | None:
    """The number of slots, or None when it is not ready."""
    status, _ = await stranger.fetch(HEALTH, timeout_s=timeout_s)
    if status != 200:
        return None
    status, _ = await stranger.fetch(PROPS, timeout_s=timeout_s)
    if status == 503:
        return None
    if status not in (401, 403):
        raise NotOurs("what answers there takes any key")
    status, body = await connections.fetch(PROPS, timeout_s=timeout_s)
    if status in (401, 403):
        raise NotOurs("what answers there does not take our key")
    return _slots(body) if status == 200 else None


def _slots(body: bytes) -> int:
    """`total_slots` of `/props`. Source: llama.cpp tools/server/README.md, GET /props."""
    try:
        return max(1, int(json.loads(body)["total_slots"]))
    except (ValueError, KeyError, TypeError):
        return 1
