"""What operators see of the running proxy and change in it: `/running` and the like."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from aiohttp import web

from llama_smart_proxy.backends.base import Feature, Model
from llama_smart_proxy.proxy.api import router_mode
from llama_smart_proxy.proxy.api.state import PROXY, Proxy
from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.errors import BadRequest
from llama_smart_proxy.proxy.http.headers import PARAMS, RECORD
from llama_smart_proxy.proxy.http.response import ResponseWriter

if TYPE_CHECKING:
    from llama_smart_proxy.backends.pool.output import Follower

LINES = 200
"""Lines of a log that are sent if the client does not name a number; a server's output is not kept beyond that."""

STATES = {"loaded": "ready", "loading": "starting"}
"""The states of models of other servers, as llama-swap names them; the rest have the same names."""
DRAINING_S = 0.5
"""Interval in seconds in which one that follows a log looks whether the proxy is shutting down."""
ADMIN_ONLY = ("pid", "port", "proxy", "cmd", "error", "log", "stalled", "restarts")
"""What an entry of `/running` has for administrators only: it shows the machine, and what others caused."""


async def running(http: web.BaseRequest) -> web.Response:
    """`GET /running`: an object with `running`, one entry for each model that has a process, is fetched, is waited for,
    has failed, or that another server has loaded, and `requests`, as of `Running.shown`.

    `state` is `ready`, `starting`, `unloading` (completes its answers), `stopping`, `downloading`, `queued` or
    `failed`. `slots` has `busy` and `total`; `queue` is how many requests wait. Times ending in `_s` are seconds,
    `expires_in_s` is null for a model that stays. `ttl` is the same as whole seconds, 0 for one that stays.

    Source of the shape, and of `ready`, `starting` and `stopping`: `/running` of llama-swap, `internal/server/api.go`
    at 0bdb3720.
    """
    proxy = http[PROXY]
    grant, found = proxy.grant, await entries(proxy)
    if not grant.is_admin:
        found = [{name: value for name, value in entry.items() if name not in ADMIN_ONLY} for entry in found]
    requests = proxy.running.shown(None if grant.is_admin else grant.client)
    return web.json_response({"running": found, "requests": requests})


async def entries(proxy: Proxy) -> list[Json]:
    """The entries of `running` for the clients that see this proxy, by name."""
    instances = {str(instance["model"]): instance for instance in proxy.router.status().instances}
    elsewhere = [model for model in proxy.router.models() if model.name not in instances and _is_loaded(model)]
    ours = [(name, proxy.router.known(name)) for name in instances]
    if not proxy.grant.is_admin:  # for whom other models may not exist
        ours = [(name, model) for name, model in ours if model is not None]
    described = await asyncio.gather(
        *(_entry(name, model, instances[name]) for name, model in ours),
        *(_entry(model.name, model, {}) for model in elsewhere),
    )
    return sorted(described, key=lambda entry: str(entry["model"]))


async def load_model(http: web.BaseRequest) -> web.Response:
    """`POST /admin/models/{name}/load`: answers when the model is loaded, with `?wait=0` while it loads."""
    wait = http.query.get("wait") not in ("0", "false")
    model = await router_mode.load(http, http[PARAMS]["name"], wait=wait)
    state = model.state.value
    return _changed(model.name, "loading" if state == "unloaded" and not wait else state)


async def unload_model(http: web.BaseRequest) -> web.Response:
    """`POST /admin/models/{name}/unload`: answers once an idle process has ended; a busy one is `unloading` and ends
    after its answers. Also cancels a download of the model."""
    name = http[PARAMS]["name"]
    model = await router_mode.unload(http, name)
    return _changed(model.name, model.state.value) if model is not None else _changed(name, "unloaded")


def _changed(name: str, state: str) -> web.Response:
    return web.json_response({"success": True, "model": name, "state": state})


async def logs(http: web.BaseRequest) -> web.StreamResponse:
    """`GET /logs/{model}`: the last lines that its server has printed, `?lines=` of them, as plain text. With
    `?follow=1` the lines to come as well, also those of the next process, until the client leaves or the proxy shuts
    down.

    Raises: BadRequest 501 for a model whose server is no process of this proxy; as `Router.resolve`.
    """
    model = (await http[PROXY].router.resolve(http[PARAMS]["name"], pull=False)).model
    http[RECORD].routed(model.name, model.kind)
    output = model.output
    if output is None:
        message = f"model {model.name[:100]!r} runs on a server of its own ({model.owner}), which has its log"
        raise BadRequest(message, status=501, code="not_supported")
    lines = _count(http.query.get("lines", str(LINES)))
    if http.query.get("follow", "0") in ("0", "false") or http.method == "HEAD":
        return web.Response(text=_text(output.tail(lines)))
    with output.follow() as follower:
        return await _follow(http, follower, output.tail(lines))


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise BadRequest("lines must be a number, of at least 0", param="lines")
    return int(text)


def _text(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


async def _follow(http: web.BaseRequest, follower: Follower, lines: Sequence[str]) -> web.StreamResponse:
    proxy = http[PROXY]
    proxy.uses.end(http)  # it may be open for days, over many configurations
    response = ResponseWriter(http, proxy.config.server.send_stall_s)
    response.open(200, [("Content-Type", "text/plain; charset=utf-8")])
    response.begin()
    response.record.first_byte_s = time.monotonic()  # it streams from now on
    while proxy.goes_on:
        if lines and not response.feed(_text(lines).encode()):
            await response.drained()
        lines = ()
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAINING_S):
                lines = await follower.lines()
    return await response.finish()


def _is_loaded(model: Model) -> bool:
    """Whether its server has it in memory, as far as known. A remote does not report that."""
    return Feature.LOADING in model.features and model.state.value != "unloaded"


async def _entry(name: str, model: Model | None, instance: Mapping[str, Any]) -> Json:
    """`model` is None if it is configured no more, and only its process is left."""
    residence = await model.residence() if model is not None else None
    card = model.card if model is not None else None
    expires_in_s = None if residence is None else residence.expires_at - time.time()
    if expires_in_s is not None and not math.isfinite(expires_in_s):
        expires_in_s = None
    entry: Json = {
        "model": name,
        "state": _state(model, instance),
        "name": card.title if card is not None else "",
        "description": card.description if card is not None else "",
        "ttl": 0 if expires_in_s is None else max(1, math.ceil(expires_in_s)),
        "backend": model.kind if model is not None else "",
        "queue": instance.get("queue", 0),
        "slots": instance.get("slots"),
        "helper": bool(instance.get("helper")),
        "loaded_s": instance.get("loaded_s"),
        "idle_s": instance.get("idle_s"),
        "expires_in_s": None if expires_in_s is None else round(max(0.0, expires_in_s), 1),
        "rss_bytes": instance.get("rss_bytes"),
        "vram_bytes": residence.size_vram or None if residence is not None else None,
        "context_length": residence.context_length or None if residence is not None else None,
    }
    if "download" in instance:
        entry["download"] = instance["download"]
    if instance.get("port"):
        entry["proxy"] = f"http://127.0.0.1:{instance['port']}"
    return entry | _only(instance, ADMIN_ONLY)


def _state(model: Model | None, instance: Mapping[str, Any]) -> str:
    if not instance:
        value = model.state.value if model is not None else ""
        return STATES.get(value, value)
    state = str(instance["state"])
    if state == "unloaded":
        return "queued" if instance["queue"] else "failed"
    return state


def _only(instance: Mapping[str, Any], names: Iterable[str]) -> Json:
    return {name: instance[name] for name in names if instance.get(name) is not None}
