"""The model list of Anthropic's API. Source: Anthropic's API reference, `GET /v1/models`."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from datetime import UTC, datetime

from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.errors import BadRequest

VERSION_HEADER = "anthropic-version"
"""Each request of Anthropic's clients has it, and no other."""
_PATH = "/v1/models"


def item(model_id: str, created: int) -> Json:
    """One model; `created` is in seconds since 1970."""
    when = datetime.fromtimestamp(created, UTC).isoformat().replace("+00:00", "Z")
    return {"type": "model", "id": model_id, "display_name": model_id, "created_at": when, "lifecycle": "active"}


def page(items: Sequence[Json], query: Mapping[str, str]) -> Json:
    """The answer with these models, or with those that `limit`, `after_id` and `before_id` of the query select. Without
    `limit` it has all of them. Raises: BadRequest for a `limit` that is no positive number."""
    ids = [one["id"] for one in items]
    first = ids.index(query["after_id"]) + 1 if query.get("after_id") in ids else 0
    last = ids.index(query["before_id"]) if query.get("before_id") in ids else len(ids)
    limit = query.get("limit", str(len(ids) or 1))
    if not (len(limit) < 10 and limit.isascii() and limit.isdigit() and int(limit)):
        raise BadRequest("limit must be a positive number", param="limit")
    if "before_id" in query and "after_id" not in query:
        first, more = max(first, last - int(limit)), last > int(limit)
    else:
        last, more = min(last, first + int(limit)), last > first + int(limit)
    shown = list(items[first:last])
    ends = {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {"first_id": None, "last_id": None}
    return {"data": shown, "has_more": more, **ends}


def lists_models(path: str, headers: Container[str]) -> bool:
    """Whether a request is one of this API for a list of models, or for one of them, which OpenAI's has at the same
    path."""
    return path.startswith(_PATH) and VERSION_HEADER in headers
