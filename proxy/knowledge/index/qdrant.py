"""The index in a Qdrant server, over its REST API: vectors under HNSW, texts as sparse vectors.

A piece is a point with the vectors `dense` and `words`, and its file as payload. The sparse vector has BM25's weight of
each term, to which Qdrant adds the rarity of the term in the collection (`modifier: idf`). A point without vectors,
`MARKER`, has the state of the catalogue that the collection was filled from.
Source: Qdrant's OpenAPI document (docs/redoc/master/openapi.json) of 1.19.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import aiohttp
import orjson

from llama_smart_proxy.proxy.errors import UpstreamFailed
from llama_smart_proxy.proxy.knowledge.base import Hit, Row
from llama_smart_proxy.proxy.knowledge.index.fusion import hits
from llama_smart_proxy.proxy.knowledge.index.postings import K1, B
from llama_smart_proxy.proxy.knowledge.index.words import question_terms, terms

if TYPE_CHECKING:
    from llama_smart_proxy.proxy.knowledge.base import Vector

CONNECT_S, COMMAND_S, FILL_S = 5.0, 10.0, 120.0
"""Time limits in seconds: for a connection, for a search, and for a request that changes something."""
BATCH = 100
"""Pieces in one request."""
DEPTH = 100
"""How many pieces of each of the two searches are compared, at least."""
MEAN_LENGTH = 110
"""Words of a usual piece: how long the others are is not known here."""
MARKER = 2**63 - 1
"""A number that no piece has."""
Json = dict[str, Any]


class QdrantIndex:
    """An `Index` at `url`: `qdrant://KEY@host:6333`, or `qdrants://` with TLS; the API key is optional."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        secure = parts.scheme == "qdrants"
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or "localhost"
        self._place = f"{host}:{parts.port or 6333}"
        self._base = f"{'https' if secure else 'http'}://{self._place}{parts.path.rstrip('/')}"
        self._key = unquote(parts.password or parts.username or "")
        self._session: aiohttp.ClientSession | None = None
        self._settled: set[str] = set()

    async def open(self, collection: str, dimensions: int, stamp: str) -> bool:
        """As `Index.open`."""
        name = _name(collection)
        known = await self._ask("GET", f"/{name}/points/{MARKER}")
        if known is not None and known.get("payload") == {"dimensions": dimensions, "stamp": stamp}:
            self._settled.add(name)
            return True
        await self.drop(collection)
        vectors = {"dense": {"size": dimensions, "distance": "Cosine"}}
        await self._change("PUT", f"/{name}", {"vectors": vectors, "sparse_vectors": {"words": {"modifier": "idf"}}})
        await self._change("PUT", f"/{name}/index?wait=true", {"field_name": "file", "field_schema": "keyword"})
        return False

    async def add(self, collection: str, rows: Sequence[Row]) -> None:
        """As `Index.add`."""
        last = list({row.piece: row for row in rows}.values())
        for at in range(0, len(last), BATCH):
            await self._unsettle(collection)
            body = await asyncio.to_thread(_points, last[at : at + BATCH])
            await self._change("PUT", f"/{_name(collection)}/points?wait=true", body)

    async def remove(self, collection: str, pieces: Sequence[int]) -> None:
        """As `Index.remove`."""
        if pieces:
            await self._unsettle(collection)
            body = {"points": list(pieces)}
            await self._change("POST", f"/{_name(collection)}/points/delete?wait=true", body)

    async def settle(self, collection: str, stamp: str) -> None:
        """As `Index.settle`."""
        name = _name(collection)
        known = await self._ask("GET", f"/{name}")
        if known is None:
            return
        size = known["config"]["params"]["vectors"]["dense"]["size"]
        point = {"id": MARKER, "vector": {}, "payload": {"dimensions": size, "stamp": stamp}}
        await self._change("PUT", f"/{name}/points?wait=true", {"points": [point]})
        self._settled.add(name)

    async def drop(self, collection: str) -> None:
        """As `Index.drop`."""
        self._settled.discard(_name(collection))
        await self._change("DELETE", f"/{_name(collection)}")

    async def search(
        self, collection: str, query: str, vector: Vector, limit: int, files: frozenset[str] | None = None
    ) -> list[Hit]:
        """As `Index.search`."""
        if files is not None and not files:
            return []
        asked = Counter(question_terms(query))
        queries: list[tuple[Any, str]] = [(vector.tolist(), "dense")]
        if asked:
            queries.append(({"indices": list(asked), "values": [float(times) for times in asked.values()]}, "words"))
        chosen = [] if files is None else [{"key": "file", "match": {"any": sorted(files)}}]
        first = await self._query(collection, queries, max(DEPTH, 2 * limit), chosen)
        known = sorted({piece for found in first for piece in found})
        if not known:
            return []
        # each search has the scores of what the other has found as well
        dense, *lexical = await self._query(collection, queries, len(known), [{"has_id": known}])
        said = lexical[0] if lexical else {}
        return hits([(piece, dense.get(piece), said.get(piece)) for piece in known], limit)

    async def close(self) -> None:
        """As `Index.close`."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _query(
        self, collection: str, queries: Sequence[tuple[Any, str]], limit: int, must: Sequence[Json]
    ) -> list[dict[int, float]]:
        """The scores by piece of each query."""
        searches = [
            {"query": query, "using": using, "limit": limit, "filter": {"must": must}, "with_payload": False}
            for query, using in queries
        ]
        found = await self._ask("POST", f"/{_name(collection)}/points/query/batch", {"searches": searches})
        return [{point["id"]: point["score"] for point in each["points"]} for each in found or []]

    async def _unsettle(self, collection: str) -> None:
        """What is in it now is of no state of the catalogue."""
        name = _name(collection)
        if name in self._settled:
            await self._change("POST", f"/{name}/points/delete?wait=true", {"points": [MARKER]})
            self._settled.discard(name)

    async def _change(self, method: str, path: str, body: Json | bytes | None = None) -> None:
        """What is done to a collection that is missing, does nothing."""
        await self._ask(method, path, body, limit_s=FILL_S)

    async def _ask(self, method: str, path: str, body: Json | bytes | None = None, limit_s: float = 0.0) -> Any:
        """The result; None if there is no such thing. Sent again if the connection was cut, as by a restart of the
        server: nothing is done twice by being done again. Raises: UpstreamFailed."""
        data = orjson.dumps(body) if isinstance(body, dict) else body
        try:
            try:
                return await self._answer(method, path, data, limit_s or COMMAND_S)
            except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError):
                return await self._answer(method, path, data, limit_s or COMMAND_S)
        except TimeoutError as exc:
            raise self._failed("") from exc
        except (aiohttp.ClientError, OSError, orjson.JSONDecodeError, LookupError, AttributeError) as exc:
            raise self._failed(" ".join(str(exc).split()) or type(exc).__name__) from exc

    async def _answer(self, method: str, path: str, data: bytes | None, limit_s: float) -> Any:
        if self._session is None:
            headers = {"Content-Type": "application/json", **({"api-key": self._key} if self._key else {})}
            self._session = aiohttp.ClientSession(headers=headers, auto_decompress=True)
        limits = aiohttp.ClientTimeout(total=limit_s, sock_connect=CONNECT_S)
        url = f"{self._base}/collections{path}"
        async with self._session.request(method, url, data=data, timeout=limits, allow_redirects=False) as response:
            raw = await response.read()
            if response.status == 404:
                return None
            answer = orjson.loads(raw) if raw[:1] == b"{" else {}
            if response.status != 200:
                status = answer.get("status")
                reason = status.get("error") if isinstance(status, dict) else None
                raise self._failed(f"status {response.status}: {reason or response.reason}")
            return answer["result"]

    def _failed(self, reason: str) -> UpstreamFailed:
        """For a reason; without one the server is late."""
        problem = f"cannot be used now: {reason}" if reason else "does not answer in time"
        return UpstreamFailed(
            f"The index of the knowledge base, in the Qdrant at {self._place}, {problem} (setting knowledge.index).",
            status=502 if reason else 504,
            code="index_unavailable",
        )


def _name(collection: str) -> str:
    return f"llama_smart_proxy_{hashlib.sha256(collection.encode()).hexdigest()[:24]}"


def _points(rows: Sequence[Row]) -> bytes:
    """The body of an upsert."""
    points = []
    for row in rows:
        words = Counter(terms(row.text))
        norm = K1 * (1 - B + B * sum(words.values()) / MEAN_LENGTH)
        values = [times * (K1 + 1) / (times + norm) for times in words.values()]
        vectors: Json = {"dense": row.vector.tolist()}
        if words:
            vectors["words"] = {"indices": list(words), "values": values}
        points.append({"id": row.piece, "vector": vectors, "payload": {"file": row.file}})
    return orjson.dumps({"points": points})
