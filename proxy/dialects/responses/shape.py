"""Checks of fields of a Responses request; error messages have the form of OpenAI's own."""

from __future__ import annotations

from typing import Any, TypeVar

from llama_smart_proxy.proxy.dialects.responses.dialect import RESPONSES
from llama_smart_proxy.proxy.errors import BadRequest

T = TypeVar("T", str, int, bool, list[Any], dict[str, Any])

NAME = RESPONSES.name
"""Of the extensions of this API."""
_TYPE_NAMES = {
    str: "a string",
    int: "an integer",
    bool: "a boolean",
    list: "an array",
    dict: "an object",
    float: "a decimal",
}


def need(source: dict[str, Any], key: str, kind: type[T], path: str = "") -> T:
    """The required field `key` of `source`, the object at `path`.

    Raises: BadRequest if it is missing or of another type than `kind`.
    """
    where = f"{path}.{key}" if path else key
    if source.get(key) is None:
        raise BadRequest(f"Missing required parameter: '{where}'.", code="missing_required_parameter", param=where)
    return check(source[key], kind, where)


def check(value: Any, kind: type[T], path: str) -> T:
    """`value`, if it is of type `kind`; `true` is not an integer. Raises: BadRequest."""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        given = _TYPE_NAMES.get(type(value), "null")
        message = f"Invalid type for '{path}': expected {_TYPE_NAMES[kind]}, but got {given} instead."
        raise BadRequest(message, code="invalid_type", param=path)
    return value


def invalid(value: Any, path: str, *supported: str) -> BadRequest:
    """The error for a value that is not one of `supported`."""
    listed = ", ".join(f"'{name}'" for name in supported)
    message = f"Invalid value: '{str(value)[:60]}'. Supported values are: {listed}."
    return BadRequest(message, code="invalid_value", param=path)


def unstored(name: str, advice: str, *, code: str = "unsupported_parameter", path: str = "") -> BadRequest:
    """The error for the field or item `name` at `path` that refers to what OpenAI stores and this server does not."""
    return BadRequest(f"'{name}' is not supported: {advice}", code=code, param=path or name)
