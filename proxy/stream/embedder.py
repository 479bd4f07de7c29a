"""Vectors and relevance of texts for the knowledge base, by models of the proxy."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from llama_smart_proxy.backends.base import Feature, Model, Priority, UpstreamRequest
from llama_smart_proxy.backends.threads import run_in_thread
from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.config import Config
from llama_smart_proxy.proxy.dialects.embeddings import EmbeddingRequest
from llama_smart_proxy.proxy.errors import BadRequest, ModelNotFound, Overloaded, UpstreamFailed
from llama_smart_proxy.proxy.http.body import serialise
from llama_smart_proxy.proxy.models.router import Router
from llama_smart_proxy.proxy.stream.embeddings import PostJson, embed
from llama_smart_proxy.proxy.stream.rerank import rerank
from llama_smart_proxy.proxy.stream.upstream import JSON_HEADERS, fetch_json

if TYPE_CHECKING:
    from llama_smart_proxy.proxy.knowledge.base import Vectors

AT_ONCE = 8
"""Most texts in one request."""
KNOWN_S = 10.0
"""Seconds until it is looked again whether the model's file is another one."""


class PoolEmbedder:
    """A `Ranker` with the models of the configuration that is current; `latest` returns it with its router."""

    def __init__(self, latest: Callable[[], tuple[Config, Router]]) -> None:
        self._latest = latest
        self._known: tuple[Router, str, float, str] | None = None

    async def identity(self) -> str:
        """As `Embedder.identity`. Raises: as `embed`."""
        config, router = self._latest()
        name = config.knowledge.embedder
        now = time.monotonic()
        if self._known is None or self._known[:2] != (router, name) or now - self._known[2] > KNOWN_S:
            model = await self._model()
            self._known = router, name, now, await _identity_of(model)
        return self._known[3]

    async def embed(self, texts: Sequence[str], *, background: bool = False) -> Vectors:
        """As `Embedder.embed`."""
        np = await _numpy()
        model = await self._model()
        post = _post(model, Priority.BATCH if background else Priority.PERSON)
        found: list[list[float]] = []
        at_once = beside_a_question(await model.slots()) if background else AT_ONCE
        for at in range(0, len(texts), at_once):
            some = list(texts[at : at + at_once])
            vectors = (await embed(model, EmbeddingRequest(some), post)).vectors
            if len(vectors) != len(some):
                raise UpstreamFailed(f"{model.name} returned {len(vectors)} vectors for {len(some)} texts")
            found += vectors
        try:
            result = np.asarray(found, np.float32)
            lengths = np.linalg.norm(result, axis=1, keepdims=True)
        except ValueError as exc:
            raise UpstreamFailed(f"{model.name} returned vectors of different lengths") from exc
        if not np.isfinite(lengths).all():
            raise UpstreamFailed(f"{model.name} returned vectors that are not numbers")
        normal: Vectors = result / np.maximum(lengths, 1e-12)
        return normal

    async def _model(self) -> Model:
        """Raises: ModelNotFound, BadRequest."""
        config, router = self._latest()
        name = config.knowledge.embedding_model
        try:
            return (await router.resolve(config.knowledge.embedder, pull=name is not None)).model
        except ModelNotFound as exc:
            if name is not None:
                raise
            hint = f"add one called {config.knowledge.embedder}, or name one by the setting knowledge.embedding_model"
            raise ModelNotFound("there is no embedding model", hint=hint) from exc

    @property
    def reranks(self) -> bool:
        """Whether a reranking model is configured."""
        return self._latest()[0].knowledge.reranker is not None

    async def rerank(self, query: str, texts: Sequence[str]) -> list[float]:
        """The score of each text for `query` by the reranking model; a higher one is better, without bounds.

        Raises: BadRequest if none is configured; ProxyError of the model.
        """
        config, router = self._latest()
        if config.knowledge.reranker is None:
            raise BadRequest("no reranking model is configured (setting knowledge.reranker)", code="no_reranker")
        model = (await router.resolve(config.knowledge.reranker)).model
        return await rerank(model.name, query, texts, _post(model, Priority.PERSON))


async def _numpy() -> Any:
    """The module, which takes some 100 ms to be imported. Raises: Overloaded if it is missing."""
    try:
        return sys.modules.get("numpy") or await run_in_thread(partial(import_module, "numpy"))
    except ImportError as exc:
        reason = "the knowledge base requires the package numpy; pip install 'llama-smart-proxy[rag]'"
        raise Overloaded(reason, code="no_knowledge") from exc


def beside_a_question(slots: int | None) -> int:
    """How many texts a batch has: its server takes a slot for each of them, and one stays free if there are several."""
    return AT_ONCE if slots is None else max(1, min(AT_ONCE, slots - 1))


def _post(model: Model, priority: Priority) -> PostJson:
    async def post(path: str, body: Json) -> Json:
        prepared = model.prepare(body)
        request = UpstreamRequest(
            "POST", path, serialise(body), JSON_HEADERS, wait=True, priority=priority, prepared=prepared
        )
        return await fetch_json(model, request)

    return post


async def _identity_of(model: Model) -> str:
    """Of a file: its name, size and metadata, as it may be moved; else what its server reports as its digest."""
    info = await model.info()
    if not info.metadata and Feature.LOADING in model.features:
        await model.load()  # its file is made, or downloaded, at its first use
        info = await model.info()
    content = repr(sorted(info.metadata.items())) if info.metadata else info.digest
    mark = hashlib.sha256(content.encode(errors="replace")).hexdigest()[:12] if content else ""
    return f"{model.name} {info.size_bytes} {mark}"
