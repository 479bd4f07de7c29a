"""The model lists of OpenAI's and Anthropic's API and of llama-server's router mode."""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import web

from llama_smart_proxy.proxy.api.state import PROXY
from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.dialects.anthropic import models as anthropic_models
from llama_smart_proxy.proxy.dialects.cards import Shown
from llama_smart_proxy.proxy.http.headers import PARAMS
from llama_smart_proxy.proxy.models.router import Entry

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
    await router.described(LISTING_S)
    items = _items(http, router.catalogue())
    if _is_anthropic(http):
        return web.json_response(anthropic_models.page(list(map(_anthropic_item, items)), http.query))
    return web.json_response({"object": "list", "data": items})


async def show_model(http: web.BaseRequest) -> web.Response:
    """`GET /v1/models/{id}`; ids may contain slashes."""
    router = http[PROXY].router
    entry = router.entry(await router.resolve(http[PARAMS]["id"], pull=False))
    await router.described(LISTING_S)
    others = [other for other in router.catalogue() if other.id != entry.id]
    item = _items(http, [*others, entry])[-1]  # its name depends on the others
    return web.json_response(_anthropic_item(item) if _is_anthropic(http) else item)


def _items(http: web.BaseRequest, entries: Sequence[Entry]) -> list[Json]:
    """The items of OpenAI's list of models, with their cards."""
    proxy = http[PROXY]
    partners = proxy.chain.partners([entry.id for entry in entries])
    shown = [
        Shown(entry.id, entry.info, entry.place, agents, helps)
        for entry, (agents, helps) in zip(entries, partners, strict=True)
    ]
    created, found = proxy.router.created, proxy.router.cards.of(shown)
    return [entry.as_openai(created) | card for entry, card in zip(entries, found, strict=True)]


def _anthropic_item(item: Json) -> Json:
    return anthropic_models.item(item["id"], item["created"])


def _is_anthropic(http: web.BaseRequest) -> bool:
    return anthropic_models.lists_models(http.path, http.headers)
