"""The calibrations of collections: kept in the database, and measured in the background when a collection is searched
that has none, or has changed much since."""

from __future__ import annotations

import asyncio
import logging
import random
from functools import partial
from typing import NamedTuple

from llama_smart_proxy.proxy.errors import ProxyError
from llama_smart_proxy.proxy.knowledge.base import Embedder
from llama_smart_proxy.proxy.knowledge.database import Database
from llama_smart_proxy.proxy.knowledge.relevance import SAMPLED, Calibration, Sample, Searched, measured
from llama_smart_proxy.proxy.knowledge.tables import Kept
from llama_smart_proxy.proxy.store import Sql

logger = logging.getLogger(__name__)

LEAST = 30
"""Pieces below which a collection is not measured: there are too few other ones for a question."""


class _Known(NamedTuple):
    identity: str
    pieces: int
    calibration: Calibration


class Calibrations:
    """Those of all collections."""

    def __init__(self, database: Database, embedder: Embedder) -> None:
        self._database = database
        self._embedder = embedder
        self._known: dict[str, _Known] = {}
        self._looked: set[str] = set()
        self._last = Calibration()
        self._measuring: asyncio.Task[None] | None = None

    async def of(self, kept: Kept, identity: str, index: Searched) -> Calibration:
        """That of a collection with vectors of this model; the one used last until it is measured."""
        if kept.collection.id not in self._looked:
            self._looked.add(kept.collection.id)
            self._known |= await self._database.run(partial(_load, collection=kept.collection.id))
        known = self._known.get(kept.collection.id)
        pieces = await self._database.run(partial(_count, collection=kept.serial))
        usable = known is not None and known.identity == identity
        if pieces >= LEAST and (not usable or known is None or not pieces / 2 < known.pieces < pieces * 2):
            self._begin(kept, identity, pieces, index)
        if known is not None and usable:
            self._last = known.calibration
        return self._last

    @property
    def last(self) -> Calibration:
        """The one used last: of the same embedding model."""
        return self._last

    async def close(self) -> None:
        """End a measurement."""
        if self._measuring is not None:
            self._measuring.cancel()
            await asyncio.wait([self._measuring])

    def _begin(self, kept: Kept, identity: str, pieces: int, index: Searched) -> None:
        if self._measuring is None or self._measuring.done():  # one after the other
            work = self._measure(kept, identity, pieces, index)
            self._measuring = asyncio.get_running_loop().create_task(work, name="calibrating a collection")

    async def _measure(self, kept: Kept, identity: str, pieces: int, index: Searched) -> None:
        try:
            samples = await self._database.run(partial(_samples, collection=kept.serial))
            known = _Known(identity, pieces, await measured(index, kept.collection.id, self._embedder, samples))
            await self._database.run(partial(_save, collection=kept.collection.id, known=known))
        except ProxyError as exc:
            logger.warning("the collection %s could not be calibrated: %s", kept.collection.name, exc)
        else:
            self._known[kept.collection.id] = known


def _load(sql: Sql, collection: str) -> dict[str, _Known]:
    query = "SELECT identity, pieces, off, near FROM calibrations WHERE collection = ?"
    known = {}
    for identity, pieces, off, near in sql.execute(query, (collection,)):
        known[collection] = _Known(identity, pieces, Calibration(off, near))
    return known


def _save(sql: Sql, collection: str, known: _Known) -> None:
    sql.execute("DELETE FROM calibrations WHERE collection = ?", (collection,))
    values = (collection, known.identity, known.pieces, known.calibration.off, known.calibration.near)
    sql.execute("INSERT INTO calibrations VALUES (?, ?, ?, ?, ?)", values)


def _count(sql: Sql, collection: int) -> int:
    query = "SELECT COALESCE(SUM(pieces), 0) FROM members WHERE collection = ? AND version > 0"
    return int(sql.execute(query, (collection,))[0][0])


def _samples(sql: Sql, collection: int) -> list[Sample]:
    """Pieces of a collection, each with the same chance."""
    query = "SELECT version, pieces FROM members WHERE collection = ? AND version > 0 AND pieces > 0"
    versions = sql.execute(query, (collection,))
    found = {}
    query = "SELECT id, heading, text FROM chunks WHERE version = ? AND number = ?"
    for version, pieces in random.choices(versions, [pieces for _, pieces in versions], k=SAMPLED) if versions else ():
        for row in sql.execute(query, (version, random.randrange(pieces))):
            found[row[0]] = Sample._make(row)
    return list(found.values())
