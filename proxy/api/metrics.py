"""`GET /metrics`: the counts of the proxy, for Prometheus."""

from __future__ import annotations

import importlib
import sys
from functools import partial

from aiohttp import web

from llama_smart_proxy.backends.threads import run_in_thread
from llama_smart_proxy.proxy.api.state import PROXY
from llama_smart_proxy.proxy.http.aside import in_thread


async def own_metrics(http: web.BaseRequest) -> web.Response:
    """All counts, in the format that the client accepts."""
    if "prometheus_client" not in sys.modules:
        await run_in_thread(partial(importlib.import_module, "prometheus_client"))
    from llama_smart_proxy.proxy.metrics import export

    proxy = http[PROXY]
    status = proxy.router.status()
    agents = [
        export.AgentCounts(item.name, item.counts.calls, item.counts.failures, item.counts.spent_s)
        for item in proxy.chain.plugins
    ]
    now = export.Now(status.instances, agents, len(proxy.running.requests), proxy.history.dropped)
    families, accept = export.collected(proxy.metrics, now), http.headers.get("Accept", "")
    body, content_type = await in_thread(partial(export.encoded, accept=accept), families, urgent=False)
    return web.Response(body=body, headers={"Content-Type": content_type})
