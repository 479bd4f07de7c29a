"""What the endpoints of the knowledge base have in common: whose it is, the values that clients send, and lists.

Source: OpenAI API reference, files and vector stores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import orjson
from aiohttp import web

from llama_smart_proxy.proxy.api.state import PROXY
from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.errors import BadRequest, Overloaded
from llama_smart_proxy.proxy.http.headers import PARAMS
from llama_smart_proxy.proxy.knowledge.base import Chunking, Collection, Viewer
from llama_smart_proxy.proxy.knowledge.library import Library

T = TypeVar("T")

MOST_PAIRS, LONGEST_KEY, LONGEST_VALUE = 16, 64, 512
"""Of metadata and of attributes."""
LONGEST_TEXT = 256
"""Characters of the name of a collection."""
MOST_DAYS = 365
TOKEN = 4
"""Characters that count as one token, by which OpenAI measures chunks."""
MOST_CURSORS = 1000
"""Pages of lists that are remembered."""
LEAST_TOKENS, MOST_TOKENS = 100, 4096


def library_of(http: web.BaseRequest) -> Library:
    """The knowledge base as the client of `http` sees it."""
    library = http[PROXY].library
    if library is None:
        raise Overloaded("the knowledge base is not available", code="knowledge_unavailable")
    return library.seen_by(viewer_of(http))


def viewer_of(http: web.BaseRequest) -> Viewer:
    """Who its client is there."""
    return http[PROXY].access.placed(http, http[PROXY].grant).viewer


def source_for(http: web.BaseRequest, collection: Collection, source: str) -> str:
    """Where a document came from, as the client of `http` may know it: a path, which shows a machine, is only for who
    may change the collection."""
    return source if "://" in source or viewer_of(http).may_change(collection.owner) else ""


def param(http: web.BaseRequest, name: str) -> str:
    """A part of the path."""
    return http[PARAMS][name]


# -- values ------------------------------------------------------------------------------------------------------------


def text(body: Mapping[str, Any], name: str, longest: int = LONGEST_TEXT) -> str | None:
    """A text, None if there is none. Raises: BadRequest."""
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > longest:
        raise BadRequest(f"{name} must be a text of at most {longest} characters", param=name)
    if not value.isprintable():
        raise BadRequest(f"{name} has characters that cannot be shown", param=name)
    return value


def number(body: Mapping[str, Any], name: str, least: int, most: int) -> int | None:
    """A whole number, None if there is none. Raises: BadRequest."""
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise BadRequest(f"{name} must be a whole number from {least} to {most}", param=name)
    return value


def pairs(body: Mapping[str, Any], name: str, kinds: type | tuple[type, ...] = (str, int, float)) -> Json | None:
    """Metadata, or attributes, None if there are none; values are of `kinds`. Raises: BadRequest."""
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, dict) or len(value) > MOST_PAIRS:
        raise BadRequest(f"{name} must be an object of at most {MOST_PAIRS} fields", param=name)
    for key, item in value.items():
        if not 0 < len(key) <= LONGEST_KEY or "\0" in key:
            raise BadRequest(f"{name}: a name is of 1 to {LONGEST_KEY} characters", param=name)
        if not isinstance(item, kinds) or (isinstance(item, str) and (len(item) > LONGEST_VALUE or "\0" in item)):
            allowed = (
                f"a text of at most {LONGEST_VALUE} characters{'' if kinds is str else ', a number, true or false'}"
            )
            raise BadRequest(f"{name}.{key}: must be {allowed}", param=name)
    return value


def days(body: Mapping[str, Any]) -> int | None:
    """`expires_after`: days without use, None for never. Raises: BadRequest."""
    value = body.get("expires_after")
    if value is None:
        return None
    if not isinstance(value, dict) or value.get("anchor") != "last_active_at" or "days" not in value:
        message = 'expires_after must be {"anchor": "last_active_at", "days": NUMBER}'
        raise BadRequest(message, param="expires_after")
    return number(value, "days", 1, MOST_DAYS)


def chunking(body: Mapping[str, Any]) -> Chunking | None:
    """`chunking_strategy`, None for the one that the proxy chooses. Raises: BadRequest."""
    value = body.get("chunking_strategy")
    kind = value.get("type") if isinstance(value, dict) else None
    if value is None or kind == "auto":
        return None
    static = value.get("static") if isinstance(value, dict) else None
    if kind != "static" or not isinstance(static, dict):
        message = 'chunking_strategy must be {"type": "auto"} or {"type": "static", "static": {...}}'
        raise BadRequest(message, param="chunking_strategy")
    size = number(static, "max_chunk_size_tokens", LEAST_TOKENS, MOST_TOKENS) or 800
    overlap = number(static, "chunk_overlap_tokens", 0, size // 2)
    return Chunking(size * TOKEN, (min(400, size // 2) if overlap is None else overlap) * TOKEN)


def ids(body: Mapping[str, Any], name: str, most: int) -> list[str]:
    """A list of ids, each of them once; empty if there is none. Raises: BadRequest."""
    value = body.get(name)
    if value is None:
        return []
    if not isinstance(value, list) or len(value) > most or not all(isinstance(item, str) and item for item in value):
        raise BadRequest(f"{name} must be a list of at most {most} ids", param=name)
    return list(dict.fromkeys(value))


# -- lists -------------------------------------------------------------------------------------------------------------


def page(
    http: web.BaseRequest, items: Sequence[T], shape: Callable[[T], Json], *, name: Callable[[T], str],
    default: int = 20, most: int = 100,
) -> web.Response:  # fmt: skip
    """A page of `items`, which are sorted newest first: `?order=`, `?limit=`, `?after=` and `?before=` choose it.
    `name` is the id of one. Raises: BadRequest."""
    order = http.query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise BadRequest("order must be asc or desc", param="order")
    items = items if order == "desc" else items[::-1]
    limit = _limit(http.query.get("limit", str(default)), most)
    start, end = 0, len(items)
    if after := http.query.get("after"):
        start = _place(items, name, after, _next.get((http.path, order, after)), "after")
    if before := http.query.get("before"):
        end = _place(items, name, before, None, "before") - 1
        start = start if after else max(0, end - limit)
    chosen = items[start : min(end, start + limit)]
    has_more = start > 0 if before and not after else start + limit < end
    data = [shape(item) for item in chosen]
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    if has_more and data and start + limit < len(items):
        _remember((http.path, order, data[-1]["id"]), name(items[start + limit]))
    answer = {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": has_more}
    return web.Response(body=orjson.dumps(answer), content_type="application/json")  # it may have 10,000 files


def _limit(given: str, most: int) -> int:
    if not given.isascii() or not given.isdigit() or len(given) > 9 or not 1 <= int(given) <= most:
        raise BadRequest(f"limit must be a whole number from 1 to {most}", param="limit")
    return int(given)


def _place(items: Sequence[T], name: Callable[[T], str], wanted: str, following: str | None, which: str) -> int:
    """The place behind the item `wanted`, or, if there is none any more, that of `following`. Raises: BadRequest."""
    names = [name(item) for item in items]
    for known, behind in ((wanted, 1), (following, 0)):
        if known in names:
            return names.index(known) + behind
    raise BadRequest(f"the list has no {wanted[:100]!r}, or has it no more", param=which)


def _remember(cursor: tuple[str, str, str], following: str) -> None:
    """Clients delete what a page has, and then ask for the page behind its last item."""
    _next[cursor] = following
    if len(_next) > MOST_CURSORS:
        del _next[next(iter(_next))]


_next: dict[tuple[str, str, str], str] = {}
"""By the path, the order and the last id of a page: the id that follows."""


def seconds(time_s: float) -> int:
    """A time as OpenAI has it."""
    return math.floor(time_s)
