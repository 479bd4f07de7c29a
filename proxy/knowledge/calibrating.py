"""Measures collections, so that what a search finds in one can be compared with what it finds in others.

A collection is measured after a search, in the background, when it has none, or twice or half the pieces of the last
time. Until then the values of another one with the same model count, or else the defaults.
"""

from __future__ import annotations

import asyncio
import logging
import random
from functools import partial
from typing import TYPE_CHECKING

from llama_smart_proxy.proxy.errors import ProxyError
from llama_smart_proxy.proxy.knowledge import catalogue
from llama_smart_proxy.proxy.knowledge.base import Embedder
from llama_smart_proxy.proxy.knowledge.database import Database
from llama_smart_proxy.proxy.knowledge.tables import Kept
from llama_smart_proxy.proxy.store import Sql

if TYPE_CHECKING:
    from llama_smart_proxy.proxy.knowledge.relevance import Calibration
    from llama_smart_proxy.proxy.knowledge.shelves import Shelves

logger = logging.getLogger(__name__)

LEAST = 20
"""Pieces of a collection that is measured."""


class Calibrations:
    """Those of all collections, with the vectors of `embedder`."""

    def __init__(self, database: Database, shelves: Shelves, embedder: Embedder) -> None:
        self._database = database
        self._shelves = shelves
        self._embedder = embedder
        self._known: dict[int, tuple[str, int, Calibration]] | None = None
        self._stamps: dict[int, int] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}

    async def of(self, kept: Kept, identity: str) -> Calibration:
        """The calibration of a collection."""
        known = await self._loaded()
        if self._stamps.get(kept.serial) != kept.stamp and kept.serial not in self._tasks:
            self._stamps[kept.serial] = kept.stamp
            task = asyncio.get_running_loop().create_task(self._measure(kept, identity), name="measuring a collection")
            self._tasks[kept.serial] = task
            task.add_done_callback(lambda _: self._tasks.pop(kept.serial))
        found = known.get(kept.serial)
        return found[2] if found is not None and found[0] == identity else self.any(identity)

    def any(self, identity: str) -> Calibration:
        """One of a collection with vectors of this model, or else the default."""
        from llama_smart_proxy.proxy.knowledge.relevance import Calibration

        return next((found for its, _, found in (self._known or {}).values() if its == identity), Calibration())

    async def _loaded(self) -> dict[int, tuple[str, int, Calibration]]:
        from llama_smart_proxy.proxy.knowledge.relevance import Calibration

        if self._known is None:
            rows = await self._database.run(catalogue.calibrations)
            self._known = {serial: (identity, size, Calibration(*two)) for serial, identity, size, *two in rows}
        return self._known

    async def _measure(self, kept: Kept, identity: str) -> None:
        from llama_smart_proxy.proxy.knowledge.relevance import SAMPLED, Sample

        def sampled(sql: Sql) -> tuple[int, list[Sample]]:
            rows = catalogue.samples(sql, kept.serial, SAMPLED, random.Random(kept.stamp))
            return catalogue.count_pieces(sql, kept.serial), [Sample(*row) for row in rows]

        try:
            pieces, samples = await self._database.run(sampled)
            its, before, _ = (await self._loaded()).get(kept.serial, ("", 0, None))
            if pieces < LEAST or (its == identity and before < 2 * pieces and pieces < 2 * before):
                return
            found = await self._shelves.measured(kept, self._embedder, samples)
        except ProxyError as exc:
            logger.info("the collection %s is measured later: %s", kept.collection.name, exc.message)
            self._stamps.pop(kept.serial, None)
            return
        (await self._loaded())[kept.serial] = identity, pieces, found
        values = identity, pieces, found.off, found.near
        await self._database.run(partial(catalogue.set_calibration, serial=kept.serial, values=values))

    async def close(self) -> None:
        """End what is under way."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
