"""The model endpoints of the Ollama API, for the models of all providers.

Source: Ollama's server/routes.go and api/types.go.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import aclosing, nullcontext

import aiohttp
import orjson
from aiohttp import web

from llama_smart_proxy.backends.base import Management, Model, ModelInfo, UpstreamRequest
from llama_smart_proxy.backends.http.connection import check_redirect
from llama_smart_proxy.backends.names import key_of
from llama_smart_proxy.backends.weights.downloads import Download
from llama_smart_proxy.proxy.api.models import LISTING_S
from llama_smart_proxy.proxy.api.state import PROXY, Proxy
from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.config import checked_name
from llama_smart_proxy.proxy.dialects import OLLAMA
from llama_smart_proxy.proxy.dialects.ollama import models
from llama_smart_proxy.proxy.dialects.ollama.dialect import error_line
from llama_smart_proxy.proxy.errors import BadRequest, ModelNotFound, ProxyError, UpstreamFailed
from llama_smart_proxy.proxy.http.body import read_json, serialise
from llama_smart_proxy.proxy.http.headers import RECORD, upstream_headers
from llama_smart_proxy.proxy.http.response import ResponseWriter
from llama_smart_proxy.proxy.http.server import FrontConnection
from llama_smart_proxy.proxy.models.router import Entry, Route, Router
from llama_smart_proxy.proxy.stream.relay import PLAIN_LIMIT, relay

logger = logging.getLogger(__name__)

VERSION = "0.13.0"
"""The version of Ollama whose API is implemented. Clients compare it; Open WebUI accepts only digits and dots."""
SIGN_IN = "https://ollama.com/signin"
FAMILY = models.NAME
"""The key of this API in `Model.speaks`."""


async def root(http: web.BaseRequest) -> web.Response:
    """`GET /`: clients detect an Ollama server by this answer."""
    return web.Response(text="Ollama is running")


async def version(http: web.BaseRequest) -> web.Response:
    """`GET /api/version`."""
    return web.json_response({"version": VERSION})


async def tags(http: web.BaseRequest) -> web.Response:
    """`GET /api/tags`: all models of all providers, by the names of `/v1/models` and their aliases, except those that
    an Ollama host is configured to pull and does not have yet."""
    router = http[PROXY].router
    await router.listed(LISTING_S)
    entries = router.catalogue()
    return _listing(_by_all_names(router, entries, await asyncio.gather(*map(_tags_item, entries))))


async def _tags_item(entry: Entry) -> Json | None:
    if entry.model is None:
        return models.tags_item(ModelInfo(entry.id))
    info = await entry.model.info()
    if FAMILY in entry.model.speaks and FAMILY not in info.native and entry.id == info.name:
        return None
    return _renamed(models.tags_item(info), entry.id)


async def ps(http: web.BaseRequest) -> web.Response:
    """`GET /api/ps`: the loaded models, by descending expiry time."""
    router = http[PROXY].router
    entries = router.catalogue()
    items = _by_all_names(router, entries, await asyncio.gather(*map(_ps_item, entries)))
    return _listing(sorted(items, key=lambda item: str(item.get("expires_at", "")), reverse=True))


async def _ps_item(entry: Entry) -> Json | None:
    residence = await entry.model.residence() if entry.model is not None else None
    if entry.model is None or residence is None:
        return None
    return _renamed(models.ps_item(await entry.model.info(), residence), entry.id)


def _renamed(item: Json, name: str) -> Json:
    """The item under the name `name`: a virtual model is listed like its base model."""
    return item if item["name"] == name else {**item, "name": name, "model": name}


def _by_all_names(router: Router, entries: Sequence[Entry], items: Sequence[Json | None]) -> list[Json]:
    """The `items` that there are, each also under the configured aliases of its entry."""
    taken = {key_of(entry.id) for entry in entries}
    named: list[Json] = []
    for entry, item in zip(entries, items, strict=True):
        if item is not None:
            aliases = [alias for alias in entry.aliases if router.configures(alias) and key_of(alias) not in taken]
            taken.update(map(key_of, aliases))
            named += [item, *(_renamed(item, alias) for alias in aliases)]
    return named


def _listing(items: Sequence[Json]) -> web.Response:
    return web.json_response({"models": items}, dumps=_dumps)


async def status(http: web.BaseRequest) -> web.Response:
    """`GET /api/status`: models of Ollama's cloud are not offered."""
    return web.json_response({"cloud": {"disabled": True, "source": "config"}})


async def me(http: web.BaseRequest) -> web.Response:
    """`POST /api/me`, which `ollama push` sends first: the account of the first Ollama host, or that there is none."""
    server = await http[PROXY].router.management(FAMILY, None)
    if server is not None:
        headers = upstream_headers(http.headers, has_body=False)
        async with server.open(UpstreamRequest("POST", "/api/me", b"", headers, slot=False)) as upstream:
            body = await upstream.read(PLAIN_LIMIT)
        if body is not None and upstream.status != 404:  # 404: an Ollama without accounts
            return web.Response(status=upstream.status, body=body, content_type="application/json")
    return web.json_response({"error": "unauthorized", "signin_url": SIGN_IN}, status=401)


async def show(http: web.BaseRequest) -> web.StreamResponse:
    """`POST /api/show`: a model's details and capabilities."""
    proxy = http[PROXY]
    body = await read_json(http, proxy.max_body_bytes)
    name = _named(body)
    model = (await _resolved(proxy, name)).model
    http[RECORD].routed(model.name, model.kind)
    if FAMILY in model.speaks:
        return await _relay_request(http, proxy, model, {**body, "model": model.name})
    info, agent = await model.info(), http.headers.get("User-Agent", "")
    answer = models.show(info, verbose=body.get("verbose") is True, requested_name=name, user_agent=agent)
    return web.json_response(answer, dumps=_dumps)


async def pull(http: web.BaseRequest) -> web.StreamResponse:
    """`POST /api/pull`: a model of the Hugging Face hub (`hf.co/org/repo:Q4_K_M`), one that is configured here, or one
    for an Ollama host to pull. The pull is cancelled when its last client disconnects and nothing else waits for it."""
    proxy = http[PROXY]
    body = await read_json(http, proxy.max_body_bytes)
    name = http[RECORD].model = _named(body)
    try:
        download = await proxy.router.download(name, upstream_headers(http.headers, has_body=False))
    except ModelNotFound as exc:
        raise OLLAMA.not_found(name, exc) from None
    async with aclosing(_lines(download)) as progress:
        if body.get("stream", True) is False:
            async for line in progress:
                last = line
            return web.json_response(last, dumps=_dumps)
        return await _stream_progress(http, progress, proxy.config.server.send_stall_s)


async def _stream_progress(http: web.BaseRequest, progress: AsyncIterator[Json], stall_s: float) -> web.StreamResponse:
    response = ResponseWriter(http, stall_s)
    response.open(200, [("content-type", "application/x-ndjson")])
    try:
        async for line in progress:
            if not response.feed(orjson.dumps(line) + b"\n"):
                await response.drained()
    except ProxyError as exc:
        response.feed(error_line(exc))
    except asyncio.CancelledError as exc:
        response.feed(error_line(response.record.cancellation(exc)))
    return await response.finish()


async def _lines(download: Download | None) -> AsyncGenerator[Json, None]:
    if download is not None:
        async with aclosing(download.watch()) as watched:
            async for progress in watched:
                yield progress
    yield {"status": "success"}


async def delete(http: web.BaseRequest) -> web.StreamResponse:
    """`DELETE /api/delete`: for models of an Ollama host, or from the Hugging Face hub; not for configured ones."""
    proxy = http[PROXY]
    body = await read_json(http, proxy.max_body_bytes)
    name = http[RECORD].model = _named(body)
    route = await _resolved(proxy, name)
    await route.model.delete(upstream_headers(http.headers, has_body=True))
    return web.Response()


async def change(http: web.BaseRequest) -> web.StreamResponse:
    """`POST /api/copy`, `/api/push` and `/api/create`: forwarded to the Ollama host that has the model; for an unknown
    model, to the first host, as blobs are."""
    proxy = http[PROXY]
    body = await read_json(http, proxy.max_body_bytes)
    key = next((key for key in ("source", "from", "model", "name") if body.get(key)), "source")
    source = body.get(key)
    if not isinstance(source, str):
        raise BadRequest("model is required")
    _check_names(body.get(name) for name in ("source", "destination", "from", "model", "name"))
    http[RECORD].model = source[:100]
    model = proxy.router.known(source)
    if model is not None and FAMILY not in model.speaks:
        raise BadRequest(f"model {source[:100]!r} is run by {model.kind}; only models of an Ollama can be changed")
    creates = http.path.startswith("/api/create")  # also from files, or a model not pulled yet
    if model is not None and not (creates and key in ("model", "name")):
        body[key] = model.name  # it may be an alias
    server = await _managing(proxy, source if model is not None or not creates else None)
    try:
        return await _relay_request(http, proxy, server, body)
    finally:
        server.changed()


async def blob(http: web.BaseRequest) -> web.StreamResponse:
    """`HEAD` and `POST /api/blobs/sha256:...`: a file for `/api/create`, streamed to the first Ollama host."""
    server = await _managing(http[PROXY], None)
    limits = server.timeouts
    timeout = aiohttp.ClientTimeout(total=None, connect=limits.connect_s)
    headers = dict(server.headers)
    headers |= {"Content-Length": str(http.content_length)} if http.content_length is not None else {}
    connection = http.protocol
    receiving = connection.receiving_body(http.content) if isinstance(connection, FrontConnection) else nullcontext()
    try:
        with receiving:
            async with (
                asyncio.timeout(None) as limit,
                aiohttp.ClientSession(timeout=timeout, trust_env=False) as session,
                session.request(
                    http.method,
                    f"{server.url}{http.path}",
                    data=_file(http, limit, limits.first_byte_s),
                    headers=headers,
                    allow_redirects=False,
                ) as upstream,
            ):
                body = await upstream.content.read(PLAIN_LIMIT)
    except (aiohttp.ClientError, TimeoutError) as exc:
        raise UpstreamFailed(f"the blob could not be passed on: {exc or type(exc).__name__}") from exc
    check_redirect(upstream.status, upstream.headers.get("Location", ""))
    return web.Response(status=upstream.status, body=body, content_type="application/json" if body else None)


def _file(http: web.BaseRequest, limit: asyncio.Timeout, answer_s: float) -> AsyncIterator[bytes] | None:
    """The client's file, if there is one. Once it is sent, the whole answer has so many seconds."""

    def sent() -> None:
        limit.reschedule(asyncio.get_running_loop().time() + answer_s)

    async def pieces() -> AsyncIterator[bytes]:
        async for piece in http.content.iter_any():
            yield piece
        sent()

    if http.can_read_body:
        return pieces()
    sent()
    return None


def _check_names(names: Iterable[object]) -> None:
    """Reject names that a server could interpret as a path or a flag. Raises: BadRequest."""
    try:
        for name in names:
            if name not in (None, ""):
                checked_name(str(name))
    except ValueError:
        raise BadRequest(models.INVALID_NAME) from None


async def _relay_request(
    http: web.BaseRequest, proxy: Proxy, server: Model | Management, body: Json
) -> web.StreamResponse:
    """Relay the request with `body` to a server of this API."""
    headers = upstream_headers(http.headers, has_body=True)
    request = UpstreamRequest(http.method, http.path.rstrip("/"), serialise(body), headers, slot=False)
    return await relay(ResponseWriter(http, proxy.config.server.send_stall_s), server, request, OLLAMA)


async def _managing(proxy: Proxy, model: str | None) -> Management:
    """The Ollama host that has `model`; for None the first one."""
    server = await proxy.router.management(FAMILY, model)
    if server is None:
        raise BadRequest("no Ollama is configured, and only an Ollama can do this", status=404)
    return server


async def _resolved(proxy: Proxy, name: str) -> Route:
    """Raises: BadRequest for an invalid name; as `Router.resolve`."""
    try:
        return await proxy.router.resolve(name, pull=False)
    except ModelNotFound as exc:
        raise OLLAMA.not_found(name, exc) from None


def _named(body: Json) -> str:
    name = body.get("model") or body.get("name")
    if not isinstance(name, str) or not name:
        raise BadRequest("model is required")
    return name


def _dumps(value: object) -> str:
    return orjson.dumps(value).decode()
