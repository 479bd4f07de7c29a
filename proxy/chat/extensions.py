"""Fields of one API that OpenAI's lacks: stored in the object they came in, under one reserved key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Json = dict[str, Any]
EXTENSIONS = "_extensions"


class Extensions(Json):
    """Fields of one JSON object that its `dialect` has and OpenAI's API has not, under their own names.

    A type of its own, so that a client's own field called `_extensions` is not mistaken for it.
    """

    __slots__ = ("dialect",)

    def __init__(self, dialect: str, fields: Mapping[str, Any]) -> None:
        super().__init__(fields)
        self.dialect = dialect


def attach(target: Json, dialect: str, fields: Mapping[str, Any]) -> Json:
    """Attach `fields` to `target` as extensions, unless they are empty. Returns `target`."""
    if fields:
        target[EXTENSIONS] = Extensions(dialect, fields)
    return target


def extensions_of(source: Json, dialect: str) -> Mapping[str, Any]:
    """The extensions that `dialect` attached to `source`; empty if there are none."""
    found = source.get(EXTENSIONS)
    return found if isinstance(found, Extensions) and found.dialect == dialect else {}


def without_extensions(value: Any) -> Any:
    """A copy of a JSON value without extensions at any level; strings and numbers are shared."""
    if isinstance(value, dict):
        return {key: without_extensions(item) for key, item in value.items() if not isinstance(item, Extensions)}
    return [without_extensions(item) for item in value] if isinstance(value, list) else value
