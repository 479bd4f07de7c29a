"""Filters of a search by the attributes of files.

Source: OpenAI API reference, vector stores, search: `filters`. What it leaves open: an attribute that a file does not
have is equal to nothing, so that `ne` and `nin` hold for it; texts, numbers and truth values are never equal to each
other; `gt` and the like compare numbers with numbers and texts with texts, and hold for nothing else.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

from llama_smart_proxy.proxy.errors import BadRequest

Filter = Callable[[Mapping[str, Any]], bool]
"""Whether a file with these attributes is searched."""
MOST = 1000
"""Comparisons in one filter."""
DEEPEST = 32
"""Filters within each other."""
_ORDERS: dict[str, Callable[[Any, Any], bool]] = {
    "gt": operator.gt,
    "gte": operator.ge,
    "lt": operator.lt,
    "lte": operator.le,
}
_LISTS = ("in", "nin")
_OPERATORS = ("eq", "ne", *_ORDERS, *_LISTS)
_NOTHING = object()


def parsed(value: object) -> Filter:
    """The filter that a client has sent. Raises: BadRequest."""
    return _parsed(value, [MOST], DEEPEST)


def _parsed(value: object, left: list[int], depth: int) -> Filter:
    left[0] -= 1
    if left[0] < 0 or depth < 0:
        raise _wrong(f"has over {MOST} parts" if left[0] < 0 else f"is nested deeper than {DEEPEST} levels")
    if not isinstance(value, dict):
        raise _wrong("must be an object with type, key and value, or with type and filters")
    kind = value.get("type")
    if kind in ("and", "or"):
        inner = value.get("filters")
        if not isinstance(inner, list) or not inner:
            raise _wrong(f"of type {kind} requires a list of filters")
        parts = [_parsed(part, left, depth - 1) for part in inner]
        holds = all if kind == "and" else any
        return lambda attributes: holds(part(attributes) for part in parts)
    if not isinstance(kind, str) or kind not in _OPERATORS:
        raise _wrong(f"has the type {str(kind)[:50]!r}; there are {', '.join((*_OPERATORS, 'and', 'or'))}")
    key = value.get("key")
    if not isinstance(key, str) or not key:
        raise _wrong(f"of type {kind} requires a key, the name of an attribute")
    return _comparison(kind, key, value.get("value"))


def _comparison(kind: str, key: str, value: object) -> Filter:
    if kind in _LISTS:
        if not isinstance(value, list) or not all(map(_is_value, value)):
            raise _wrong(f"of type {kind} requires a list of texts, numbers or truth values")
        chosen, is_in = frozenset(map(_comparable, value)), kind == "in"
        return lambda attributes: (_comparable(attributes.get(key, _NOTHING)) in chosen) is is_in
    if not _is_value(value):
        raise _wrong(f"of type {kind} requires a value: a text, a number or a truth value")
    if kind in _ORDERS:
        if isinstance(value, bool):
            raise _wrong(f"of type {kind} requires a number or a text")
        holds, group = _ORDERS[kind], _group(value)
        return lambda attributes: _group(found := attributes.get(key, _NOTHING)) is group and holds(found, value)
    wanted, is_equal = _comparable(value), kind == "eq"
    return lambda attributes: (_comparable(attributes.get(key, _NOTHING)) == wanted) is is_equal


def _is_value(value: object) -> bool:
    return isinstance(value, str | int | float)


def _group(value: object) -> type | None:
    """What values are comparable with."""
    if isinstance(value, bool):
        return bool
    return str if isinstance(value, str) else float if isinstance(value, int | float) else None


def _comparable(value: object) -> tuple[type | None, object]:
    """For Python, true is 1."""
    group = _group(value)
    return group, value if group is not None else None


def _wrong(problem: str) -> BadRequest:
    return BadRequest(f"the filter {problem}", param="filters")
