"""The part of the Ollama API that is about models rather than chats, over both backends.

What an Ollama holds is passed on as it says it; a model of ours is described from its GGUF file.
Source: Ollama's server/routes.go and api/types.go.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing, nullcontext, suppress
from functools import partial

import aiohttp
import orjson
from aiohttp import web

from llama_smart_proxy.backends.base import ModelInfo, UpstreamRequest
from llama_smart_proxy.backends.names import key_of
from llama_smart_proxy.backends.ollama.hosts import Hosts
from llama_smart_proxy.backends.ollama.model import OllamaModel
from llama_smart_proxy.backends.weights import hub
from llama_smart_proxy.backends.weights.downloads import Download
from llama_smart_proxy.proxy.api.state import MODEL, PROXY, Proxy
from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.config import checked_name
from llama_smart_proxy.proxy.dialects import OLLAMA
from llama_smart_proxy.proxy.dialects.ollama import models
from llama_smart_proxy.proxy.errors import BadRequest, ModelNotFound, ProxyError, UpstreamFailed
from llama_smart_proxy.proxy.http.body import read_json, serialise
from llama_smart_proxy.proxy.http.headers import upstream_headers
from llama_smart_proxy.proxy.http.server import FrontConnection
from llama_smart_proxy.proxy.models.router import Router
from llama_smart_proxy.proxy.stream.relay import PLAIN_LIMIT, ask, begin_stream, finish, patiently, relay

logger = logging.getLogger(__name__)

VERSION = "0.13.0"
"""The version of Ollama whose API this is. Clients compare it; Open WebUI fails on anything but digits and dots."""
LISTING_S = 0.5
"""Longest wait for an Ollama that has not been heard of yet."""


async def root(http: web.Request) -> web.Response:
    """`GET /`: how clients find out that there is an Ollama."""
    return web.Response(text="Ollama is running")


async def version(http: web.Request) -> web.Response:
    """`GET /api/version`."""
    return web.json_response({"version": VERSION})


async def tags(http: web.Request) -> web.Response:
    """`GET /api/tags`: every model of every backend, the same names as in `/v1/models`."""
    proxy = http.app[PROXY]
    router = proxy.router
    await router.heard_of_all(LISTING_S)
    items = [models.tags_item(info) for info in await asyncio.gather(*(own.info() for own in router.local.all()))]
    for remote in router.remotes:
        items += [models.tags_item(ModelInfo(model)) for model in remote.models]
    if router.ollama is not None:
        items += router.ollama.items()
    items += _of_virtual(router, items)
    named = {item["name"]: item for item in reversed(items)}  # of two with the same name the first is the one served
    return web.json_response({"models": list(reversed(named.values()))}, dumps=_dumps)


async def ps(http: web.Request) -> web.Response:
    """`GET /api/ps`: the models that are loaded, the longest-lived first."""
    proxy = http.app[PROXY]
    items = []
    for own in proxy.router.local.all():
        residence = await own.residence()
        if residence is not None:
            items.append(models.ps_item(await own.info(), residence))
    ollama = proxy.router.ollama
    if ollama is not None:
        with suppress(TimeoutError):
            async with asyncio.timeout(LISTING_S):
                await ollama.looked_up()
        items += ollama.loaded()
    items += _of_virtual(proxy.router, items, only_known=True)
    items.sort(key=lambda item: str(item.get("expires_at", "")), reverse=True)
    return web.json_response({"models": items}, dumps=_dumps)


def _of_virtual(router: Router, items: list[Json], *, only_known: bool = False) -> list[Json]:
    """The items of virtual models: those of the models that they are, under their own names."""
    known = {key_of(item["name"]): item for item in items}
    named = []
    for name, base in router.virtual.items():
        item = known.get(key_of(base))
        if item is not None or not only_known:
            named.append({**(item or models.tags_item(ModelInfo(name))), "name": name, "model": name})
    return named


async def show(http: web.Request) -> web.StreamResponse:
    """`POST /api/show`: what the model is and can do."""
    proxy = http.app[PROXY]
    body = await read_json(http, proxy.max_body_bytes)
    name = _named(body)
    target = await proxy.router.resolve(name, pull=False)
    http[MODEL] = target.model
    if isinstance(target.backend, OllamaModel):
        return await _forward(http, proxy, target.model, {**body, "model": target.model}, changes=False)
    info, agent = await target.backend.info(), http.headers.get("User-Agent", "")
    answer = models.show(info, verbose=body.get("verbose") is True, requested_name=name, user_agent=agent)
    return web.json_response(answer, dumps=_dumps)


async def pull(http: web.Request) -> web.StreamResponse:
    """`POST /api/pull`: a model of the Hugging Face hub (`hf.co/org/repo:Q4_K_M`), one that is configured here, or one
    that an Ollama of ours shall pull. A pull that nobody but its client wants ends with its client."""
    proxy = http.app[PROXY]
    body = await read_json(http, proxy.max_body_bytes)
    name = http[MODEL] = _named(body)
    download = await _download(http, proxy, name)
    async with aclosing(_lines(download)) as progress:
        if body.get("stream", True) is False:
            async for line in progress:
                last = line
            return web.json_response(last, dumps=_dumps)
        return await _tell(http, progress, proxy.config.server.send_stall_s)


async def _tell(http: web.Request, progress: AsyncIterator[Json], stall_s: float) -> web.StreamResponse:
    answer = await begin_stream(http, 200, [("content-type", "application/x-ndjson")])
    try:
        async for line in progress:
            await patiently(http, answer.write(orjson.dumps(line) + b"\n"), stall_s)
    except ProxyError as exc:
        await patiently(http, answer.write(OLLAMA.error_event(exc)), stall_s)
    return await finish(http, answer, stall_s)


async def _download(http: web.Request, proxy: Proxy, name: str) -> Download | None:
    """The download that makes `name` available; None when it is there already."""
    router = proxy.router
    spawned = router.local.get(name)
    if spawned is not None:
        return await spawned.pool.begin_download(spawned.name, spawned.model)
    ollama = router.ollama
    if ollama is not None and (proxy.config.backend == "ollama" or hub.parse_name(name) is None):
        return ollama.pull(name, [("Via", way) for way in http.headers.getall("Via", ())])
    found = hub.parse_name(name)
    if found is None:
        raise ModelNotFound(
            f"model {name[:100]!r} cannot be pulled: it is neither configured nor hf.co/org/repo:variant"
        )
    return router.downloads.join(hub.download_name(*found), hub.work(*found))


async def _lines(download: Download | None) -> AsyncGenerator[Json, None]:
    if download is not None:
        async with aclosing(download.watch()) as watched:
            async for progress in watched:
                yield progress
    yield {"status": "success"}


async def delete(http: web.Request) -> web.StreamResponse:
    """`DELETE /api/delete`: of an Ollama, or what was pulled from the Hugging Face hub; not what is configured."""
    proxy = http.app[PROXY]
    body = await read_json(http, proxy.max_body_bytes)
    name = http[MODEL] = _named(body)
    target = await proxy.router.resolve(name, pull=False)
    await target.backend.delete(upstream_headers(http.headers, has_body=True))
    return web.Response()


async def change(http: web.Request) -> web.StreamResponse:
    """`POST /api/copy`, `/api/push` and `/api/create`: an Ollama's business."""
    proxy = http.app[PROXY]
    body = await read_json(http, proxy.max_body_bytes)
    source = next((body[key] for key in ("source", "from", "model", "name") if body.get(key)), None)
    if not isinstance(source, str):
        raise BadRequest("model is required")
    _check_names(body.get(key) for key in ("source", "destination", "from", "model", "name"))
    http[MODEL] = source[:100]
    if proxy.router.local.get(source) is not None:
        raise BadRequest(f"model {source[:100]!r} is run by llama.cpp; only models of an Ollama can be changed")
    creates = http.path.startswith("/api/create")  # of files, or of a model that is yet to be pulled, too
    known = _ollama(proxy).known(source)
    return await _forward(http, proxy, source if known or not creates else None, body)


async def blob(http: web.Request) -> web.StreamResponse:
    """`HEAD` and `POST /api/blobs/sha256:...`: a file for `/api/create`, passed on to the first Ollama as it comes."""
    host = await _ollama(http.app[PROXY]).host_for(None)
    limits = host.timeouts
    timeout = aiohttp.ClientTimeout(total=None, connect=limits.connect_s, sock_read=limits.first_byte_s)
    headers = dict(host.headers)
    headers |= {"Content-Length": str(http.content_length)} if http.content_length is not None else {}
    connection = http.protocol
    slowly = connection.receiving_body() if isinstance(connection, FrontConnection) else nullcontext()
    try:
        with slowly:
            async with (
                aiohttp.ClientSession(timeout=timeout, trust_env=False) as session,
                session.request(
                    http.method,
                    f"{host.url}{http.path}",
                    data=http.content if http.can_read_body else None,
                    headers=headers,
                    allow_redirects=False,
                ) as upstream,
            ):
                body = await upstream.content.read(PLAIN_LIMIT)
    except (aiohttp.ClientError, TimeoutError) as exc:
        raise UpstreamFailed(f"the blob could not be passed on: {exc or type(exc).__name__}") from exc
    return web.Response(status=upstream.status, body=body, content_type="application/json" if body else None)


def _check_names(names: Iterable[object]) -> None:
    """Refuse what might mean a path, or a flag, to whoever gets it. Raises: BadRequest."""
    try:
        for name in names:
            if name not in (None, ""):
                checked_name(str(name))
    except ValueError:
        raise BadRequest("invalid model name") from None


async def _forward(
    http: web.Request, proxy: Proxy, name: str | None, body: Json, *, changes: bool = True
) -> web.StreamResponse:
    """Pass the request on to the Ollama that has `name`, for None to the first; what it lists then `changes`."""
    host = await _ollama(proxy).host_for(name)
    passing = partial(relay, http, dialect=OLLAMA, stall_s=proxy.config.server.send_stall_s)
    try:
        return await ask(http, host, _call(http, body), passing)
    finally:
        if changes:
            host.changed()


def _call(http: web.Request, body: Json) -> UpstreamRequest:
    headers = upstream_headers(http.headers, has_body=True)
    return UpstreamRequest(http.method, http.path.rstrip("/"), serialise(body), headers, slot=False)


def _ollama(proxy: Proxy) -> Hosts:
    if proxy.router.ollama is None:
        raise BadRequest("no Ollama is configured, and only an Ollama can do this", status=404)
    return proxy.router.ollama


def _named(body: Json) -> str:
    name = body.get("model") or body.get("name")
    if not isinstance(name, str) or not name:
        raise BadRequest("model is required")
    return name


def _dumps(value: object) -> str:
    return orjson.dumps(value).decode()
