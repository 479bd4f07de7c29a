"""Checks of an Anthropic request, and how fields are set aside in what it becomes.

A complaint begins with the place it is about and goes on in the words of Anthropic's own API, because client programs
show and sometimes match them: `messages.0.content: Field required`.
"""

from __future__ import annotations

from typing import Any, TypeVar

from llama_smart_proxy.proxy.chat import Json, keep, kept
from llama_smart_proxy.proxy.dialects.anthropic.dialect import ANTHROPIC
from llama_smart_proxy.proxy.errors import BadRequest

T = TypeVar("T", str, int, bool, list[Any], dict[str, Any])

NAME = ANTHROPIC.name
_WORDS = {str: "string", int: "integer", bool: "boolean", list: "list", dict: "dictionary"}


def need(source: Json, key: str, kind: type[T], path: str = "") -> T:
    """The field `key` of the object at `path`, which must be there and of that JSON type. Raises: BadRequest."""
    where = f"{path}.{key}" if path else key
    if key not in source:
        raise BadRequest(f"{where}: Field required")
    return check(source[key], kind, where)


def check(value: Any, kind: type[T], path: str) -> T:
    """`value`, if it is of that JSON type; `true` is no integer. Raises: BadRequest."""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise BadRequest(f"{path}: Input should be a valid {_WORDS[kind]}")
    return value


def type_of(value: Any, path: str) -> str:
    """The `type` of the object at `path`, as far as it is fit to be shown. Raises: BadRequest."""
    return need(check(value, dict, path), "type", str, path)[:60]


def without(source: Json, *keys: str) -> Json:
    """The fields of `source` other than these."""
    return {key: value for key, value in source.items() if key not in keys}


def set_aside(target: Json, fields: Json) -> Json:
    """`target`, which now keeps these Anthropic fields beside those that it has kept already."""
    return keep(target, NAME, {**kept(target, NAME), **fields})


def aside(source: Json) -> Json:
    """A copy of what `source` keeps of Anthropic's fields."""
    return dict(kept(source, NAME))
