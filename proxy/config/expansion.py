"""Expands `${VAR}` and `${VAR:-default}` in the texts of a configuration; `$${` is a literal `${`.

A variable that is not set may be a credential of a systemd service: the file of that name that `LoadCredential=` placed
in `$CREDENTIALS_DIRECTORY`, or the one with `credentials_` before it, where a whole folder was loaded under that id.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from llama_smart_proxy.proxy.config.commands import FILLED, PLACEHOLDERS
from llama_smart_proxy.proxy.config.problems import Loc, Problem

FOLDER_ID = "credentials"
"""The id under which the shipped unit loads the folder of credentials; systemd puts it and `_` before each name."""
_REFERENCE = re.compile(r"\$\$\{|\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^${}]*))?\}|\$\{")


def expand(text: str, env: Mapping[str, str], kept: Collection[str] = ()) -> str:
    """`text` with its references replaced, but for the names `kept`; the values of variables are not expanded again.

    As in a shell, the default also replaces an empty variable. Raises: ValueError, with every variable that is not set
    and has no default, and with every `${` that begins no reference.
    """
    wrong: list[str] = []

    def replace(found: re.Match[str]) -> str:
        if found.group() == "$${":
            return "${"
        name, default = found.group("name", "default")
        if name in kept and default is None:
            return found.group()
        value = _value(name, env) if name is not None else None
        if name is None:
            wrong.append("'${' begins no ${VAR} or ${VAR:-default}; write '$${' for a plain '${'")
        elif default is not None:
            return value or default
        elif value is None:
            wrong.append(f"the environment variable {name} is not set; ${{{name}:-default}} gives it a default")
        return value or ""

    expanded = _REFERENCE.sub(replace, text)
    if wrong:
        raise ValueError("; ".join(wrong))
    return expanded


def _value(name: str, env: Mapping[str, str]) -> str | None:
    """The value of the variable, or the text of the credential, without the line end at its end; None without both."""
    folder = env.get("CREDENTIALS_DIRECTORY")
    if name in env or not folder:
        return env.get(name)
    for file in (name, f"{FOLDER_ID}_{name}"):
        with suppress(OSError, UnicodeDecodeError):
            return Path(folder, file).read_text(encoding="utf-8").rstrip("\r\n")
    return None


def expand_all(
    data: Any, env: Mapping[str, str], problems: list[Problem], loc: Loc = (), kept: Collection[str] = ()
) -> Any:
    """`data` with every text value expanded; keys are not. A text that cannot be expanded is unchanged, and its problem
    is added to `problems`."""
    if isinstance(data, dict):
        of_command = len(loc) == 2 and loc[0] == "models" and "cmd" in data
        kept_by = {key: PLACEHOLDERS for key in FILLED} if of_command else {}
        return {
            key: expand_all(value, env, problems, (*loc, key), kept_by.get(key, kept)) for key, value in data.items()
        }
    if isinstance(data, list):
        return [expand_all(value, env, problems, (*loc, index), kept) for index, value in enumerate(data)]
    if not isinstance(data, str):
        return data
    try:
        return expand(data, env, kept)
    except ValueError as error:
        problems.append(Problem(loc, str(error)))
        return data
