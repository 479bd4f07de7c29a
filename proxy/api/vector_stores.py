"""`/v1/vector_stores`: the collections of a client, and searches. Source: OpenAI API reference, vector stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aiohttp import web

from llama_smart_proxy.proxy.api.knowledge import (
    chunking,
    days,
    ids,
    library_of,
    number,
    page,
    pairs,
    param,
    seconds,
    source_for,
    text,
)
from llama_smart_proxy.proxy.api.state import PROXY
from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.chat.passage import Found, Passage
from llama_smart_proxy.proxy.errors import BadRequest, ProxyError
from llama_smart_proxy.proxy.http.body import read_json
from llama_smart_proxy.proxy.knowledge import filters
from llama_smart_proxy.proxy.knowledge.base import Addition, Collection, Counts
from llama_smart_proxy.proxy.knowledge.library import Library

MOST_FILES = 2000
"""Files that one request adds."""
MOST_RESULTS, MOST_QUERIES, LONGEST_QUERY = 50, 32, 4096
RANKERS = ("auto", "none", "default-2024-11-15", "default-2024-08-21")


async def create(http: web.BaseRequest) -> web.Response:
    """`POST /v1/vector_stores`. `description`, which no answer has, is not kept. Raises: BadRequest 404 if one of
    `file_ids` does not exist; then nothing is made."""
    library, body = library_of(http), await read_json(http, http[PROXY].max_body_bytes)
    name, metadata, kept_days = text(body, "name") or "", pairs(body, "metadata", str), days(body)
    files, how = ids(body, "file_ids", MOST_FILES), chunking(body)
    made = await library.create(name, metadata=metadata, days=kept_days)
    try:
        await library.attach_all(made.id, [Addition(file, chunking=how) for file in files])
    except ProxyError:
        await library.delete(made.id)
        raise
    return web.json_response(shape(await library.collection(made.id) if files else made))


async def list_stores(http: web.BaseRequest) -> web.Response:
    """`GET /v1/vector_stores?limit=&after=&before=&order=`: those that the client may search."""
    found = await library_of(http).collections()
    return page(http, found, shape, name=lambda collection: collection.id)


async def show(http: web.BaseRequest) -> web.Response:
    """`GET /v1/vector_stores/{id}`; here and below, the name of a collection does as well as its id. While files wait
    for something, such as an embedding model that does not answer, `x_problem` says for what."""
    library = library_of(http)
    collection = await library.collection(param(http, "id"))
    problem = await library.problem() if collection.counts.in_progress else ""
    return web.json_response(shape(collection) | ({"x_problem": problem} if problem else {}))


async def update(http: web.BaseRequest) -> web.Response:
    """`POST /v1/vector_stores/{id}`: changes `name`, `metadata`, `expires_after`."""
    body = await read_json(http, http[PROXY].max_body_bytes)
    changed = await library_of(http).update(
        param(http, "id"), name=text(body, "name"), metadata=pairs(body, "metadata", str), days=days(body)
    )
    return web.json_response(shape(changed))


async def delete(http: web.BaseRequest) -> web.Response:
    """`DELETE /v1/vector_stores/{id}`."""
    library = library_of(http)
    found = await library.collection(param(http, "id"))
    await library.delete(found.id)
    return web.json_response({"id": found.id, "object": "vector_store.deleted", "deleted": True})


async def search(http: web.BaseRequest) -> web.Response:
    """`POST /v1/vector_stores/{id}/search`. Of several queries each passage is found once, with its best score.

    `score` sorts the results of one search; besides, `x_relevance` is the estimated probability that a passage answers
    the query, and `x_confidence` that the collection does.
    """
    library, body = library_of(http), await read_json(http, http[PROXY].max_body_bytes)
    queries, limit = _queries(body), number(body, "max_num_results", 1, MOST_RESULTS) or 10
    least, rerank = _ranking(body)
    collection = await library.collection(param(http, "id"))
    files = await _files(library, collection.id, body.get("filters"))
    found = [
        await library.search(query, [collection.id], limit=limit, documents=files, rerank=rerank)
        for query in queries
        if files is None or files
    ]
    results = [_result(http, collection, passage) for passage in _best(found) if passage.score >= least][:limit]
    return web.json_response(
        {
            "object": "vector_store.search_results.page",
            "search_query": queries,
            "data": results,
            "has_more": False,
            "next_page": None,
            "x_confidence": max((one.confidence for one in found), default=0.0),
        }
    )


def _queries(body: Mapping[str, Any]) -> list[str]:
    value = body.get("query")
    queries: list[Any] = value if isinstance(value, list) else [value]
    good = all(isinstance(one, str) and len(one) <= LONGEST_QUERY and one.strip() for one in queries)
    if not good or not 0 < len(queries) <= MOST_QUERIES:
        most = f"at most {MOST_QUERIES} texts of at most {LONGEST_QUERY} characters"
        raise BadRequest(f"query must be a text that is not empty, or a list of {most}", param="query")
    return queries


def _ranking(body: Mapping[str, Any]) -> tuple[float, bool | None]:
    """The least score, and whether to rerank (None: if the proxy does by itself)."""
    options = body.get("ranking_options")
    options = {} if options is None else options
    least = options.get("score_threshold", 0.0) if isinstance(options, dict) else None
    ranker = options.get("ranker", "auto") if isinstance(options, dict) else None
    if not isinstance(least, int | float) or isinstance(least, bool) or not 0 <= least <= 1 or ranker not in RANKERS:
        message = f"ranking_options has a ranker ({', '.join(RANKERS)}) and a score_threshold from 0 to 1"
        raise BadRequest(message, param="ranking_options")
    return float(least), False if ranker == "none" else None


async def _files(library: Library, collection: str, given: object) -> frozenset[str] | None:
    """The files that a filter leaves; None without one."""
    if given is None:
        return None
    keep = filters.parsed(given)
    return frozenset(member.document.id for member in await library.members(collection) if keep(member.attributes))


def _best(found: Sequence[Found]) -> list[Passage]:
    """The passages of all searches, the best first, each once."""
    best: dict[tuple[str, int], Passage] = {}
    for passage in (passage for one in found for passage in one.passages):
        key = (passage.document_id, passage.number)
        if key not in best or passage.score > best[key].score:
            best[key] = passage
    return sorted(best.values(), key=lambda passage: -passage.score)


def _result(http: web.BaseRequest, collection: Collection, passage: Passage) -> Json:
    return {
        "file_id": passage.document_id,
        "filename": passage.document,
        "score": passage.score,
        "attributes": dict(passage.attributes),
        "content": [{"type": "text", "text": passage.text}],
        "x_relevance": passage.relevance,
        "x_source": source_for(http, collection, passage.url),
    }


def counts(found: Counts) -> Json:
    """How many files are in each state."""
    return {
        "in_progress": found.in_progress,
        "completed": found.completed,
        "failed": found.failed,
        "cancelled": found.cancelled,
        "total": found.total,
    }


def shape(collection: Collection) -> Json:
    """A collection as OpenAI's vector store object."""
    used = seconds(collection.used_s or collection.created_s)
    expires = None if collection.days is None else {"anchor": "last_active_at", "days": collection.days}
    return {
        "id": collection.id,
        "object": "vector_store",
        "created_at": seconds(collection.created_s),
        "name": collection.name,
        "usage_bytes": collection.bytes,
        "file_counts": counts(collection.counts),
        "status": "in_progress" if collection.counts.in_progress else "completed",
        "expires_after": expires,
        "expires_at": None if collection.days is None else used + collection.days * 86400,
        "last_active_at": used,
        "metadata": dict(collection.metadata),
    }
