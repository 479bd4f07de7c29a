"""llama-server's endpoints whose request is not one JSON object for one model.

Source: llama.cpp tools/server/README.md, server.cpp, server-models.cpp (the router), server-stream.cpp and
server-tools.cpp, b11434.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import orjson
from aiohttp import web

from llama_smart_proxy.backends.base import Feature, Model, UpstreamRequest
from llama_smart_proxy.proxy import __version__
from llama_smart_proxy.proxy.api.chat import upstream_path
from llama_smart_proxy.proxy.api.metrics import own_metrics
from llama_smart_proxy.proxy.api.multipart import Form
from llama_smart_proxy.proxy.api.state import PROXY
from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.dialects import ANTHROPIC, NATIVE, OPENAI, RESPONSES, Dialect
from llama_smart_proxy.proxy.errors import AccessDenied, BadRequest, Overloaded, ProxyError
from llama_smart_proxy.proxy.http.aside import in_thread
from llama_smart_proxy.proxy.http.body import read_bytes, read_json, serialise
from llama_smart_proxy.proxy.http.headers import RECORD, upstream_headers, upstream_query
from llama_smart_proxy.proxy.http.response import ResponseWriter
from llama_smart_proxy.proxy.models.router import Route
from llama_smart_proxy.proxy.stream.relay import relay
from llama_smart_proxy.proxy.stream.upstream import JSON_HEADERS, Attempts

BUILD = f"b11434-llama-smart-proxy-{__version__}"
"""`build_info`: the build of llama.cpp whose API is implemented."""
ANSWER_LIMIT = 4 * 2**20
"""Largest answer to a request of the proxy's own, in bytes; the chat template is in `/props`."""
_CHAT = "conversation_id"
LARGEST_LIST = 2**20
"""Largest body of `POST /lora-adapters` in bytes."""

_ENDS = (OPENAI, NATIVE, ANTHROPIC, RESPONSES)
REPLAY = replace(OPENAI, is_end=lambda events: any(dialect.is_end(events) for dialect in _ENDS), ending=b"")
"""The rest of a stream of any API."""
TRANSCRIPT = replace(
    OPENAI, is_end=lambda events: OPENAI.is_end(events) or b'"transcript.text.done"' in events, ending=b""
)
"""A transcription in pieces: OpenAI's ends with its whole text, llama-server's with `[DONE]`."""
TOOL_STREAM = replace(OPENAI, is_end=lambda events: b'"done":true' in events or b'"jsonrpc"' in events, ending=b"")
"""The output of a tool, which ends with `{"done": true}`; each message of MCP is complete in itself."""


# -- models ------------------------------------------------------------------------------------------------------------


async def apply_autoload(http: web.BaseRequest, model: Model) -> None:
    """`?autoload=true|false` decides for this request whether a model that is not loaded gets loaded.

    Raises: BadRequest if it is not to be; AccessDenied if only operators load models; as `Model.load`.
    """
    choice = http.query.get("autoload", "")
    if not choice or Feature.LOADING not in model.features or model.state.value != "unloaded":
        return
    if choice not in ("true", "1"):
        raise BadRequest(f"model {model.name[:100]!r} is not loaded", code="model_not_loaded", param="model")
    if not http[PROXY].config.server_pool.autoload:
        grant = http[PROXY].grant
        if grant.client and not grant.is_admin:
            message = "loading a model requires the scope admin, as server_pool.autoload is false"
            raise AccessDenied(message, status=403)
        await model.load()


async def _resolved(http: web.BaseRequest, name: object, api: str = "native") -> Route:
    """The route to a model whose server has `api`. Raises: BadRequest 501 for another one; as `Router.resolve`."""
    route = await http[PROXY].router.resolve(http.query.get("model") if name in (None, "") else name, pull=False)
    model = route.model
    http[RECORD].routed(model.name, model.kind)
    if api not in model.speaks:
        message = f"model {model.name[:100]!r} is on a server that does not have this endpoint"
        raise BadRequest(message, status=501, code="not_supported")
    await apply_autoload(http, model)
    return route


async def _pass_on(
    http: web.BaseRequest,
    model: Model,
    data: bytes = b"",
    *,
    content_type: str = "application/json",
    dialect: Dialect = OPENAI,
    slot: bool = False,
    path: str | None = None,
) -> web.StreamResponse:
    """Answer with the answer of the model's server to the same request with the body `data`, at `path` if that is
    another."""
    headers = upstream_headers(http.headers, has_body=False, forwards=model.forwards)
    if data:
        headers.append(("Content-Type", content_type))
    request = UpstreamRequest(http.method, path or upstream_path(http, model.name), data, headers, slot)
    request.client, request.journal = http[PROXY].grant.client, http[RECORD]
    response = ResponseWriter(http, http[PROXY].config.server.send_stall_s)
    return await relay(response, model, request, dialect)


async def _answer_of(model: Model, method: str, path: str, body: Json | None = None) -> Any:
    """The JSON in the answer of the model's server to a small request; None if it is not 200. Raises: as `open`."""
    data, headers = (serialise(body), JSON_HEADERS) if body is not None else (b"", [])
    async for attempt in Attempts(model, UpstreamRequest(method, path, data, headers, slot=False)):
        async with attempt as upstream:
            answer = await upstream.read(ANSWER_LIMIT)
    with suppress(orjson.JSONDecodeError):
        return orjson.loads(answer or b"") if upstream.status == 200 else None
    return None


# -- properties and adapters -------------------------------------------------------------------------------------------


async def props(http: web.BaseRequest) -> web.StreamResponse:
    """`GET /props`: those of the model in `?model=`. Without a model those of a router, and of the only local model,
    if there is only one."""
    if http.query.get("model"):
        return await _pass_on(http, (await _resolved(http, None)).model)
    pool = http[PROXY].config.server_pool
    router = {"role": "router", "max_instances": pool.size, "models_autoload": pool.autoload}
    return web.json_response({**_NO_MODEL, **await _only_props(http), **router})


_NO_MODEL: Json = {
    "model_alias": "llama-server",
    "model_path": "none",
    "default_generation_settings": {"params": {}, "n_ctx": 0},
    "ui_settings": {},
    "build_info": BUILD,
    "cors_proxy_enabled": False,
}


async def _only_props(http: web.BaseRequest) -> Json:
    """The properties of the only local model; none if there are several, or if it cannot be asked."""
    with suppress(ProxyError):
        answer = await _answer_of((await _resolved(http, None)).model, "GET", "/props")
        return answer if isinstance(answer, dict) else {}
    return {}


async def metrics(http: web.BaseRequest) -> web.StreamResponse:
    """`GET /metrics`: for Prometheus, of the proxy, or of the server of the model in `?model=`. That one's header is
    documented in this spelling, which some readers require."""
    if not http.query.get("model"):
        return await own_metrics(http)
    model = (await _resolved(http, None)).model
    headers = upstream_headers(http.headers, has_body=False, forwards=model.forwards)
    request = UpstreamRequest("GET", upstream_path(http, model.name), b"", headers, slot=False)
    async for attempt in Attempts(model, request):
        async with attempt as upstream:
            body = await upstream.read(ANSWER_LIMIT)
    response = web.Response(status=upstream.status, body=body)
    for name in ("Content-Type", "Process-Start-Time-Unix"):
        if value := upstream.header(name.lower()):
            response.headers[name] = value
    return response


async def set_lora_adapters(http: web.BaseRequest) -> web.StreamResponse:
    """`POST /lora-adapters`: the scales of adapters as a list, which leaves `?model=` to name the model."""
    raw = await read_bytes(http, min(LARGEST_LIST, http[PROXY].max_body_bytes))
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as exc:
        raise BadRequest(f"the request body is not valid JSON: {exc}", code="invalid_json") from None
    route = await _resolved(http, value.get("model") if isinstance(value, dict) else None)
    return await _pass_on(http, route.model, serialise(value))


# -- transcriptions ----------------------------------------------------------------------------------------------------


async def transcribe(http: web.BaseRequest) -> web.StreamResponse:
    """`POST /v1/audio/transcriptions`: a form with a file, which is passed on with the server's name of the model."""
    raw = await read_bytes(http, http[PROXY].max_body_bytes)
    form = await in_thread(Form.of(http.headers.get("Content-Type", "")).parse, raw, urgent=False)
    del raw
    route = await _resolved(http, form.text("model"), api="openai")
    http[PROXY].chain.check_none_required(http.headers, route.name)
    http[RECORD].slot = True
    named: Json = {"model": route.model.name}
    route.model.prepare(named)  # it may have another name on its server
    data = form.with_text("model", str(named["model"]))
    del form
    content_type = http.headers["Content-Type"]
    return await _pass_on(http, route.model, data, content_type=content_type, dialect=TRANSCRIPT, slot=True)


# -- resumable streams -------------------------------------------------------------------------------------------------


async def resume_stream(http: web.BaseRequest) -> web.StreamResponse:
    """`GET /v1/stream?conv_id=&from=`: the stream of a chat from that byte on, also one that is not complete yet."""
    chat = _conversation(http)
    models = await _resumable(http)
    if http[PROXY].conversations.waits(chat):
        raise Overloaded("Stream owner model is loading, retry later", code="model_loading")
    if not models:
        raise BadRequest("Stream not found or expired", status=404, code="not_found")
    owner = models[0]
    if len(models) > 1:
        found = [model for model in models if any(item[_CHAT] == chat for item in await _find(model, chat))]
        owner = found[0] if found else owner
    http[RECORD].routed(owner.name, owner.kind)
    return await _pass_on(http, owner, dialect=REPLAY, path=_stream_path(http, owner, chat))


async def stop_stream(http: web.BaseRequest) -> web.StreamResponse:
    """`DELETE /v1/stream?conv_id=`: ends the stream of a chat; 204 also if there is none."""
    chat = _conversation(http)
    http[PROXY].conversations.stop(chat)
    for model in await _resumable(http):
        await end_stream(model, _stream_path(http, model, chat))
    return web.Response(status=204)


async def end_stream(model: Model, path: str) -> None:
    """End the stream that `path` names on the model's server. Raises: as `Model.open`."""
    async for attempt in Attempts(model, UpstreamRequest("DELETE", path, slot=False)):
        async with attempt as upstream:
            await upstream.read(ANSWER_LIMIT)


async def find_streams(http: web.BaseRequest) -> web.StreamResponse:
    """`POST /v1/streams/lookup`: the streams of the chats in `conversation_ids`."""
    body = await read_json(http, http[PROXY].max_body_bytes)
    ids = body.get("conversation_ids")
    proxy = http[PROXY]
    named = [proxy.own_chat(name) for name in ids if isinstance(name, str) and name] if isinstance(ids, list) else []
    found = [item for model in await _resumable(http) for item in await _find(model, *named)] if named else []
    prefix = proxy.own_chat("")
    return web.json_response([{**item, _CHAT: str(item.get(_CHAT)).removeprefix(prefix)} for item in found])


def _conversation(http: web.BaseRequest) -> str:
    """The id of the client's stream at the model's server."""
    chat = http.query.get("conv_id", "")
    if not chat:
        raise BadRequest("Missing conversation id in path", param="conv_id")
    return http[PROXY].own_chat(chat)


def _stream_path(http: web.BaseRequest, model: Model, chat: str) -> str:
    """The path and the query of the request for the stream `chat` of the model's server."""
    if http.query["conv_id"] == chat:
        return upstream_path(http, model.name)
    query = http.rel_url.update_query({"conv_id": chat} | ({"model": model.name} if "model" in http.query else {}))
    return f"{http.path.rstrip('/')}?{upstream_query(query.raw_query_string)}"


async def _resumable(http: web.BaseRequest) -> Sequence[Model]:
    """The loaded models with resumable streams: the one in `?model=`, or all. None gets loaded, as streams do not
    outlive their server.

    Raises: BadRequest 404 if the named one, or every one, is configured without.
    """
    router = http[PROXY].router
    named = http.query.get("model")
    models = [(await router.resolve(named, pull=False)).model] if named else router.models()
    able = [model for model in models if Feature.RESUMABLE in model.features]
    if not able:
        message = "no such stream: they are kept only for models with resumable_streams: true"
        raise BadRequest(message, status=404, code="not_found")
    return [model for model in able if model.state.value == "loaded"]


async def _find(model: Model, *chats: str) -> list[Json]:
    answer = await _answer_of(model, "POST", "/v1/streams/lookup", {"conversation_ids": chats})
    return [item for item in answer if isinstance(item, dict)] if isinstance(answer, list) else []


# -- tools -------------------------------------------------------------------------------------------------------------


async def use_tools(http: web.BaseRequest) -> web.StreamResponse:
    """`/tools` and `/mcp`: for models whose own `args` switch them on. Without a model, those of the first such model.

    Raises: BadRequest 403.
    """
    body = await read_json(http, http[PROXY].max_body_bytes) if http.method == "POST" else {}
    able = [model.name for model in http[PROXY].router.models() if Feature.TOOLS in model.features]
    name = body.get("model") or http.query.get("model") or next(iter(able), None)
    if name is None or (model := (await _resolved(http, name)).model).name not in able:
        message = "this feature is disabled: --tools in the args of a model enables it"
        raise BadRequest(message, status=403, code="feature_disabled")
    return await _pass_on(http, model, serialise(body) if body else b"", dialect=TOOL_STREAM)
