"""Values that do not come from the file: `LSP_*` variables, those of ollama-smart-proxy, and command line flags.

`LSP_SERVER__PORT=8080` sets `server.port`: two underscores go one level down. The names of models and remotes are
matched without regard to case, and to any character that a variable name cannot hold: `LSP_MODELS__SMOLLM2_EMBED__CTX`
sets the `ctx` of `smollm2-embed`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llama_smart_proxy.proxy.config import text
from llama_smart_proxy.proxy.config.problems import Loc

PREFIX = "LSP_"
NOT_FIELDS = {"LSP_CONFIG", "LSP_OWNER"}  # which file to read, and the mark that our child processes carry
SEED_VARIABLES: dict[str, Loc] = {
    "OLLAMA_PROXY_OLLAMA_HOST": ("ollama", "host"),
    "OLLAMA_PROXY_OLLAMA_PORT": ("ollama", "port"),
    "OLLAMA_PROXY_PLUGINS_DIR": ("agents_dirs",),
}


@dataclass(frozen=True, slots=True)
class Setting:
    """A value for the field at `loc`; `label` says where it came from; `append` adds to a list that is there."""

    label: str
    loc: Loc
    value: Any
    problem: str | None = None
    append: bool = False


def from_environment(env: Mapping[str, str], data: Mapping[str, Any]) -> Iterator[Setting]:
    """The settings in `env`, weakest first. `data` is the file's content: names of models are looked up in it."""
    for variable, loc in SEED_VARIABLES.items():
        if env.get(variable):
            append = loc == ("agents_dirs",)
            value = [env[variable]] if append else env[variable]
            yield Setting(f"environment: {variable}", loc, value, append=append)
    # Whole sections come before single fields in them, whatever the order of the environment.
    ours = (name for name in env if name.startswith(PREFIX) and name not in NOT_FIELDS)
    for variable in sorted(ours, key=lambda name: (name.count("__"), name)):
        value, problem = _read(env[variable])
        yield Setting(f"environment: {variable}", _loc(variable, data), value, problem)


def from_flags(overrides: Mapping[str, object]) -> Iterator[Setting]:
    """The settings given as `{"server.port": 8080}`; None is a flag that was not given."""
    for name, value in overrides.items():
        if value is not None:
            yield Setting(f"command line: {name}", tuple(name.split(".")), value)


def _read(raw: str) -> tuple[Any, str | None]:
    """Lists and mappings as YAML or JSON, null as null, anything else as it stands: the field knows its type."""
    stripped = raw.strip()
    if stripped in ("null", "~"):
        return None, None
    if not stripped.startswith(("[", "{", '"', "'")):
        return raw, None
    parsed = text.parse(stripped)
    return parsed.data, parsed.problems[0].message if parsed.problems else None


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
    """The path of the model or remote that `part` stands for; a model may stand in either of two sections."""
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
