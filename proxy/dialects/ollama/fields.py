"""The fields of an Ollama request with their types, and the client's spelling of them.

Source: Ollama's api/types.go; error messages are those of Ollama or of Go's `encoding/json`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from llama_smart_proxy.proxy.chat import EXTENSIONS, Extensions, Json
from llama_smart_proxy.proxy.config.duration import go_duration_s
from llama_smart_proxy.proxy.errors import BadRequest

NAME = "ollama"

_COMMON = {
    "model": "string",
    "stream": "bool",
    "format": "",
    "keep_alive": "",
    "options": "map[string]interface {}",
    "think": "",
    "truncate": "bool",
    "shift": "bool",
    "logprobs": "bool",
    "top_logprobs": "int",
}
CHAT_FIELDS = _COMMON | {"messages": "[]api.Message", "tools": "api.Tools"}
GENERATE_FIELDS = _COMMON | {
    "prompt": "string",
    "suffix": "string",
    "system": "string",
    "template": "string",
    "context": "[]int",
    "raw": "bool",
    "images": "[]api.ImageData",
}
MESSAGE_FIELDS = {
    "role": "string",
    "content": "string",
    "thinking": "string",
    "images": "[]api.ImageData",
    "tool_calls": "[]api.ToolCall",
    "tool_name": "string",
    "tool_call_id": "string",
}
OTHER_FIELDS = {"input": "", "dimensions": "int"}
"""Fields that only `/api/embed` has."""
CALL_FIELDS = {"id": "string", "function": "api.ToolCallFunction"}
FUNCTION_FIELDS = {"index": "int", "name": "string", "arguments": "api.ToolCallFunctionArguments"}

_ALL_FIELDS = dict.fromkeys(CHAT_FIELDS | GENERATE_FIELDS | OTHER_FIELDS, "")

_PYTHON_TYPES: dict[str, type] = {
    "string": str,
    "bool": bool,
    "map[string]interface {}": dict,
    "api.ToolCallFunction": dict,
    "api.ToolCallFunctionArguments": dict,
}
_KINDS: dict[type, str] = {
    bool: "bool",
    str: "string",
    int: "number",
    float: "number",
    list: "array",
    dict: "object",
}
_LONGEST_NS = 2**63 - 1
_MISSING = object()
"""No field has this value."""


class ClientSpelling(Extensions):
    """The fields of one object as the client sent them, where encoding its decoded form would give something else.

    `canonical` are the fields that encoding gave in their place. If it still gives the same, they were not changed in
    between, and the client's are restored. `endpoint` is the path of the request; only set for a whole body.
    """

    __slots__ = ("canonical", "endpoint")

    def __init__(self, sent: Json, canonical: Json, endpoint: str = "") -> None:
        """Record the differences; those of `options` are recorded for each option."""
        super().__init__(NAME, {})
        self.endpoint = endpoint
        self.canonical: Json = {}
        for name, value in sent.items():
            if name in canonical and value == canonical[name]:
                continue
            if name == "options" and endpoint and isinstance(value, dict):
                value = ClientSpelling(value, canonical.get(name, {}))
            elif name in canonical:
                self.canonical[name] = canonical[name]
            self[name] = value
        self.canonical |= {name: value for name, value in canonical.items() if name not in sent}


def record_spelling(target: Json, sent: Json, canonical: Json, endpoint: str = "") -> None:
    """Attach to `target`, the decoded form of `sent`, how `sent` differs from `canonical`, which encodes `target`."""
    spelling = ClientSpelling(sent, canonical, endpoint)
    if spelling or spelling.canonical or endpoint:
        target[EXTENSIONS] = spelling


def restore_spelling(encoded: Json, source: Mapping[str, Any]) -> Json:
    """Replace fields of `encoded`, which encodes `source`, by those that the client sent. Returns `encoded`."""
    spelling = source.get(EXTENSIONS)
    return _apply_spelling(encoded, spelling) if isinstance(spelling, ClientSpelling) else encoded


def _apply_spelling(encoded: Json, spelling: ClientSpelling) -> Json:
    for name, value in spelling.items():
        if isinstance(value, ClientSpelling):
            encoded[name] = _apply_spelling(encoded.get(name, {}), value)
        elif encoded.get(name, _MISSING) == spelling.canonical.get(name, _MISSING):
            encoded[name] = value
    for name, value in spelling.canonical.items():
        if name not in spelling and encoded.get(name, _MISSING) == value:
            del encoded[name]
    return encoded


def checked(sent: object, fields: Mapping[str, str], where: str, go_type: str = "") -> Json:
    """`sent` with the names of `fields` in lower case: Go accepts any case.

    `where` and `go_type` are used in error messages. Raises: BadRequest for a value of the wrong type, and for a field
    that occurs twice.
    """
    if not isinstance(sent, dict):
        raise mismatch(sent, where, go_type)
    foreign = [name for name in sent if name not in fields and name.casefold() in fields]
    if foreign:
        sent = dict(sent)
        for name in foreign:
            value = sent.pop(name)
            if sent.setdefault(name.casefold(), value) is not value:
                raise BadRequest(f"the field {_quoted(name.casefold())} appears twice, in different case")
    for name, field_type in fields.items():
        value = sent.get(name)
        if value is not None and field_type and not _is(value, field_type):
            raise mismatch(value, f"{where}.{name}", field_type)
    return sent


def folded(sent: Json) -> Json:
    """`sent` with the names of known fields in lower case."""
    return checked(sent, _ALL_FIELDS, "")


def mismatch(value: object, path: str, go_type: str) -> BadRequest:
    """The error for a value that Go cannot assign to the field at `path`."""
    kind = _KINDS.get(type(value), "null") + (f" {value}" if isinstance(value, float) else "")
    return BadRequest(f"json: cannot unmarshal {kind} into Go struct field {path} of type {go_type}")


def _is(value: object, go_type: str) -> bool:
    if go_type == "int":
        return isinstance(value, int | float) and not isinstance(value, bool) and value == int(value)
    return isinstance(value, _PYTHON_TYPES.get(go_type, list))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def keep_alive_s(value: object) -> float | None:
    """The seconds that a `keep_alive` means: `math.inf` for ever, None if it is null or missing.

    Raises: BadRequest for what is neither a number of seconds nor a Go duration (`"5m"`, `"1h30m"`).
    """
    if value is None:
        return None
    if isinstance(value, str):
        try:
            return go_duration_s(value)
        except ValueError as exc:
            raise BadRequest(str(exc), param="keep_alive") from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        kind = {bool: "bool", list: "[]interface {}", dict: "map[string]interface {}"}.get(type(value), "nil")
        raise BadRequest(f"Unsupported type: '{kind}'", param="keep_alive")
    return math.inf if value < 0 or value * 1e9 > _LONGEST_NS else float(value)
