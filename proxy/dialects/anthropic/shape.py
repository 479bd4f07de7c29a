"""Checks of fields of an Anthropic request, and access to its extensions.

Error messages have the form and text of Anthropic's own API, because clients show and sometimes match them:
`messages.0.content: Field required`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from llama_smart_proxy.proxy.chat import EXTENSIONS, Extensions, Json, attach, extensions_of, kept
from llama_smart_proxy.proxy.dialects.anthropic.dialect import ANTHROPIC
from llama_smart_proxy.proxy.errors import BadRequest

T = TypeVar("T", str, int, bool, list[Any], dict[str, Any])

NAME = ANTHROPIC.name
_TYPE_NAMES = {str: "string", int: "integer", bool: "boolean", list: "list", dict: "dictionary"}


def need(source: Json, key: str, kind: type[T], path: str = "") -> T:
    """The required field `key` of `source`, the object at `path`.

    Raises: BadRequest if it is missing or of another type than `kind`.
    """
    where = f"{path}.{key}" if path else key
    if key not in source:
        raise BadRequest(f"{where}: Field required")
    return check(source[key], kind, where)


def check(value: Any, kind: type[T], path: str) -> T:
    """`value`, if it is of type `kind`; `true` is not an integer. Raises: BadRequest."""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise BadRequest(f"{path}: Input should be a valid {_TYPE_NAMES[kind]}")
    return value


def type_of(value: Any, path: str) -> str:
    """The `type` of the object at `path`, at most 60 characters, as error messages quote it. Raises: BadRequest."""
    return need(check(value, dict, path), "type", str, path)[:60]


def without(source: Json, *keys: str) -> Json:
    """A copy of `source` without `keys`."""
    return {key: value for key, value in source.items() if key not in keys}


def add_extensions(target: Json, fields: Json) -> Json:
    """Add `fields` to the Anthropic extensions of `target`. Returns `target`."""
    before = target.get(EXTENSIONS)
    problem = before.problem if isinstance(before, Extensions) else None
    return attach(target, NAME, {**extensions_of(target, NAME), **fields}, problem)


def anthropic_extensions(source: Json) -> Json:
    """A copy of the Anthropic extensions of `source`."""
    return dict(extensions_of(source, NAME))


def keeping(convert: Callable[[Any, str], Json], block: Any, path: str) -> Json:
    """`convert(block, path)`; or the block itself, kept, if that refuses it.

    Raises: BadRequest for what is no block of any type, and for an invalid text, which agents would take for one.
    """
    try:
        return convert(block, path)
    except BadRequest as exc:
        if not isinstance(block, dict) or not isinstance(block.get("type"), str) or block["type"] == "text":
            raise
        return kept(block, NAME, exc)
