"""The model lists of OpenAI's and Anthropic's API and of llama-server's router mode."""

from __future__ import annotations

from aiohttp import web

from llama_smart_proxy.proxy.api.state import PROXY
from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.dialects import ANTHROPIC
from llama_smart_proxy.proxy.dialects.anthropic import models as anthropic_models
from llama_smart_proxy.proxy.errors import ProxyError
from llama_smart_proxy.proxy.http.headers import EXTRA, PARAMS, named_in

LISTING_S = 0.5
"""Longest wait in seconds for servers that have not answered since the start."""
RELOAD_S = 5.0
"""Longest wait in seconds for a new look at folders and servers."""


async def list_models(http: web.BaseRequest) -> web.Response:
    """`GET /v1/models`, in Anthropic's shape for its clients, and `GET /models` of llama-server's router mode."""
    router = http[PROXY].router
    if http.query.get("reload"):  # of router mode
        await router.reread(RELOAD_S)
    await router.listed(LISTING_S)
    entries = router.catalogue()
    if _is_anthropic(http):
        items = [anthropic_models.item(entry.id, router.created) for entry in entries]
        try:
            return _for_anthropic(http, anthropic_models.page(items, http.query))
        except ProxyError as exc:
            return _for_anthropic(http, exc)
    return web.json_response({"object": "list", "data": [entry.as_openai(router.created) for entry in entries]})


async def show_model(http: web.BaseRequest) -> web.Response:
    """`GET /v1/models/{id}`; ids may contain slashes."""
    router = http[PROXY].router
    try:
        entry = router.entry(await router.resolve(http[PARAMS]["id"], pull=False))
    except ProxyError as exc:
        if _is_anthropic(http):
            return _for_anthropic(http, exc)
        raise
    if _is_anthropic(http):
        return _for_anthropic(http, anthropic_models.item(entry.id, router.created))
    return web.json_response(entry.as_openai(router.created))


def _is_anthropic(http: web.BaseRequest) -> bool:
    return anthropic_models.VERSION_HEADER in http.headers and http.path.startswith("/v1/")


def _for_anthropic(http: web.BaseRequest, answer: Json | ProxyError) -> web.Response:
    http[EXTRA] += named_in(http, ANTHROPIC.id_headers)
    if isinstance(answer, ProxyError):
        return web.Response(status=answer.status, body=ANTHROPIC.error_body(answer), content_type="application/json")
    return web.json_response(answer)
