"""The index in a Postgres with the extension pgvector, by asyncpg: vectors under HNSW, texts as tsvector.

Each collection is a table of its own in the schema `llama_smart_proxy_index`, as one with an index has vectors of one
length. The texts themselves are not stored. Postgres has no BM25: the lexical score is its `ts_rank`.
Source: https://github.com/pgvector/pgvector (types, operators, limits), Postgres documentation, chapter 12.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import numpy as np

from llama_smart_proxy.proxy.errors import UpstreamFailed
from llama_smart_proxy.proxy.knowledge.base import Hit, Row
from llama_smart_proxy.proxy.knowledge.index.fusion import hits

if TYPE_CHECKING:
    import asyncpg

    from llama_smart_proxy.proxy.knowledge.base import Vector

T = TypeVar("T")

CONNECT_S, COMMAND_S, FILL_S = 5.0, 10.0, 120.0
"""Time limits in seconds: for a connection, for a search, and for a statement that changes something."""
CONNECTIONS = 8
BATCH = 200
"""Pieces in one transaction."""
DEPTH = 100
"""How many pieces of each of the two searches are compared, at least."""
MAX_INDEXED = 2000
"""Longest vector that HNSW takes; longer ones are compared one by one. Source: pgvector, "HNSW"."""
OLDEST = (0, 8)
"""The first pgvector with iterative scans."""
LOCK = 0x6C6C616D62
"""The advisory lock under which tables are made: several proxies may begin at the same time."""
SCHEMA = "llama_smart_proxy_index"
_MADE = f"""
SELECT pg_advisory_xact_lock({LOCK});
CREATE EXTENSION IF NOT EXISTS vector;
CREATE SCHEMA IF NOT EXISTS {SCHEMA};
CREATE TABLE IF NOT EXISTS {SCHEMA}.collections (id TEXT PRIMARY KEY, dimensions INTEGER NOT NULL, stamp TEXT)
"""
_TABLE = """
CREATE TABLE {table} (piece BIGINT PRIMARY KEY, file TEXT NOT NULL, vector vector({dimensions}), words TSVECTOR);
CREATE INDEX ON {table} (file);
CREATE INDEX ON {table} USING gin (words)
"""
_SEARCH = """
WITH asked AS (SELECT replace(plainto_tsquery('english', $2)::text, '&', '|')::tsquery AS words),
  {some}
  near AS (SELECT piece FROM {source} ORDER BY vector <=> $1 LIMIT $3),
  said AS (SELECT source.piece FROM {source} AS source, asked WHERE source.words @@ asked.words
           ORDER BY ts_rank(source.words, asked.words, 1) DESC LIMIT $3)
SELECT piece, 1 - (vector <=> $1), ts_rank({table}.words, asked.words, 1) FROM {table}, asked
WHERE piece IN (SELECT piece FROM near UNION SELECT piece FROM said)
"""


class _Dropped(UpstreamFailed):
    """The table is missing."""


class PostgresIndex:
    """An `Index` at `url`. It connects with the first use, and again after each failure."""

    def __init__(self, url: str) -> None:
        self._url = url
        parts = urlsplit(url)
        self._place = f"{parts.hostname or 'localhost'}{parts.path}"
        self._pool: asyncpg.Pool | None = None
        self._prepared = False

    async def open(self, collection: str, dimensions: int, stamp: str) -> bool:
        """As `Index.open`."""

        async def work(sql: asyncpg.Connection) -> bool:
            query = f"SELECT dimensions, stamp FROM {SCHEMA}.collections WHERE id = $1"
            known = await sql.fetchrow(query, collection)
            if known is not None and (known["dimensions"], known["stamp"]) == (dimensions, stamp):
                return True
            table = _table(collection)
            await sql.execute(f"DROP TABLE IF EXISTS {table}; {_TABLE.format(table=table, dimensions=dimensions)}")
            if dimensions <= MAX_INDEXED:
                await sql.execute(f"CREATE INDEX ON {table} USING hnsw (vector vector_cosine_ops)")
            await sql.execute(
                f"INSERT INTO {SCHEMA}.collections VALUES ($1, $2, NULL) "
                "ON CONFLICT (id) DO UPDATE SET dimensions = $2, stamp = NULL",
                collection,
                dimensions,
            )
            return False

        return await self._do(work)

    async def add(self, collection: str, rows: Sequence[Row]) -> None:
        """As `Index.add`."""
        query = (
            f"INSERT INTO {_table(collection)} VALUES ($1, $2, $3, to_tsvector('english', $4)) ON CONFLICT (piece) "
            "DO UPDATE SET file = EXCLUDED.file, vector = EXCLUDED.vector, words = EXCLUDED.words"
        )
        for at in range(0, len(rows), BATCH):
            values = [(row.piece, row.file, row.vector, _text(row.text)) for row in rows[at : at + BATCH]]

            async def work(sql: asyncpg.Connection, values: list[tuple[Any, ...]] = values) -> None:
                await _unsettle(sql, collection)
                await sql.executemany(query, values, timeout=FILL_S)

            with suppress(_Dropped):
                await self._do(work)

    async def remove(self, collection: str, pieces: Sequence[int]) -> None:
        """As `Index.remove`."""

        async def work(sql: asyncpg.Connection) -> None:
            await _unsettle(sql, collection)
            await sql.execute(f"DELETE FROM {_table(collection)} WHERE piece = ANY($1)", list(pieces), timeout=FILL_S)

        with suppress(_Dropped):
            await self._do(work)

    async def settle(self, collection: str, stamp: str) -> None:
        """As `Index.settle`."""

        async def work(sql: asyncpg.Connection) -> None:
            await sql.execute(f"UPDATE {SCHEMA}.collections SET stamp = $2 WHERE id = $1", collection, stamp)

        await self._do(work)

    async def drop(self, collection: str) -> None:
        """As `Index.drop`."""

        async def work(sql: asyncpg.Connection) -> None:
            await sql.execute(f"DROP TABLE IF EXISTS {_table(collection)}")
            await sql.execute(f"DELETE FROM {SCHEMA}.collections WHERE id = $1", collection)

        await self._do(work)

    async def search(
        self, collection: str, query: str, vector: Vector, limit: int, files: frozenset[str] | None = None
    ) -> list[Hit]:
        """As `Index.search`. Of some files all vectors are compared: HNSW would look for the files among the nearest
        of all."""
        table, depth = _table(collection), max(DEPTH, 2 * limit)
        some = "" if files is None else f"chosen AS MATERIALIZED (SELECT * FROM {table} WHERE file = ANY($4)),"
        statement = _SEARCH.format(table=table, some=some, source=table if files is None else "chosen")
        values = [vector, _text(query), depth, *([] if files is None else [list(files)])]

        async def work(sql: asyncpg.Connection) -> list[Any]:
            if await sql.fetchval("SELECT to_regclass($1)", table) is None:
                return []
            # iterative: the nearest in the index may have been removed, and not been vacuumed yet
            settings = f"SET LOCAL hnsw.ef_search = {min(depth, 1000)}; SET LOCAL hnsw.iterative_scan = strict_order"
            await sql.execute(settings)
            return await sql.fetch(statement, *values)  # type: ignore[no-any-return]

        return hits([tuple(row) for row in await self._do(work)], limit)

    async def close(self) -> None:
        """As `Index.close`."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.terminate()

    async def _do(self, work: Callable[[asyncpg.Connection], Awaitable[T]]) -> T:
        """The result of `work` in one transaction; on a new connection if it was cut, as by a restart of the server:
        nothing is done twice by being done again. Raises: UpstreamFailed."""
        import asyncpg

        try:
            try:
                return await self._transaction(work)
            except (asyncpg.PostgresConnectionError, asyncpg.InterfaceError, ConnectionError):
                return await self._transaction(work)
        except asyncpg.UndefinedTableError as exc:
            raise _Dropped("The collection is not in the index any more.") from exc
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as exc:
            raise self._failed(exc) from exc

    async def _transaction(self, work: Callable[[asyncpg.Connection], Awaitable[T]]) -> T:
        pool = await self._opened()
        async with pool.acquire(timeout=CONNECT_S) as sql, sql.transaction():
            return await work(sql)

    async def _opened(self) -> asyncpg.Pool:
        import asyncpg

        if not self._prepared:
            connection = await asyncpg.connect(self._url, timeout=CONNECT_S, command_timeout=COMMAND_S)
            try:
                async with connection.transaction():
                    await connection.execute(_MADE)
                version = await connection.fetchval("SELECT extversion FROM pg_extension WHERE extname = 'vector'")
                if tuple(map(int, version.split(".")[:2])) < OLDEST:
                    raise OSError(f"pgvector {version} is too old; needs {'.'.join(map(str, OLDEST))}")
            finally:
                with suppress(Exception):
                    await connection.close(timeout=1.0)
            self._prepared = True
        if self._pool is None:
            self._pool = asyncpg.create_pool(
                self._url, min_size=0, max_size=CONNECTIONS, timeout=CONNECT_S, command_timeout=COMMAND_S, init=_codec
            )
            await self._pool
        return self._pool

    def _failed(self, exc: BaseException) -> UpstreamFailed:
        reason = " ".join(str(exc).split()).replace(self._url, self._place) or type(exc).__name__
        late = isinstance(exc, TimeoutError)
        return UpstreamFailed(
            f"The index of the knowledge base, in the Postgres at {self._place}, "
            f"{'does not answer in time' if late else f'cannot be used now: {reason}'} (setting knowledge.index).",
            status=504 if late else 502,
            code="index_unavailable",
        )


async def _codec(connection: asyncpg.Connection) -> None:
    """Source: pgvector src/vector.c, `vector_send`: dimensions and a zero as int16, then float32, all big-endian."""

    def encoded(vector: Vector) -> bytes:
        return np.array([len(vector), 0], ">i2").tobytes() + np.asarray(vector, ">f4").tobytes()

    await connection.set_type_codec("vector", schema="public", encoder=encoded, decoder=bytes, format="binary")


async def _unsettle(sql: asyncpg.Connection, collection: str) -> None:
    """What is in it now is of no state of the catalogue."""
    query = f"UPDATE {SCHEMA}.collections SET stamp = NULL WHERE id = $1 AND stamp IS NOT NULL"
    await sql.execute(query, collection)


def _table(collection: str) -> str:
    return f"{SCHEMA}.pieces_{hashlib.sha256(collection.encode()).hexdigest()[:24]}"


def _text(text: str) -> str:
    """Postgres takes neither a zero nor half a character."""
    return text.replace("\0", " ").encode(errors="replace").decode()
