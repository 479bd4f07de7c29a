"""The model lists of OpenAI's API and of llama-server's router mode."""

from __future__ import annotations

from aiohttp import web

from llama_smart_proxy.proxy.api.state import PROXY
from llama_smart_proxy.proxy.http.headers import PARAMS

LISTING_S = 0.5
"""Longest wait in seconds for servers that have not answered since the start."""
RELOAD_S = 5.0
"""Longest wait in seconds for a new look at folders and servers."""


async def list_models(http: web.BaseRequest) -> web.Response:
    """`GET /v1/models`, and `GET /models` of llama-server's router mode, from memory."""
    router = http[PROXY].router
    if http.query.get("reload"):  # of router mode
        await router.reread(RELOAD_S)
    await router.listed(LISTING_S)
    data = [entry.as_openai(router.created) for entry in router.catalogue()]
    return web.json_response({"object": "list", "data": data})


async def show_model(http: web.BaseRequest) -> web.Response:
    """`GET /v1/models/{id}`; ids may contain slashes."""
    router = http[PROXY].router
    entry = router.entry(await router.resolve(http[PARAMS]["id"], pull=False))
    return web.json_response(entry.as_openai(router.created))
