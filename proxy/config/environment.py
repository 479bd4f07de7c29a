"""Settings from outside the file: `LSP_*` variables, those of the replaced projects, and command line flags.

`LSP_SERVER__PORT=8080` sets `server.port`: two underscores separate levels. Names of models and remotes are matched
ignoring case and characters that a variable name cannot contain: `LSP_MODELS__QWEN3_SMALL__CTX` sets the `ctx` of
`qwen3-small`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llama_smart_proxy.proxy.config import text
from llama_smart_proxy.proxy.config.problems import Loc
from llama_smart_proxy.proxy.config.schema import Config, is_verbatim

PREFIX = "LSP_"
NOT_FIELDS = {"LSP_CONFIG", "LSP_OWNER", "LSP_URL", "LSP_API_KEY"}
"""The path of the file, the mark of child processes, and the address and the key for commands."""
SEED_PREFIX = "OLLAMA_PROXY_"
SEED_VARIABLES: dict[str, Loc] = {
    "LLM_PROXY_BACKEND": ("backend",),
    "OLLAMA_PROXY_SERVER_HOST": ("server", "host"),
    "OLLAMA_PROXY_SERVER_PORT": ("server", "port"),
    "OLLAMA_PROXY_OLLAMA_HOST": ("ollama", "host"),
    "OLLAMA_PROXY_OLLAMA_PORT": ("ollama", "port"),
    "OLLAMA_PROXY_PLUGINS_DIR": ("agents_dirs",),
}


@dataclass(frozen=True, slots=True)
class Setting:
    """A value for the field at `loc`. `label` is its source, for error messages; `append`: extend an existing list."""

    label: str
    loc: Loc
    value: Any
    problem: str | None = None
    append: bool = False


def from_environment(env: Mapping[str, str], data: Mapping[str, Any]) -> Iterator[Setting]:
    """The settings in `env`, in ascending order of precedence. `data` is the file's content, in which names of models
    and remotes are looked up."""
    for variable, loc in SEED_VARIABLES.items():
        if env.get(variable):
            append = loc == ("agents_dirs",)
            value = [env[variable]] if append else env[variable]
            yield Setting(f"environment: {variable}", loc, value, append=append)
    # whole sections come before their single fields, so that they do not overwrite them
    variables = (name for name in env if name.startswith(PREFIX) and name not in NOT_FIELDS and _is_meant(name))
    for variable in sorted(variables, key=lambda name: (name.count("__"), name)):
        loc = _loc(variable, data)
        value, problem = _read(env[variable], loc)
        yield Setting(f"environment: {variable}", loc, value, problem)


def without_effect(env: Mapping[str, str]) -> list[str]:
    """A warning for each variable of ollama-smart-proxy, and each other `LSP_*`, that means nothing here."""
    unknown = sorted(name for name in env if name.startswith(SEED_PREFIX) and name not in SEED_VARIABLES)
    others = sorted(name for name in env if name.startswith(PREFIX) and name not in NOT_FIELDS and not _is_meant(name))
    return [f"environment: {name}: has no effect here and can be removed" for name in unknown] + [
        f"environment: {name}: names no field, so it has no effect here" for name in others
    ]


def from_flags(overrides: Mapping[str, object]) -> Iterator[Setting]:
    """The settings in `{"server.port": 8080}`; None is a flag that was not given."""
    for name, value in overrides.items():
        if value is not None:
            yield Setting(f"command line: {name}", tuple(name.split(".")), value)


def _read(raw: str, loc: Loc) -> tuple[Any, str | None]:
    """The value of a variable for the field at `loc`, and a problem with it: lists and mappings are parsed as YAML or
    JSON, null is None, anything else stays text, to be converted by the type of the field."""
    stripped = raw.strip()
    if stripped in ("null", "~"):
        return None, None
    if not stripped.startswith(("[", "{", '"', "'")):
        return raw, None
    parsed = text.parse(stripped, at=loc, verbatim=is_verbatim)
    return parsed.data, parsed.problems[0].message if parsed.problems else None


def _is_meant(variable: str) -> bool:
    """Whether it begins like a field, perhaps misspelled. Editors have `LSP_*` variables of their own."""
    first = variable.removeprefix(PREFIX).partition("__")[0].lower()
    return bool(difflib.get_close_matches(first, Config.model_fields, n=1))


def _loc(variable: str, data: Mapping[str, Any]) -> Loc:
    parts = variable.removeprefix(PREFIX).split("__")
    loc: list[str] = []
    for index, part in enumerate(parts):
        if loc in (["models"], ["llama_cpp", "models"], ["remotes"]):
            loc = _named(loc, part, data)
        elif loc and loc[-1] == "env" and loc[0] != "remotes":
            return (*loc, "__".join(parts[index:]))
        else:
            loc.append(part.lower())
    return tuple(loc)


def _named(section: list[str], part: str, data: Mapping[str, Any]) -> list[str]:
    """The path of the model or remote that `part` names; models may be in either of two sections."""
    other = {"models": ["llama_cpp", "models"], "llama_cpp": ["models"]}.get(section[0])
    for place in filter(None, (section, other)):
        for name in _keys_at(data, place):
            if _plain(name) == _plain(part):
                return [*place, name]
    return [*section, part.lower()]


def _keys_at(data: Any, loc: list[str]) -> list[str]:
    for part in loc:
        data = data.get(part) if isinstance(data, dict) else None
    return list(data) if isinstance(data, dict) else []


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "_", name.lower())
