"""`/knowledge/{collection}`: documents by the path or URL where they come from, for who keeps a collection in step with
a folder, such as `llama-smart-proxy kb`."""

from __future__ import annotations

import secrets
from functools import partial

import orjson
from aiohttp import web

from llama_smart_proxy.backends.threads import run_in_thread
from llama_smart_proxy.proxy.api.knowledge import library_of, param, source_for, viewer_of
from llama_smart_proxy.proxy.api.state import PROXY
from llama_smart_proxy.proxy.api.uploads import uploaded
from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.errors import BadRequest
from llama_smart_proxy.proxy.fetching import Fetcher, FetchError, Limits, Page
from llama_smart_proxy.proxy.http.response import ResponseWriter
from llama_smart_proxy.proxy.knowledge.base import Collection, Member

LONGEST = 4096
"""Characters of a path or a URL."""
PAGE_BYTES = 16 * 2**20
"""Largest page, which is in memory while it is received."""
FETCH_S = 60.0
"""Seconds for a page."""
LINES = 500
"""Lines that are sent at once."""


async def list_sources(http: web.BaseRequest) -> web.StreamResponse:
    """`GET /knowledge/{collection}`: a line of JSON for each document of a collection, as of `shape`."""
    library = library_of(http)
    collection = await library.collection(param(http, "collection"))
    members = await library.members(collection.id)
    response = ResponseWriter(http, http[PROXY].config.server.send_stall_s)
    response.open(200, [("Content-Type", "application/x-ndjson")])
    response.begin()
    for start in range(0, len(members), LINES):
        lines = [orjson.dumps(shape(http, collection, member)) + b"\n" for member in members[start : start + LINES]]
        if http.method != "HEAD" and not response.feed(b"".join(lines)):
            await response.drained()
    return await response.finish()


async def put_source(http: web.BaseRequest) -> web.Response:
    """`PUT /knowledge/{collection}?source=`: adds or replaces what came from `source`; the body is its content. With
    `?url=` in its place the page there is fetched. `changed` is false if it was the same before. It is read later.

    Raises: as `uploaded`; BadRequest, also for a page that cannot be fetched.
    """
    library, settings = library_of(http), http[PROXY].config.knowledge
    collection = await library.collection(param(http, "collection"))
    if "url" in http.query:
        url = http.query["url"]
        page = await _fetched(http, url)
        file = (await library.incoming()) / secrets.token_hex(16)
        try:
            await run_in_thread(partial(file.write_bytes, page.data))
            member = await library.add_source(collection.id, url, file, page.media_type)
        finally:
            file.unlink(missing_ok=True)
    else:
        source = http.query.get("source", "")
        if not source or len(source) > LONGEST or not source.isprintable():
            raise BadRequest(f"source must be a path or a URL of at most {LONGEST} characters", param="source")
        async with uploaded(http, await library.incoming(), settings.max_file_mib, is_form=False) as upload:
            member = await library.add_source(collection.id, source, upload.path, upload.media_type)
    document = shape(http, collection, member) if member is not None else None
    return web.json_response({"changed": member is not None, "document": document})


async def _fetched(http: web.BaseRequest, url: str) -> Page:
    """The page at `url`. Hosts of `knowledge.allow_private` are for administrators. Raises: BadRequest."""
    settings = http[PROXY].config.knowledge
    fetcher = Fetcher(allow_private=settings.allow_private if viewer_of(http).is_admin else ())
    try:
        return await fetcher.get(
            url, limits=Limits(max_bytes=min(settings.max_file_mib * 2**20, PAGE_BYTES), total_s=FETCH_S)
        )
    except FetchError as exc:
        raise BadRequest(f"the page cannot be fetched: {exc}", code="not_fetched", param="url") from None
    finally:
        await fetcher.close()


def shape(http: web.BaseRequest, collection: Collection, member: Member) -> Json:
    """A document in a collection. `digest` is the SHA-256 of its content, `error` the reason why it is `failed`."""
    document = member.document
    return {
        "id": document.id,
        "name": document.name,
        "source": source_for(http, collection, document.source),
        "digest": document.digest,
        "bytes": document.bytes,
        "status": member.status.value,
        "error": member.error,
        "pieces": member.pieces,
        "created_at": member.created_s,
    }
