"""The routes that are not answered by a model; those are the registry's endpoints."""

from __future__ import annotations

from typing import NamedTuple

from llama_smart_proxy.proxy.api import (
    admin,
    control,
    files,
    llama_server,
    requests,
    router_mode,
    sources,
    vector_store_files,
    vector_stores,
)
from llama_smart_proxy.proxy.api import ollama as ollama_api
from llama_smart_proxy.proxy.api.dispatcher import Handler
from llama_smart_proxy.proxy.api.events import events
from llama_smart_proxy.proxy.api.models import list_models, show_model
from llama_smart_proxy.proxy.api.upstream import METHODS, upstream
from llama_smart_proxy.proxy.api.why import why
from llama_smart_proxy.proxy.http.origins import Pages
from llama_smart_proxy.proxy.http.scopes import Scope

PUBLIC, INFERENCE, ADMIN = Scope.PUBLIC, Scope.INFERENCE, Scope.ADMIN
_STORE = "/v1/vector_stores/{id}"
_FILE, _BATCH = f"{_STORE}/files/{{file}}", f"{_STORE}/file_batches/{{batch}}"
_BLOB = "/api/blobs/{digest:sha256:[0-9a-f]{64}}"


class Route(NamedTuple):
    """A handler at a path, the scope that it requires, and the web pages that may use it. `loads`: it can load a model,
    although it only reads."""

    method: str
    path: str
    handler: Handler
    scope: Scope
    pages: Pages = Pages.ALLOWED
    loads: bool = False


ROUTES = [
    Route("GET", "/health", admin.health, PUBLIC, Pages.ALL),
    Route("GET", "/v1/health", admin.health, PUBLIC, Pages.ALL),
    Route("POST", "/admin/reload", admin.reload_configuration, ADMIN),
    Route("GET", "/plugins", admin.plugins_listed, INFERENCE, Pages.ALL),
    Route("GET", "/v1/models", list_models, INFERENCE, Pages.ALL),
    Route("GET", "/v1/models/{id:.+}", show_model, INFERENCE, Pages.ALL),
    # what operators look at and change
    Route("GET", "/running", control.running, INFERENCE),
    Route("GET", "/events", events, ADMIN),
    Route("POST", "/admin/models/{name:.+}/load", control.load_model, ADMIN),
    Route("POST", "/admin/models/{name:.+}/unload", control.unload_model, ADMIN),
    Route("GET", "/admin/why/{id:.+}", why, ADMIN),
    Route("GET", "/logs/{name:.+}", control.logs, ADMIN),
    *(Route(method, "/upstream/{path:.+}", upstream, ADMIN, Pages.LOCAL) for method in METHODS),
    Route("DELETE", "/running/{id:.+}", requests.cancel_request, ADMIN),
    Route("GET", "/admin/usage", requests.usage, ADMIN),
    Route("GET", "/admin/requests", requests.recent, ADMIN),
    # Ollama's API, except for generation and embeddings
    Route("GET", "/", ollama_api.root, PUBLIC, Pages.ALL),
    Route("GET", "/api/version", ollama_api.version, INFERENCE, Pages.ALL),
    Route("GET", "/api/tags", ollama_api.tags, INFERENCE, Pages.ALL),
    Route("GET", "/api/ps", ollama_api.ps, INFERENCE, Pages.ALL),
    Route("GET", "/api/status", ollama_api.status, INFERENCE, Pages.ALL),
    Route("POST", "/api/me", ollama_api.me, ADMIN),
    Route("POST", "/api/show", ollama_api.show, INFERENCE),
    Route("POST", "/api/pull", ollama_api.pull, ADMIN),
    Route("DELETE", "/api/delete", ollama_api.delete, ADMIN),
    Route("POST", "/api/copy", ollama_api.change, ADMIN),
    Route("POST", "/api/push", ollama_api.change, ADMIN),
    Route("POST", "/api/create", ollama_api.change, ADMIN),
    Route("POST", _BLOB, ollama_api.blob, ADMIN),
    Route("HEAD", _BLOB, ollama_api.blob, ADMIN),
    # llama-server's router mode
    Route("GET", "/models", list_models, INFERENCE, Pages.ALL),
    Route("POST", "/models", router_mode.download_model, ADMIN),
    Route("DELETE", "/models", router_mode.delete_model, ADMIN),
    Route("GET", "/models/sse", router_mode.model_events, INFERENCE),
    Route("POST", "/models/load", router_mode.load_model, ADMIN),
    Route("POST", "/models/unload", router_mode.unload_model, ADMIN),
    # llama-server's other endpoints that are not simply relayed
    Route("GET", "/props", llama_server.props, INFERENCE, loads=True),
    Route("GET", "/metrics", llama_server.metrics, ADMIN),
    Route("POST", "/lora-adapters", llama_server.set_lora_adapters, ADMIN),
    Route("POST", "/v1/audio/transcriptions", llama_server.transcribe, INFERENCE),
    Route("POST", "/audio/transcriptions", llama_server.transcribe, INFERENCE),
    Route("GET", "/v1/stream", llama_server.resume_stream, INFERENCE),
    Route("DELETE", "/v1/stream", llama_server.stop_stream, INFERENCE),
    Route("POST", "/v1/streams/lookup", llama_server.find_streams, INFERENCE),
    *(
        Route(method, path, llama_server.use_tools, ADMIN, Pages.LOCAL)
        for path in ("/tools", "/mcp")
        for method in ("GET", "POST")
    ),
    Route("DELETE", "/mcp", llama_server.use_tools, ADMIN, Pages.LOCAL),
    # the knowledge base: what a client may see and change there, `Library` decides
    Route("POST", "/v1/files", files.create, INFERENCE),
    Route("GET", "/v1/files", files.list_files, INFERENCE),
    Route("GET", "/v1/files/{id}", files.show, INFERENCE),
    Route("DELETE", "/v1/files/{id}", files.delete, INFERENCE),
    Route("GET", "/v1/files/{id}/content", files.content, INFERENCE),
    Route("POST", "/v1/vector_stores", vector_stores.create, INFERENCE),
    Route("GET", "/v1/vector_stores", vector_stores.list_stores, INFERENCE),
    Route("GET", _STORE, vector_stores.show, INFERENCE),
    Route("POST", _STORE, vector_stores.update, INFERENCE),
    Route("DELETE", _STORE, vector_stores.delete, INFERENCE),
    Route("POST", f"{_STORE}/search", vector_stores.search, INFERENCE),
    Route("POST", f"{_STORE}/files", vector_store_files.create, INFERENCE),
    Route("GET", f"{_STORE}/files", vector_store_files.list_files, INFERENCE),
    Route("GET", _FILE, vector_store_files.show, INFERENCE),
    Route("POST", _FILE, vector_store_files.update, INFERENCE),
    Route("DELETE", _FILE, vector_store_files.delete, INFERENCE),
    Route("GET", f"{_FILE}/content", vector_store_files.content, INFERENCE),
    Route("POST", f"{_STORE}/file_batches", vector_store_files.create_batch, INFERENCE),
    Route("GET", _BATCH, vector_store_files.show_batch, INFERENCE),
    Route("POST", f"{_BATCH}/cancel", vector_store_files.cancel_batch, INFERENCE),
    Route("GET", f"{_BATCH}/files", vector_store_files.list_batch, INFERENCE),
    Route("GET", "/knowledge/{collection:.+}", sources.list_sources, INFERENCE),
    Route("PUT", "/knowledge/{collection:.+}", sources.put_source, INFERENCE),
]
