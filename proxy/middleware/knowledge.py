"""The knowledge base as an agent sees it in one request: what the request's client may search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from llama_smart_proxy.proxy.chat import Found
from llama_smart_proxy.proxy.errors import UpstreamFailed
from llama_smart_proxy.proxy.knowledge.library import Library
from llama_smart_proxy.proxy.middleware.scope import HookTimer


class KnowledgeView:
    """The implementation of `agents.base.Knowledge`. Waiting for it does not count towards the agent's time limit, as
    it waits for the embedding model."""

    def __init__(self, library: Library | None, timer: HookTimer) -> None:
        self._library = library
        self._timer = timer
        self._names: dict[str, str] = {}  # of collections, by id

    async def collections(self) -> list[str]:
        if self._library is None:
            return []
        with self._timer.awaiting_model():
            found = await self._library.collections()
        self._names = {collection.id: collection.name for collection in found}
        return list(dict.fromkeys(collection.name for collection in found if collection.counts.completed))

    async def search(self, query: str, collections: Sequence[str], *, limit: int = 10) -> Found:
        with self._timer.awaiting_model():
            found = await self._opened().search(query, collections, limit=limit)
        if any(passage.collection not in self._names for passage in found.passages):
            await self.collections()
        passages = [replace(one, collection=self._names.get(one.collection, one.collection)) for one in found.passages]
        return replace(found, passages=passages)

    async def grade(self, query: str, texts: Sequence[str]) -> list[float]:
        with self._timer.awaiting_model():
            return await self._opened().grade(query, texts)

    def _opened(self) -> Library:
        if self._library is None:
            raise UpstreamFailed("this proxy has no knowledge base", status=503, code="no_knowledge")
        return self._library
