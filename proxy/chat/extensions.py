"""Fields that one API has and OpenAI's has not: kept aside in the object they came in, under a key of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Json = dict[str, Any]
KEPT = "_kept"


class Kept(Json):
    """Fields of one JSON object that its `dialect` has and OpenAI's has not, under their own names.

    A type of its own, so that a client that sends a field called `_kept` means just that.
    """

    __slots__ = ("dialect",)

    def __init__(self, dialect: str, fields: Mapping[str, Any]) -> None:
        super().__init__(fields)
        self.dialect = dialect


def keep(target: Json, dialect: str, fields: Mapping[str, Any]) -> Json:
    """Set `fields` aside in `target`, which is returned; nothing if there are none."""
    if fields:
        target[KEPT] = Kept(dialect, fields)
    return target


def kept(source: Json, dialect: str) -> Mapping[str, Any]:
    """What was set aside in `source` by that dialect."""
    found = source.get(KEPT)
    return found if isinstance(found, Kept) and found.dialect == dialect else {}


def bare(value: Any) -> Any:
    """A copy of a JSON value without anything that was set aside; texts and numbers are shared."""
    if isinstance(value, dict):
        return {key: bare(item) for key, item in value.items() if not isinstance(item, Kept)}
    return [bare(item) for item in value] if isinstance(value, list) else value
