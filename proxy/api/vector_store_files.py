"""`/v1/vector_stores/{id}/files` and `/file_batches`: the files in a collection. Source: OpenAI API reference."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import orjson
from aiohttp import web

from llama_smart_proxy.proxy.api.knowledge import TOKEN, chunking, ids, library_of, page, pairs, param, seconds
from llama_smart_proxy.proxy.api.state import PROXY
from llama_smart_proxy.proxy.api.vector_stores import MOST_FILES, counts
from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.errors import BadRequest
from llama_smart_proxy.proxy.http.body import read_json
from llama_smart_proxy.proxy.http.response import ResponseWriter
from llama_smart_proxy.proxy.knowledge.base import Addition, Counts, Member, Status
from llama_smart_proxy.proxy.knowledge.library import Library

PIECES = 200
"""Pieces of a file that are sent at once."""


async def create(http: web.BaseRequest) -> web.Response:
    """`POST /v1/vector_stores/{id}/files`: adds `file_id`; answers at once, `in_progress`."""
    library, body = library_of(http), await read_json(http, http[PROXY].max_body_bytes)
    file, attributes, how = _addition(body)
    member = await library.attach(param(http, "id"), file, attributes=attributes, chunking=how)
    return web.json_response(shape(member))


def _addition(body: Any) -> Addition:
    """A file to be added, its attributes, and how it is split."""
    file = body.get("file_id") if isinstance(body, dict) else None
    if not isinstance(file, str) or not file:
        raise BadRequest("file_id must be the id of a file", param="file_id")
    return Addition(file, pairs(body, "attributes"), chunking(body))


async def list_files(http: web.BaseRequest) -> web.Response:
    """`GET /v1/vector_stores/{id}/files?filter=&limit=&after=&before=&order=`."""
    return _page(http, await library_of(http).members(param(http, "id"), _status(http)))


async def show(http: web.BaseRequest) -> web.Response:
    """`GET /v1/vector_stores/{id}/files/{file}`."""
    return web.json_response(shape(await library_of(http).member(param(http, "id"), param(http, "file"))))


async def update(http: web.BaseRequest) -> web.Response:
    """`POST /v1/vector_stores/{id}/files/{file}`: replaces `attributes`."""
    library, body = library_of(http), await read_json(http, http[PROXY].max_body_bytes)
    if "attributes" not in body:
        raise BadRequest("attributes are required", param="attributes")
    attributes = pairs(body, "attributes") or {}
    return web.json_response(shape(await library.update_member(param(http, "id"), param(http, "file"), attributes)))


async def delete(http: web.BaseRequest) -> web.Response:
    """`DELETE /v1/vector_stores/{id}/files/{file}`: the file itself stays."""
    file = param(http, "file")
    await library_of(http).detach(param(http, "id"), file)
    return web.json_response({"id": file, "object": "vector_store.file.deleted", "deleted": True})


async def content(http: web.BaseRequest) -> web.StreamResponse:
    """`GET /v1/vector_stores/{id}/files/{file}/content`: the texts of its pieces, sent in several writes."""
    pieces = await library_of(http).pieces(param(http, "id"), param(http, "file"))
    response = ResponseWriter(http, http[PROXY].config.server.send_stall_s)
    response.open(200, [("Content-Type", "application/json; charset=utf-8")])
    response.begin()
    if http.method != "HEAD":
        start, end = b'{"object":"vector_store.file_content.page","data":[', b'],"has_more":false,"next_page":null}'
        response.feed(start)
        for place in range(0, len(pieces), PIECES):
            some = [orjson.dumps({"type": "text", "text": piece}) for piece in pieces[place : place + PIECES]]
            if not response.feed((b"," if place else b"") + b",".join(some)):
                await response.drained()
        response.feed(end)
    return await response.finish()


# -- batches -----------------------------------------------------------------------------------------------------------


async def create_batch(http: web.BaseRequest) -> web.Response:
    """`POST /v1/vector_stores/{id}/file_batches`: adds `file_ids`, or `files` with attributes each. Raises: BadRequest
    404 if one of them does not exist; then none is added."""
    library, body = library_of(http), await read_json(http, http[PROXY].max_body_bytes)
    if ("file_ids" in body) == ("files" in body):
        raise BadRequest("either file_ids or files is required", param="file_ids")
    files = body.get("files")
    if files is None:
        attributes, how = pairs(body, "attributes"), chunking(body)
        additions = [Addition(file, attributes, how) for file in ids(body, "file_ids", MOST_FILES)]
    elif isinstance(files, list) and len(files) <= MOST_FILES:
        additions = list({addition.document: addition for addition in map(_addition, files)}.values())
    else:
        raise BadRequest(f"files must be a list of at most {MOST_FILES} objects", param="files")
    if not additions:
        raise BadRequest("a batch requires at least one file", param="file_ids")
    collection = await library.collection(param(http, "id"))
    batch = f"vsfb_{secrets.token_hex(12)}"
    await library.attach_all(collection.id, additions, batch)
    return await _answer(library, collection.id, batch)


async def show_batch(http: web.BaseRequest) -> web.Response:
    """`GET /v1/vector_stores/{id}/file_batches/{batch}`."""
    return await _answer(library_of(http), param(http, "id"), param(http, "batch"))


async def cancel_batch(http: web.BaseRequest) -> web.Response:
    """`POST /v1/vector_stores/{id}/file_batches/{batch}/cancel`: what has been added by then stays."""
    library, collection, batch = library_of(http), param(http, "id"), param(http, "batch")
    await _members(library, collection, batch)
    await library.cancel(collection, batch)
    return await _answer(library, collection, batch)


async def list_batch(http: web.BaseRequest) -> web.Response:
    """`GET /v1/vector_stores/{id}/file_batches/{batch}/files?filter=&limit=&after=&before=&order=`."""
    members, status = await _members(library_of(http), param(http, "id"), param(http, "batch")), _status(http)
    return _page(http, [member for member in members if status in (None, member.status)])


async def _members(library: Library, collection: str, batch: str) -> list[Member]:
    """Raises: BadRequest 404 if there is no such batch, or nothing of it any more."""
    members = await library.members(collection, batch=batch) if batch else []
    if not members:
        raise BadRequest(f"there is no batch {batch[:100]!r} in this collection", status=404, code="not_found")
    return members


async def _answer(library: Library, collection: str, batch: str) -> web.Response:
    return web.json_response(batch_shape(batch, await _members(library, collection, batch)))


def batch_shape(batch: str, members: Sequence[Member]) -> Json:
    """Files that were added together, as OpenAI's file batch object."""
    states = [member.status for member in members]
    found = Counts(**{status.value: states.count(status) for status in Status})
    status = "in_progress" if found.in_progress else "cancelled" if found.cancelled else "completed"
    return {
        "id": batch,
        "object": "vector_store.files_batch",
        "created_at": min(seconds(member.created_s) for member in members),
        "vector_store_id": members[0].collection,
        "status": "failed" if found.failed == found.total else status,
        "file_counts": counts(found),
    }


# -- shapes ------------------------------------------------------------------------------------------------------------


def _status(http: web.BaseRequest) -> Status | None:
    given = http.query.get("filter")
    try:
        return Status(given) if given is not None else None
    except ValueError:
        raise BadRequest(f"filter must be one of {', '.join(Status)}", param="filter") from None


def _page(http: web.BaseRequest, members: Sequence[Member]) -> web.Response:
    return page(http, members, shape, name=lambda member: member.document.id)


def shape(member: Member) -> Json:
    """A file in a collection as OpenAI's vector store file object."""
    failed = {"code": "invalid_file", "message": member.error} if member.status is Status.FAILED else None
    sizes = {
        "max_chunk_size_tokens": member.chunking.characters // TOKEN,
        "chunk_overlap_tokens": member.chunking.overlap // TOKEN,
    }
    return {
        "id": member.document.id,
        "object": "vector_store.file",
        "created_at": seconds(member.created_s),
        "vector_store_id": member.collection,
        "status": member.status.value,
        "last_error": failed,
        "usage_bytes": member.document.bytes if member.status is Status.COMPLETED else 0,
        "attributes": dict(member.attributes),
        "chunking_strategy": {"type": "static", "static": sizes},
    }
