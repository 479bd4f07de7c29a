"""A model's own server, under `/upstream/{model}/`: for its web pages, and for what the proxy has no endpoint for."""

from __future__ import annotations

import logging
import re
import time
from urllib.parse import unquote

from aiohttp import web

from llama_smart_proxy.backends.base import UpstreamRequest
from llama_smart_proxy.proxy.api.state import PROXY, Proxy
from llama_smart_proxy.proxy.errors import BadRequest
from llama_smart_proxy.proxy.http.body import read_bytes
from llama_smart_proxy.proxy.http.headers import RECORD, upstream_headers, upstream_query
from llama_smart_proxy.proxy.http.response import ResponseWriter
from llama_smart_proxy.proxy.models.router import Route
from llama_smart_proxy.proxy.stream.relay import relay_bytes

logger = logging.getLogger(__name__)

PREFIX = "/upstream/"
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
MOST_PARTS = 8
"""Segments of a path that may belong to a model's name."""
_DECODINGS = 3
"""How often a path may have been encoded, at most."""


async def upstream(http: web.BaseRequest) -> web.StreamResponse:
    """`/upstream/{model}/...`: the answer of the model's server to the same request for the rest of the path, without
    the client's credentials. The model is loaded for it. The longest beginning of the path that is a model's name is
    one; a slash in it may be encoded.

    Raises: ModelNotFound, BadRequest 400 for a path that leaves its folder, 501 for a model whose server is no process
    of this proxy; as `relay_bytes`.
    """
    whole, mark, query = http.raw_path.partition("?")
    name, path = _split(http[PROXY], whole.removeprefix(PREFIX))
    route = await _resolved(http, name)
    if not path:  # so that relative links of its pages lead back here
        status = 301 if http.method in ("GET", "HEAD") else 308
        location = f"./{whole.rpartition('/')[2]}/{mark}{query}"
        return web.Response(status=status, headers={"Location": location})
    _check(path)
    query = upstream_query(query)
    target = f"{path}?{query}" if query else path
    body = await read_bytes(http, http[PROXY].max_body_bytes) if http.body_exists else b""
    headers = upstream_headers(http.headers, has_body=False, forwards=route.model.forwards)
    if (kind := http.headers.get("Content-Type")) is not None:
        headers.append(("Content-Type", kind))
    request = UpstreamRequest(http.method, target, body, headers, slot=False, journal=http[RECORD])
    http[RECORD].resolved_s = time.monotonic()
    return await relay_bytes(ResponseWriter(http, http[PROXY].config.server.send_stall_s), route.model, request)


def _split(proxy: Proxy, rest: str) -> tuple[str, str]:
    """The name of the model at the beginning of `rest`, and the path behind it, as it came; the first segment if no
    model is known there."""
    parts = rest.split("/")
    for count in range(min(len(parts), MOST_PARTS), 0, -1):
        name = unquote("/".join(parts[:count]))
        if name and (proxy.router.configures(name) or proxy.router.known(name) is not None):
            break
    else:
        count, name = 1, unquote(parts[0])
    return name, "".join(f"/{part}" for part in parts[count:])


async def _resolved(http: web.BaseRequest, name: str) -> Route:
    if not name:
        raise BadRequest("the path must begin with the name of a model: /upstream/MODEL/", status=404, code="not_found")
    route = await http[PROXY].router.resolve(name, pull=False)
    model = route.model
    http[RECORD].routed(model.name, model.kind)
    if model.output is None:
        message = f"model {model.name[:100]!r} runs on a server of its own ({model.owner}), to be called directly"
        raise BadRequest(message, status=501, code="not_supported")
    return route


def _check(path: str) -> None:
    """Raises: BadRequest for a path that the server could take for one above its root, however it decodes it."""
    for _ in range(_DECODINGS):
        if ".." in re.split(r"[/\\;]", path) or not path.isprintable():
            raise BadRequest("the path must not contain .. or control characters", code="invalid_path")
        path = unquote(path)
