"""Converts the tools of a Responses request, which are of many types, to functions that a model may call.

| Responses | OpenAI chat |
|---|---|
| `function` | the function |
| `custom` | a function with one string, `input`; its call becomes a `custom_tool_call` |
| the functions and custom tools in a `namespace` | functions named `NAMESPACE__NAME` |
| `tool_choice` function, custom | only that function, and `required` |
| `tool_choice` allowed_tools | only those functions, and the `mode` |

Tools of other types run on OpenAI's servers, or are built into its models, and are not offered to the model.
Source: the OpenAI API reference, and openai-python 3.57.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.dialects.responses.shape import check, invalid, need
from llama_smart_proxy.proxy.errors import BadRequest

_INPUT: Json = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
    "additionalProperties": False,
}
_MODES = ("auto", "none", "required")


@dataclass(frozen=True, slots=True)
class Origin:
    """The tool in the client's request that a function was made from."""

    name: str
    namespace: str | None = None
    custom: bool = False


@dataclass(frozen=True, slots=True)
class Offered:
    """The functions that a model may call, in OpenAI's shape, and the origin of each, by its name. `choices` are their
    names by the name and the namespace that `tool_choice` may have for them."""

    functions: list[Json]
    origins: dict[str, Origin]
    choices: dict[tuple[str, str | None], str]

    def named(self, chosen: Any, path: str) -> str:
        """The name of the function made from the tool that `tool_choice` names. Raises: BadRequest."""
        name = need(check(chosen, dict, path), "name", str, path)
        namespace = chosen.get("namespace")
        if namespace is not None:
            check(namespace, str, f"{path}.namespace")
        known = self.choices.get((name, namespace))
        if known is None:
            raise BadRequest(f"Tool choice '{name[:60]}' not found in 'tools' parameter.", param="tool_choice")
        return known


def offered(tools: Any) -> Offered:
    """The functions made from the field `tools`. Raises: BadRequest for an invalid tool."""
    result = Offered([], {}, {})
    for at, tool in enumerate(check(tools, list, "tools") if tools is not None else ()):
        _add(result, tool, f"tools[{at}]", None)
    return result


def chosen(choice: Any, tools: Offered) -> tuple[list[Json], str | None]:
    """The functions that the model may call under `tool_choice`, and OpenAI's `tool_choice`, None for the default.

    Raises: BadRequest.
    """
    if choice is None or isinstance(choice, str):
        if choice is not None and choice not in _MODES:
            raise invalid(choice, "tool_choice", *_MODES)
        return tools.functions, choice
    kind = need(check(choice, dict, "tool_choice"), "type", str, "tool_choice")
    if kind in ("function", "custom"):
        return _only(tools, {tools.named(choice, "tool_choice")}), "required"
    if kind == "allowed_tools":
        allowed = need(choice, "tools", list, "tool_choice")
        names = {
            tools.named(tool, f"tool_choice.tools[{at}]")
            for at, tool in enumerate(allowed)
            if isinstance(tool, dict) and tool.get("type") in ("function", "custom")
        }
        return _only(tools, names), need(choice, "mode", str, "tool_choice")
    return tools.functions, None


def function_name(name: str, namespace: Any) -> str:
    """The name under which the model knows the tool `name`."""
    return f"{namespace}__{name}" if isinstance(namespace, str) else name


def custom_arguments(text: str) -> str:
    """The arguments of a call of a custom tool with the input `text`."""
    return orjson.dumps({"input": text}).decode()


def custom_input(arguments: str) -> str:
    """The inverse of `custom_arguments`; the arguments themselves if the model wrote anything else."""
    try:
        value = orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return arguments
    text = value.get("input") if isinstance(value, dict) else None
    return text if isinstance(text, str) else arguments


def _only(tools: Offered, names: set[str]) -> list[Json]:
    return [function for function in tools.functions if function["function"]["name"] in names]


def _add(result: Offered, tool: Any, path: str, namespace: str | None) -> None:
    kind = need(check(tool, dict, path), "type", str, path)
    if kind == "namespace" and namespace is None:
        name = need(tool, "name", str, path)
        for at, inner in enumerate(check(tool.get("tools") or [], list, f"{path}.tools")):
            _add(result, inner, f"{path}.tools[{at}]", name)
    elif kind in ("function", "custom"):
        name = need(tool, "name", str, path)
        known = function_name(name, namespace)
        function = _custom(tool) if kind == "custom" else _function(tool)
        result.functions.append({"type": "function", "function": {"name": known, **function}})
        result.origins[known] = Origin(name, namespace, kind == "custom")
        for choice in ((name, namespace), (known, None)):
            result.choices.setdefault(choice, known)


def _function(tool: Json) -> Json:
    return {key: tool[key] for key in ("description", "parameters", "strict") if tool.get(key) is not None}


def _custom(tool: Json) -> Json:
    """The function for a custom tool. Servers cannot apply its grammar, so the model is shown it."""
    described = [tool["description"]] if isinstance(tool.get("description"), str) else []
    form = tool.get("format")
    if isinstance(form, dict) and isinstance(form.get("definition"), str):
        described.append(f"The input has the form of this {form.get('syntax', '')} grammar:\n{form['definition']}")
    return ({"description": "\n\n".join(described)} if described else {}) | {"parameters": _INPUT}
