"""What the proxy is doing for its clients: the requests that are being processed, and the end of one of them."""

from __future__ import annotations

from contextlib import suppress
from urllib.parse import urlencode

from aiohttp import web

from llama_smart_proxy.backends.base import Feature
from llama_smart_proxy.proxy.api.llama_server import end_stream
from llama_smart_proxy.proxy.api.state import PROXY
from llama_smart_proxy.proxy.errors import BadRequest, ProxyError
from llama_smart_proxy.proxy.http.headers import CONVERSATION, PARAMS, RECORD
from llama_smart_proxy.proxy.http.running import cancel


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
