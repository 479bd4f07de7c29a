"""Expands `${VAR}` and `${VAR:-default}` in the texts of a configuration; `$${` is a literal `${`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from llama_smart_proxy.proxy.config.problems import Loc, Problem

_REFERENCE = re.compile(r"\$\$\{|\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^${}]*))?\}|\$\{")


def expand(text: str, env: Mapping[str, str]) -> str:
    """`text` with its references replaced; the values of variables are not expanded again.

    As in a shell, the default also replaces an empty variable. Raises: ValueError, with every variable that is not set
    and has no default, and with every `${` that begins no reference.
    """
    wrong: list[str] = []

    def replace(found: re.Match[str]) -> str:
        if found.group() == "$${":
            return "${"
        name, default = found.group("name", "default")
        if name is None:
            wrong.append("'${' begins no ${VAR} or ${VAR:-default}; write '$${' for a plain '${'")
        elif default is not None:
            return env.get(name) or default
        elif name not in env:
            wrong.append(f"the environment variable {name} is not set; ${{{name}:-default}} gives it a default")
        return env.get(name, "") if name else ""

    expanded = _REFERENCE.sub(replace, text)
    if wrong:
        raise ValueError("; ".join(wrong))
    return expanded


def expand_all(data: Any, env: Mapping[str, str], problems: list[Problem], loc: Loc = ()) -> Any:
    """`data` with every text value expanded; keys are not. A text that cannot be expanded is unchanged, and its problem
    is added to `problems`."""
    if isinstance(data, dict):
        return {key: expand_all(value, env, problems, (*loc, key)) for key, value in data.items()}
    if isinstance(data, list):
        return [expand_all(value, env, problems, (*loc, index)) for index, value in enumerate(data)]
    if not isinstance(data, str):
        return data
    try:
        return expand(data, env)
    except ValueError as error:
        problems.append(Problem(loc, str(error)))
        return data
