"""How a model of the pool and its process are, for operators (`/health`)."""

from __future__ import annotations

import asyncio
import math
import shlex
import time
from collections.abc import Iterable

import psutil

from llama_smart_proxy.backends.pool.instance import STALLED, State
from llama_smart_proxy.backends.pool.queue import ModelQueue
from llama_smart_proxy.proxy.config import without_secret_values


def described(queue: ModelQueue) -> dict[str, object]:
    """What operators see of a model of the pool; call it in the event loop."""
    entry: dict[str, object] = {"model": queue.name, "state": "unloaded", "queue": queue.length}
    entry["restarts"] = queue.restarts
    if queue.error is not None:
        entry["error"] = queue.error.message
        if queue.error.log:
            entry["log"] = list(queue.error.log)
    place = queue.place
    if place is None:
        return entry
    instance = place.instance
    if (reason := instance.suspicion) is not None:
        entry["stalled"] = reason
    elif queue.error is not None and queue.error.code == STALLED:
        entry["stalled"] = queue.error.message
    now = asyncio.get_running_loop().time()
    idle_s = now - place.released_at
    return entry | {
        "state": "unloading" if instance.state is State.READY and not place.open else str(instance.state),
        "pid": instance.pid or None,
        "port": instance.port or None,
        "cmd": shlex.join(without_secret_values(instance.argv)) or None,
        "leases": place.leases,
        "helper": queue.helper,
        "slots": {"busy": place.generating, "total": len(place.slots)},
        "loaded_s": round(now - place.ready_at, 1) if math.isfinite(place.ready_at) else None,
        "idle_s": round(idle_s, 1) if math.isfinite(idle_s) and not place.leases else None,
        "last_used": round(time.time() - idle_s, 3) if math.isfinite(idle_s) else None,
        "rss_bytes": _rss_bytes(instance.pid),
        "ready_s": round(instance.load_s, 3) if instance.load_s is not None else None,
    }


def totals(queues: Iterable[ModelQueue]) -> list[dict[str, object]]:
    """How often processes were started, started anew after a crash, and evicted, for each model that had one."""
    return [
        {"model": queue.name, "starts": queue.starts, "restarts": queue.restarts, "evictions": queue.evictions}
        for queue in queues
        if queue.starts
    ]


def _rss_bytes(pid: int) -> int | None:
    try:
        return int(psutil.Process(pid).memory_info().rss) if pid else None
    except psutil.Error:
        return None
