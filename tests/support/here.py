"""The proxy in the process of the test, for what cannot be seen from outside."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from llama_smart_proxy.proxy.app import App
from llama_smart_proxy.proxy.config import Config
from llama_smart_proxy.proxy.http.server import FrontServer
from llama_smart_proxy.proxy.serve import front_server


@asynccontextmanager
async def served_here(settings: dict[str, Any]) -> AsyncIterator[tuple[FrontServer, int]]:
    """The server of a proxy with these settings, and the port where it listens."""
    async with running_here(App(Config.model_validate(settings))) as served:
        yield served


@asynccontextmanager
async def running_here(app: App) -> AsyncIterator[tuple[FrontServer, int]]:
    """As `served_here`, for an app that the test itself changes."""
    await app.start()
    front = front_server(app, app.proxy.config)
    listener = await asyncio.get_running_loop().create_server(front, "127.0.0.1", 0)
    try:
        yield front, int(listener.sockets[0].getsockname()[1])
    finally:
        listener.close()
        await front.shutdown(1.0)
        await app.close()
