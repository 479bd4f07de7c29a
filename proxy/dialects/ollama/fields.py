"""The fields of an Ollama request: which there are, what they may hold, and how the client's own spelling survives.

Source: Ollama's api/types.go; the texts of the errors are Ollama's own or those of Go's `encoding/json`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from llama_smart_proxy.proxy.chat import KEPT, Json, Kept
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
"""Those of `/api/embed` that the other endpoints have not."""
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


class Said(Kept):
    """What a client said in one object of its request that its canonical form does not tell.

    `ours` are the fields that we should write in its place. As long as we still should, nobody has changed what they
    mean, and the client's own spelling is put back. `endpoint` is where the client asked, told in a body only.
    """

    __slots__ = ("endpoint", "ours")

    def __init__(self, said: Json, ours: Json, endpoint: str = "") -> None:
        """Compare the two and take note of what differs; `options` are compared one by one."""
        super().__init__(NAME, {})
        self.endpoint = endpoint
        self.ours: Json = {}
        for name, value in said.items():
            if name in ours and value == ours[name]:
                continue
            if name == "options" and endpoint and isinstance(value, dict):
                value = Said(value, ours.get(name, {}))
            elif name in ours:
                self.ours[name] = ours[name]
            self[name] = value
        self.ours |= {name: value for name, value in ours.items() if name not in said}


def remember(target: Json, said: Json, ours: Json, endpoint: str = "") -> None:
    """Set aside in `target`, the canonical form of `said`, in what `ours`, the way back, differs from it."""
    aside = Said(said, ours, endpoint)
    if aside or aside.ours or endpoint:
        target[KEPT] = aside


def restored(fresh: Json, source: Mapping[str, Any]) -> Json:
    """`fresh`, which says what `source` means, in the words that the client used; it is changed in place."""
    aside = source.get(KEPT)
    return _restore(fresh, aside) if isinstance(aside, Said) else fresh


def _restore(fresh: Json, aside: Said) -> Json:
    for name, value in aside.items():
        if isinstance(value, Said):
            fresh[name] = _restore(fresh.get(name, {}), value)
        elif fresh.get(name, aside) == aside.ours.get(name, aside):
            fresh[name] = value
    for name, value in aside.ours.items():
        if name not in aside and fresh.get(name, aside) == value:
            del fresh[name]
    return fresh


def checked(said: object, fields: Mapping[str, str], where: str, go_type: str = "") -> Json:
    """`said` with the names of `fields` as they are written there: Go takes them in any case.

    `where` and `go_type` are what errors show. Raises: BadRequest for a value that Ollama cannot parse, and for a field
    that stands there twice.
    """
    if not isinstance(said, dict):
        raise mismatch(said, where, go_type)
    foreign = [name for name in said if name not in fields and name.casefold() in fields]
    if foreign:
        said = dict(said)
        for name in foreign:
            value = said.pop(name)
            if said.setdefault(name.casefold(), value) is not value:
                raise BadRequest(f"the field {_quoted(name.casefold())} appears twice, in different case")
    for name, wanted in fields.items():
        value = said.get(name)
        if value is not None and wanted and not _is(value, wanted):
            raise mismatch(value, f"{where}.{name}", wanted)
    return said


def folded(said: Json) -> Json:
    """`said` with the names of known fields in lower case, in which we look for them."""
    return checked(said, _ALL_FIELDS, "")


def mismatch(value: object, path: str, go_type: str) -> BadRequest:
    """The error for a value that Go cannot put into the field at `path`."""
    kind = _KINDS.get(type(value), "null") + (f" {value}" if isinstance(value, float) else "")
    return BadRequest(f"json: cannot unmarshal {kind} into Go struct field {path} of type {go_type}")


def _is(value: object, go_type: str) -> bool:
    if go_type == "int":
        return isinstance(value, int | float) and not isinstance(value, bool) and value == int(value)
    return isinstance(value, _PYTHON_TYPES.get(go_type, list))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def keep_alive_s(value: object) -> float | None:
    """How long the model shall stay after this request, in seconds: `math.inf` for ever, None if the client says
    nothing.

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
