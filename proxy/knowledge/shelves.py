"""Keeps the index in step with the catalogue: it is filled when a collection is searched first, and follows all changes
from then on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from llama_smart_proxy.backends.threads import run_in_thread
from llama_smart_proxy.proxy.errors import Overloaded, ProxyError
from llama_smart_proxy.proxy.knowledge import catalogue, queue
from llama_smart_proxy.proxy.knowledge.base import Hit, Index, Row
from llama_smart_proxy.proxy.knowledge.catalogue import Change
from llama_smart_proxy.proxy.knowledge.database import Database
from llama_smart_proxy.proxy.knowledge.tables import Kept

if TYPE_CHECKING:
    from llama_smart_proxy.proxy.knowledge.base import Vector, Vectors

logger = logging.getLogger(__name__)

PAGE = 1000
"""Pieces that are read from the catalogue at a time."""


FILL_S = 60.0
"""Longest wait in seconds of a search for its collection to be read into the index."""


class _Shelf:
    """A collection in the index: with vectors of which model, and the catalogue's stamp up to which it has followed all
    changes; others may be `ahead`."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.identity = ""
        self.stamp = -1
        self.ahead: set[int] = set()
        self.is_settled = False

    def follow(self, stamp: int) -> None:
        """This change has been made."""
        self.ahead.add(stamp)
        while self.stamp + 1 in self.ahead:
            self.stamp += 1
        self.ahead = {later for later in self.ahead if later > self.stamp}


class Shelves:
    """The collections in the index that `make` makes when it is needed."""

    def __init__(self, make: Callable[[], Index], database: Database) -> None:
        self._make = make
        self._making = asyncio.Lock()
        self._index: Index | None = None
        self._database = database
        self._shelves: dict[str, _Shelf] = {}
        self._fills: dict[str, asyncio.Task[None]] = {}

    async def search(
        self, kept: Kept, identity: str, query: str, vector: Vector, limit: int, files: frozenset[str] | None
    ) -> list[Hit]:
        """The best pieces of a collection, first. Raises: as `Index.search`; Overloaded if the collection is still
        being read from the catalogue after `FILL_S`."""
        name = kept.collection.id
        if name not in self._fills:
            work = self._ready(kept, identity, len(vector))
            task = self._fills[name] = asyncio.get_running_loop().create_task(work, name="filling an index")
            task.add_done_callback(lambda _: self._fills.pop(name))
        task = self._fills[name]
        await asyncio.wait([task], timeout=FILL_S)
        if not task.done():
            raise Overloaded(f"the collection {kept.collection.name} is being read from the disk", retry_after_s=10)
        task.result()
        assert self._index is not None
        return await self._index.search(name, query, vector, limit, files)

    async def _ready(self, kept: Kept, identity: str, dimensions: int) -> None:
        async with self._making:
            if self._index is None:
                self._index = await run_in_thread(self._make)
            index = self._index
        name = kept.collection.id
        shelf = self._shelves.setdefault(name, _Shelf())
        async with shelf.lock:
            if shelf.identity != identity:
                await self._fill(index, name, shelf, identity, dimensions)
            elif not shelf.is_settled:
                await index.settle(name, _stamp(shelf))
            shelf.is_settled = True

    async def _fill(self, index: Index, name: str, shelf: _Shelf, identity: str, dimensions: int) -> None:
        stamp = await self._database.run(partial(catalogue.stamp, name=name))
        shelf.identity, shelf.stamp, shelf.ahead = "", stamp, set()
        if not await index.open(name, dimensions, f"{identity} {stamp}"):
            after = (0, -1)
            while rows := await self._page(name, identity, after):
                vectors = _vectors([row[3] for row in rows])
                await index.add(name, [Row(row[0], row[1], row[2], at) for row, at in zip(rows, vectors, strict=True)])
                after = rows[-1][4], rows[-1][5]
            await index.settle(name, f"{identity} {stamp}")
        shelf.identity = identity

    async def _page(self, name: str, identity: str, after: tuple[int, int]) -> list[tuple[Any, ...]]:
        work = partial(queue.page, collection=name, identity=identity, after=after, limit=PAGE)
        return await self._database.run(work)

    async def change(self, changes: Sequence[Change]) -> None:
        """Follow changes that the catalogue has. Where that fails, the next search fills the collection again."""
        for change in changes:
            shelf = self._shelves.get(change.collection)
            if shelf is None or self._index is None:
                continue  # it will be filled
            async with shelf.lock:
                if shelf.identity:
                    shelf.is_settled = False
                    identity, shelf.identity = shelf.identity, ""  # stays so if this fails or is cancelled
                    try:
                        await self._follow(self._index, change)
                        shelf.identity = identity
                    except ProxyError as exc:
                        logger.warning("the index does not follow: %s", exc.message)
                    except Exception as exc:  # of an index: the catalogue has the change all the same
                        logger.error("the index does not follow", exc_info=exc)
                    shelf.follow(change.stamp)

    async def _follow(self, index: Index, change: Change) -> None:
        if change.removed:
            await index.remove(change.collection, change.removed)
        after = -1
        while change.version:
            work = partial(queue.version_page, version=change.version, after=after, limit=PAGE)
            rows = await self._database.run(work)
            if not rows:
                return
            vectors = _vectors([row[2] for row in rows])
            found = [Row(row[0], change.file, row[1], vector) for row, vector in zip(rows, vectors, strict=True)]
            await index.add(change.collection, found)
            after = rows[-1][3]

    async def drop(self, collection: str) -> None:
        """Forget a collection."""
        self._shelves.pop(collection, None)
        if self._index is not None:
            await self._index.drop(collection)

    async def close(self) -> None:
        """End what is under way, and close the index."""
        for task in (tasks := list(self._fills.values())):
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if self._index is not None:
            await self._index.close()


def _stamp(shelf: _Shelf) -> str:
    return f"{shelf.identity} {shelf.stamp}"


def _vectors(data: Sequence[bytes]) -> Vectors:
    """Of texts as they are in the catalogue."""
    import numpy as np

    return np.frombuffer(b"".join(data), "<f2").astype(np.float32).reshape(len(data), -1)
