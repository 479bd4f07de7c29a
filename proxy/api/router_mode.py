"""llama-server's router-mode API: load, unload, download, delete and watch models. Open WebUI uses it for connections
whose provider is "llama.cpp".

Source: llama.cpp tools/server/README.md, b11434.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any, cast

import orjson
from aiohttp import web
from aiohttp_sse import sse_response

from llama_smart_proxy.backends.base import Feature, Model
from llama_smart_proxy.backends.weights import hub
from llama_smart_proxy.proxy.api.state import PROXY
from llama_smart_proxy.proxy.errors import BadRequest, ModelNotFound, Overloaded
from llama_smart_proxy.proxy.http.body import read_json
from llama_smart_proxy.proxy.http.headers import RECORD, own_headers, upstream_headers
from llama_smart_proxy.proxy.models.router import Router

EVENTS_S = 0.5
"""Polling interval of an event stream in seconds, and its longest wait for servers that have not answered yet."""


async def load_model(http: web.BaseRequest) -> web.Response:
    """`POST /models/load`: answers at once while the model loads; for an Ollama model, once it is loaded."""
    model = await _resolved(http, await _named(http))
    await model.load(wait=False)
    return web.json_response({"success": True})


async def unload_model(http: web.BaseRequest) -> web.Response:
    """`POST /models/unload`: answers once an idle process has ended; a busy one ends after its answers. Also
    cancels a download of the model."""
    name = await _named(http)
    download = http[PROXY].router.downloads.get(_download_name(name))
    if download is not None:
        download.stop(Overloaded(f"The download of '{download.name}' was cancelled.", code="download_cancelled"))
    else:
        model = await _resolved(http, name)
        await model.unload()
    return web.json_response({"success": True})


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
    if http.method == "HEAD":
        return web.Response(content_type="text/event-stream")
    proxy = http[PROXY]
    before: dict[str, Any] = {}
    # sse_response uses only what the request's base class has
    async with sse_response(cast(web.Request, http), headers=dict(own_headers(http))) as response:
        while response.is_connected() and not proxy.draining.is_set():
            await proxy.router.listed(EVENTS_S)
            now = _events(proxy.router)
            for key, event in now.items():
                if before.get(key) != event:
                    await response.send(orjson.dumps(event).decode())
            before = now
            with suppress(TimeoutError):
                async with asyncio.timeout(EVENTS_S):
                    await proxy.draining.wait()
    return response


def _events(router: Router) -> dict[str, Any]:
    """The current events: the status of each model, and the progress of each download."""
    events: dict[str, Any] = {}
    for entry in router.catalogue():
        status = entry.as_openai(router.created)["status"]
        events[f"model {entry.id}"] = {
            "model": entry.id,
            "event": "model_status",
            "data": {"status": status.pop("value"), **status},
        }
    for progress in router.downloads.status():
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
