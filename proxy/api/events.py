"""Streams of server-sent events about the proxy itself, fed by its one feed."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple, cast

import orjson
from aiohttp import web
from aiohttp_sse import sse_response

from llama_smart_proxy.backends.feed import Subscription
from llama_smart_proxy.proxy.api.state import PROXY, Proxy
from llama_smart_proxy.proxy.http.headers import own_headers


class ServerEvent(NamedTuple):
    """One event; `name` is empty for one without a name, `data` is sent as JSON."""

    name: str
    data: Any


Source = Callable[[Proxy, Subscription], AsyncGenerator[Sequence[ServerEvent], None]]
"""The events of one client, until the proxy shuts down."""


async def events(http: web.BaseRequest) -> web.StreamResponse:
    """`GET /events`: the feed. First the last event of each kind and name, then each one as it happens; the event is
    the kind, its data an object with `name` and what `Kind` lists. A client that does not keep up loses the oldest, and
    gets how things are in their place. Ends when the proxy shuts down."""
    return await send_events(http, _feed)


async def _feed(proxy: Proxy, subscription: Subscription) -> AsyncGenerator[Sequence[ServerEvent], None]:
    while not proxy.draining.is_set():
        happened = await subscription.events()
        yield [ServerEvent(event.kind.value, {"name": event.name, **event.data}) for event in happened]


async def send_events(http: web.BaseRequest, source: Source) -> web.StreamResponse:
    """Send the events of `source`, and signs of life, until it ends or the client leaves."""
    if http.method == "HEAD":
        return web.Response(content_type="text/event-stream")
    proxy = http[PROXY]
    proxy.uses.end(http)  # a page may be open for days, over many configurations
    # sse_response uses only what the request's base class has
    async with sse_response(cast(web.Request, http), headers=dict(own_headers(http))) as response:
        with proxy.feed.subscribe() as subscription:
            async with aclosing(source(proxy, subscription)) as batches:
                async for batch in batches:
                    if not proxy.goes_on:
                        break
                    for event in batch:
                        await response.send(orjson.dumps(event.data).decode(), event=event.name or None)
                    if not response.is_connected():
                        break
    return response
