"""The database of the knowledge base: a store of its own, whose failures are errors for clients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from llama_smart_proxy.proxy.errors import Overloaded
from llama_smart_proxy.proxy.knowledge.tables import SCHEMA
from llama_smart_proxy.proxy.store import Sql, Store, Unavailable

T = TypeVar("T")


class Database:
    """The Postgres at `url`, or else the file in `folder`. It is opened with the first call."""

    def __init__(self, folder: Path, url: str) -> None:
        self._store = Store(folder, url, SCHEMA)
        self.close = self._store.close

    async def run(self, work: Callable[[Sql], T]) -> T:
        """The result of `work`, which is one transaction. Raises: what `work` raises; Overloaded if the database cannot
        be used now."""
        try:
            return await self._store.run(work)
        except Unavailable as exc:
            raise Overloaded(f"the knowledge base cannot be used now: {exc}", code="knowledge_unavailable") from exc
