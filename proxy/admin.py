"""For operators: how the proxy and its processes are."""

from __future__ import annotations

import time

from aiohttp import web

from proxy import __version__
from proxy.shared import PROXY

STARTED = time.monotonic()


async def health(http: web.Request) -> web.Response:
    """`GET /health`: 200 while requests are served, 503 once the proxy is stopping.

    `instances` has one object for each model that has a process or waiters, or whose last start failed. `proxy` and
    `upstream` are what one of the replaced projects answered here.
    """
    proxy = http.app[PROXY]
    draining = proxy.draining.is_set()
    instances = proxy.router.pool.status()
    remotes = [
        {"name": remote.name, "url": str(remote.connections.endpoint), "models": len(remote.models)}
        | ({"error": remote.error} if remote.error else {})
        for remote in proxy.router.remotes
    ]
    ollama = proxy.router.ollama
    remotes += ollama.status() if ollama is not None else []
    body = {
        "status": "unhealthy" if draining else "healthy",
        "proxy": "stopping" if draining else "Ok",
        "upstream": "error" if any("error" in remote for remote in remotes) else "Ok",
        "version": __version__,
        "uptime_s": round(time.monotonic() - STARTED, 1),
        "instances": instances,
        "remotes": remotes,
        "downloads": proxy.router.downloads.status(),
    }
    return web.json_response(body, status=503 if draining else 200)
