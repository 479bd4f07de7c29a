"""What one API has and OpenAI's lacks: stored with the object it came in, under one reserved key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Json = dict[str, Any]
EXTENSIONS = "_extensions"


class Extensions(Json):
    """Fields of one JSON object that its `dialect` has and OpenAI's API has not, under their own names.

    `problem` is the reason why a request with this object can be sent to no server of another API; None if it can.
    A type of its own, so that a client's own field called `_extensions` is not mistaken for it.
    """

    __slots__ = ("dialect", "problem")

    def __init__(self, dialect: str, fields: Mapping[str, Any], problem: Exception | None = None) -> None:
        super().__init__(fields)
        self.dialect = dialect
        self.problem = problem


def own_fields(source: Json) -> Json:
    """The fields `x_...` of a chunk or a `chat.completion`: what agents have added to the end of an answer for clients
    of every API."""
    return {name: value for name, value in source.items() if name.startswith("x_")}


def attach(target: Json, dialect: str, fields: Mapping[str, Any], problem: Exception | None = None) -> Json:
    """Attach `fields` to `target` as extensions, unless there are none and no `problem`. Returns `target`."""
    if fields or problem is not None:
        target[EXTENSIONS] = Extensions(dialect, fields, problem)
    return target


def extensions_of(source: Json, dialect: str) -> Mapping[str, Any]:
    """The extensions that `dialect` attached to `source`; empty if there are none."""
    found = source.get(EXTENSIONS)
    return found if isinstance(found, Extensions) and found.dialect == dialect else {}


def kept(item: Json, dialect: str, problem: Exception) -> Json:
    """A copy of an item of a list (a message, a content part) of `dialect` that OpenAI's API cannot express: it keeps
    its place and its own form. `problem` is reported if the request is sent to a server of another API."""
    return attach(dict(item), dialect, {}, problem)


def is_kept(item: Any) -> bool:
    """Whether `kept` made this item."""
    found = item.get(EXTENSIONS) if isinstance(item, dict) else None
    return isinstance(found, Extensions) and found.problem is not None


def first_problem(value: Any) -> Exception | None:
    """The first reason, at any level, why a request can be sent to no server of another API; None if there is none."""
    if isinstance(value, dict):
        found = value.get(EXTENSIONS)
        if isinstance(found, Extensions) and found.problem is not None:
            return found.problem
        value = value.values()
    elif not isinstance(value, list | tuple):
        return None
    return next((problem for item in value if (problem := first_problem(item)) is not None), None)


def without_extensions(value: Any) -> Any:
    """A copy of a JSON value without extensions at any level, and without kept items; strings and numbers are
    shared."""
    if isinstance(value, dict):
        return {key: without_extensions(item) for key, item in value.items() if not isinstance(item, Extensions)}
    return [without_extensions(item) for item in value if not is_kept(item)] if isinstance(value, list) else value
