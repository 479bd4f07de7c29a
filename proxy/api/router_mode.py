"""llama-server's router-mode API: load, unload, download, delete and watch models. Open WebUI uses it for connections
whose provider is "llama.cpp".

Source: llama.cpp tools/server/README.md, b11434.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from typing import Any

from aiohttp import web

from llama_smart_proxy.backends.base import Feature, Model
from llama_smart_proxy.backends.feed import Event, Kind, Subscription
from llama_smart_proxy.backends.weights import hub
from llama_smart_proxy.proxy.api.events import ServerEvent, send_events
from llama_smart_proxy.proxy.api.state import PROXY, Proxy
from llama_smart_proxy.proxy.errors import BadRequest, ModelNotFound, Overloaded
from llama_smart_proxy.proxy.http.body import read_json
from llama_smart_proxy.proxy.http.headers import RECORD, upstream_headers
from llama_smart_proxy.proxy.models.router import Router

EVENTS_S = 0.5
"""Interval in seconds in which an event stream looks for what no one reports: models of other servers and on disks."""
LISTED_S = 0.5
"""Longest wait in seconds for servers that have not answered such a look yet."""


async def load_model(http: web.BaseRequest) -> web.Response:
    """`POST /models/load`: answers at once while the model loads; for an Ollama model, once it is loaded."""
    await load(http, await _named(http), wait=False)
    return web.json_response({"success": True})


async def load(http: web.BaseRequest, name: str, *, wait: bool) -> Model:
    """Load the model `name`; without `wait`, as `Model.load`. Raises: as `Router.resolve` and `Model.load`; BadRequest
    for a model whose server loads it itself."""
    model = await _resolved(http, name)
    await model.load(wait=wait)
    return model


async def unload_model(http: web.BaseRequest) -> web.Response:
    """`POST /models/unload`: as `unload`."""
    await unload(http, await _named(http))
    return web.json_response({"success": True})


async def unload(http: web.BaseRequest, name: str) -> Model | None:
    """Unload the model `name`, or cancel its download, for which None is returned. Returns once an idle process has
    ended; a busy one ends after its answers. Raises: as `load`."""
    download = http[PROXY].router.downloads.get(_download_name(name))
    if download is not None:
        download.stop(Overloaded(f"The download of '{download.name}' was cancelled.", code="download_cancelled"))
        return None
    model = await _resolved(http, name)
    await model.unload()
    return model


async def download_model(http: web.BaseRequest) -> web.Response:
    """`POST /models`: starts a download of `org/repo:Q4_K_M` from the Hugging Face hub, unless it is present."""
    name = await _named(http)
    hub_name = _hub_name(name)
    if hub.parse_name(hub_name) is None:
        raise BadRequest(f"{name[:100]!r} is not org/repo:variant", param="model")
    download = await http[PROXY].router.download(hub_name, upstream_headers(http.headers, has_body=False))
    if download is not None:
        download.persistent = True
    return web.json_response({"success": True})


async def delete_model(http: web.BaseRequest) -> web.Response:
    """`DELETE /models?model=...`: for models downloaded to this machine; not for configured ones, and not for those of
    other servers, whose files are not the proxy's to delete here."""
    name = http.query.get("model", "")
    router = http[PROXY].router
    model = await router.find(name, pull=False) or await router.find(_hub_name(name), pull=False)
    if model is None or Feature.FILES not in model.features:
        raise ModelNotFound(f"model {name[:100]!r} not found")
    http[RECORD].routed(model.name, model.kind)
    await model.delete(upstream_headers(http.headers, has_body=True))
    return web.json_response({"success": True})


async def model_events(http: web.BaseRequest) -> web.StreamResponse:
    """`GET /models/sse`: first the status of every model, then an event for each change of status and for the progress
    of downloads. Ends when the proxy shuts down."""
    return await send_events(http, _changes)


async def _changes(proxy: Proxy, subscription: Subscription) -> AsyncGenerator[Sequence[ServerEvent], None]:
    """How models and downloads are: all at first, and from then on what has changed."""
    now = asyncio.get_running_loop().time
    look_at = -math.inf
    kinds = {Kind.MODEL, Kind.DOWNLOAD}
    sent: dict[str, Any] = {}
    while not proxy.draining.is_set():
        router = proxy.latest().router
        if now() >= look_at:
            await router.listed(LISTED_S)
            look_at = now() + EVENTS_S
            kinds = {Kind.MODEL, Kind.DOWNLOAD}
        found = (_models(router) if Kind.MODEL in kinds else {}) | (
            _downloads(router) if Kind.DOWNLOAD in kinds else {}
        )
        yield [ServerEvent("", event) for key, event in found.items() if sent.get(key) != event]
        sent |= found
        seen: Sequence[Event] = ()
        with suppress(TimeoutError):
            async with asyncio.timeout_at(look_at):
                seen = await subscription.events()
        kinds = {event.kind for event in seen}
        if any(event.data["ended"] for event in seen if event.kind is Kind.DOWNLOAD):
            look_at = -math.inf  # there may be a new model


def _models(router: Router) -> dict[str, Any]:
    """An event with the status of each model."""
    events: dict[str, Any] = {}
    for entry in router.catalogue():
        status = entry.as_openai(router.created)["status"]
        events[f"model {entry.id}"] = {
            "model": entry.id,
            "event": "model_status",
            "data": {"status": status.pop("value"), **status},
        }
    return events


def _downloads(router: Router) -> dict[str, Any]:
    """An event with the progress of each download."""
    events: dict[str, Any] = {}
    for progress in router.downloading():
        bytes_ = {"done": progress.get("completed", 0), "total": progress.get("total", 0)}
        events[f"download {progress['model']}"] = {
            "model": progress["model"],
            "event": "download_progress",
            "data": {progress.get("digest", progress["model"]): bytes_},
        }
    return events


async def _named(http: web.BaseRequest) -> str:
    name = (await read_json(http, http[PROXY].max_body_bytes)).get("model")
    if not isinstance(name, str) or not name:
        raise BadRequest("model is required", param="model")
    return name


async def _resolved(http: web.BaseRequest, name: str) -> Model:
    model = (await http[PROXY].router.resolve(name, pull=False)).model
    http[RECORD].routed(model.name, model.kind)
    if Feature.LOADING not in model.features:
        raise BadRequest(f"model {name[:100]!r} is on a server that loads its models itself", param="model")
    return model


def _hub_name(name: str) -> str:
    """The name with the hub's prefix, which llama-server's API leaves out."""
    return name if hub.parse_name(name) else f"{hub.PREFIXES[0]}{name}"


def _download_name(name: str) -> str:
    found = hub.parse_name(_hub_name(name))
    return hub.download_name(*found) if found is not None else name
