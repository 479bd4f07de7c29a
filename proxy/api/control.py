"""What operators see of the running proxy and change in it: `/running` and the like."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

from aiohttp import web

from llama_smart_proxy.backends.base import Feature, Model
from llama_smart_proxy.proxy.api.state import PROXY, Proxy
from llama_smart_proxy.proxy.chat import Json

STATES = {"loaded": "ready", "loading": "starting"}
"""The states of models of other servers, as llama-swap names them; the rest have the same names."""
ADMIN_ONLY = ("pid", "port", "proxy", "error", "log", "stalled", "restarts")
"""What an entry of `/running` has for administrators only: it shows the machine, and what others caused."""


async def running(http: web.BaseRequest) -> web.Response:
    """`GET /running`: an object with `running`, one entry for each model that has a process, is fetched, is waited for,
    has failed, or that another server has loaded.

    `state` is `ready`, `starting`, `unloading` (completes its answers), `stopping`, `downloading`, `queued` or
    `failed`. `slots` has `busy` and `total`; `queue` is how many requests wait. Times ending in `_s` are seconds,
    `expires_in_s` is null for a model that stays. `ttl` is the same as whole seconds, 0 for one that stays.

    Source of the shape, and of `ready`, `starting` and `stopping`: `/running` of llama-swap, `internal/server/api.go`
    at 0bdb3720.
    """
    return web.json_response({"running": await entries(http[PROXY])})


async def entries(proxy: Proxy) -> list[Json]:
    """The entries of `running`, by name."""
    instances = {str(instance["model"]): instance for instance in proxy.router.status().instances}
    elsewhere = [model for model in proxy.router.models() if model.name not in instances and _is_loaded(model)]
    ours = [(name, proxy.router.known(name)) for name in instances]
    described = await asyncio.gather(
        *(_entry(name, model, instances[name]) for name, model in ours),
        *(_entry(model.name, model, {}) for model in elsewhere),
    )
    return sorted(described, key=lambda entry: str(entry["model"]))


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
