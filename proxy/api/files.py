"""`/v1/files`: the documents of a client. Source: OpenAI API reference, files."""

from __future__ import annotations

import os
from functools import partial
from typing import BinaryIO
from urllib.parse import quote

from aiohttp import web

from llama_smart_proxy.backends.threads import run_in_thread
from llama_smart_proxy.proxy.api.knowledge import library_of, page, param, seconds
from llama_smart_proxy.proxy.api.state import PROXY
from llama_smart_proxy.proxy.api.uploads import uploaded
from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.errors import BadRequest
from llama_smart_proxy.proxy.http.response import ResponseWriter
from llama_smart_proxy.proxy.knowledge.base import Document

PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")
"""Source: OpenAI API reference, `purpose` of an upload."""
MOST = 10_000
"""Files in one answer."""
PIECE_BYTES = 256 * 1024
_FIELDS = {"purpose", "file"}


async def create(http: web.BaseRequest) -> web.Response:
    """`POST /v1/files`: a form with `file` and `purpose`. Raises: as `uploaded`; BadRequest for another purpose, or for
    `expires_after`, as files stay until they are deleted."""
    library = library_of(http)
    async with uploaded(
        http, await library.incoming(), http[PROXY].config.knowledge.max_file_mib, is_form=True
    ) as upload:
        if not upload.has_file:
            raise BadRequest("the form has no file: it belongs into the field file", param="file")
        purpose = upload.fields.get("purpose", "")
        if purpose not in PURPOSES:
            shown = f"purpose {purpose[:50]!r} is unknown" if purpose else "the form has no purpose"
            raise BadRequest(f"{shown}; there are {', '.join(PURPOSES)}", param="purpose")
        if unknown := sorted(upload.fields.keys() - _FIELDS):
            raise BadRequest(f"the field {unknown[0][:50]!r} is not supported here", param=unknown[0][:50])
        document = await library.upload(upload.path, upload.name, purpose=purpose, media_type=upload.media_type)
    return web.json_response(shape(document))


async def list_files(http: web.BaseRequest) -> web.Response:
    """`GET /v1/files?purpose=&limit=&after=&order=`."""
    documents = await library_of(http).documents(http.query.get("purpose", ""))
    return page(http, documents, shape, name=lambda document: document.id, default=MOST, most=MOST)


async def show(http: web.BaseRequest) -> web.Response:
    """`GET /v1/files/{id}`."""
    return web.json_response(shape(await library_of(http).document(param(http, "id"))))


async def delete(http: web.BaseRequest) -> web.Response:
    """`DELETE /v1/files/{id}`: removes it from all collections, too."""
    document = param(http, "id")
    await library_of(http).delete_document(document)
    return web.json_response({"id": document, "object": "file", "deleted": True})


async def content(http: web.BaseRequest) -> web.StreamResponse:
    """`GET /v1/files/{id}/content`: the bytes as they came. No browser shows them, as they may be a page."""
    library, name = library_of(http), param(http, "id")
    document = await library.document(name)
    path = await library.content(name)
    file = await run_in_thread(lambda: path.open("rb"))
    try:
        size = os.fstat(file.fileno()).st_size
        response = ResponseWriter(http, http[PROXY].config.server.send_stall_s)
        response.open(200, _headers(document), length=str(size))
        response.begin()
        if http.method != "HEAD":
            await _send(response, file, size)
        return await response.finish()
    finally:
        file.close()


def _headers(document: Document) -> list[tuple[str, str]]:
    return [
        ("Content-Type", "application/octet-stream"),
        ("Content-Disposition", f"attachment; filename*=UTF-8''{quote(document.name, safe='')}"),
        ("X-Content-Type-Options", "nosniff"),
        ("Content-Security-Policy", "sandbox; default-src 'none'"),
    ]


async def _send(response: ResponseWriter, file: BinaryIO, left: int) -> None:
    """Just `left` bytes, as the head has announced them."""
    while left and (data := await run_in_thread(partial(file.read, min(left, PIECE_BYTES)))):
        left -= len(data)
        if not response.feed(data):
            await response.drained()


def shape(document: Document) -> Json:
    """A document as OpenAI's file object."""
    return {
        "id": document.id,
        "object": "file",
        "bytes": document.bytes,
        "created_at": seconds(document.created_s),
        "expires_at": None,
        "filename": document.name,
        "purpose": document.purpose,
        "status": "processed",
        "status_details": None,
    }
