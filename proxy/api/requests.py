"""The requests of clients, for administrators: the end of one that is being processed, usage, and recent ones."""

from __future__ import annotations

import re
from collections.abc import Awaitable
from contextlib import suppress
from typing import TypeVar
from urllib.parse import urlencode

from aiohttp import web

from llama_smart_proxy.backends.base import Feature
from llama_smart_proxy.proxy.api.llama_server import end_stream
from llama_smart_proxy.proxy.api.state import PROXY
from llama_smart_proxy.proxy.errors import BadRequest, Overloaded, ProxyError
from llama_smart_proxy.proxy.http.headers import CONVERSATION, PARAMS, RECORD
from llama_smart_proxy.proxy.http.running import cancel
from llama_smart_proxy.proxy.store.history import COLUMNS
from llama_smart_proxy.proxy.store.schema import Unavailable

T = TypeVar("T")

MOST = 1000
"""Recent requests in one answer."""
_DAY = re.compile(r"\d{4}-\d\d-\d\d")
_STATUS = re.compile(r"[1-5](xx|\d\d)")


async def cancel_request(http: web.BaseRequest) -> web.Response:
    """`DELETE /running/{id}`: cancels all requests with this id, and answers how many those are, when they have ended.

    Their clients get an error with the code `cancelled`: with the status 410, or at the end of a stream that has begun.
    Raises: BadRequest 404 if no request has this id.
    """
    proxy, request_id = http[PROXY], http[PARAMS]["id"]
    found = proxy.running.find(request_id)
    if not found:
        message = f"no request with the id {request_id[:100]!r} is being processed; GET /running lists them"
        raise BadRequest(message, status=404, code="not_found")
    for request in found.values():
        proxy.conversations.stop(_chat(request))
    await cancel(found)
    for request in found.values():
        await _end_resumable(http, request)
    return web.json_response({"id": request_id, "cancelled": len(found)})


async def _end_resumable(http: web.BaseRequest, request: web.BaseRequest) -> None:
    """End the stream of `request` on a server that would go on without its client."""
    chat = _chat(request)
    model = http[PROXY].router.known(request[RECORD].model) if chat else None
    if model is not None and Feature.RESUMABLE in model.features and model.state.value == "loaded":
        with suppress(ProxyError):  # its server has ended
            await end_stream(model, f"/v1/stream?{urlencode({'conv_id': chat})}")


def _chat(request: web.BaseRequest) -> str:
    """The id of its resumable stream at the model's server; empty if it has none."""
    chat = request.headers.get(CONVERSATION, "")
    return request[PROXY].own_chat(chat) if chat and PROXY in request else chat


async def usage(http: web.BaseRequest) -> web.Response:
    """`GET /admin/usage?by=key,model,day&since=&until=`: `usage` has the sums of requests, errors, tokens and seconds
    by `by` (of `key`, `model`, `day` and `api`; by default the first three), for the days from `since` to `until`.

    Days are the proxy's own, as YYYY-MM-DD. Raises: BadRequest; Overloaded if the store cannot be used now.
    """
    by = [name for name in http.query.get("by", "key,model,day").split(",") if name]
    if unknown := [name for name in by if name not in COLUMNS]:
        raise BadRequest(f"by={unknown[0][:50]}: usage is counted by {', '.join(COLUMNS)}", param="by")
    limits = [_query(http, name, _DAY, "a day such as 2026-01-31") for name in ("since", "until")]
    return web.json_response({"usage": await _stored(http[PROXY].history.usage(by, *limits))})


async def recent(http: web.BaseRequest) -> web.Response:
    """`GET /admin/requests?model=&key=&id=&status=&limit=`: `requests` has the most recent requests that generated or
    embedded, and have ended, newest first, with their timeline; `status` is one such as 404, or 4xx.

    `at` is in seconds since 1970, and the other times are seconds since then, null for what did not happen. `outcome`
    is `ok`, `client_left`, or the code of the error that the client got. Raises: as `usage`.
    """
    status = _query(http, "status", _STATUS, "a status such as 404 or 4xx")
    limit = int(_query(http, "limit", re.compile(r"\d{1,9}"), "a number") or 100)
    named = {name: http.query.get(name, "") for name in ("model", "key")}
    found = http[PROXY].history.requests(
        limit=min(limit, MOST), request_id=http.query.get("id", ""), status=status, **named
    )
    return web.json_response({"requests": await _stored(found)})


def _query(http: web.BaseRequest, name: str, form: re.Pattern[str], described: str) -> str:
    """A parameter of the query, empty if it is not given. Raises: BadRequest."""
    value = http.query.get(name, "")
    if value and not form.fullmatch(value):
        raise BadRequest(f"{name}={value[:50]}: is not {described}", param=name)
    return value


async def _stored(asking: Awaitable[T]) -> T:
    try:
        return await asking
    except Unavailable as exc:
        raise Overloaded(str(exc), code="store_unavailable", retry_after_s=5) from None
