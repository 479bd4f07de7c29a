"""Configuration files for tests: written to a folder, loaded, or taken apart into their problems."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from llama_smart_proxy.proxy.config import Config, load_config
from llama_smart_proxy.proxy.errors import ConfigError

Env = Mapping[str, str] | None


def load(folder: Path, text: str, env: Env = None, name: str = "config.yaml", **flags: object) -> Config:
    """The config in a file `name` of that text; `server__port=1` is the flag `server.port`."""
    (folder / name).write_text(text, encoding="utf-8")
    overrides = {key.replace("__", "."): value for key, value in flags.items()}
    return load_config(folder / name, env=env or {}, overrides=overrides)


def problems(folder: Path, text: str, env: Env = None, name: str = "config.yaml", **flags: object) -> list[str]:
    """What is wrong with such a file; the folder's name is left out."""
    with pytest.raises(ConfigError) as caught:
        load(folder, text, env, name, **flags)
    return [problem.replace(f"{folder}/", "") for problem in caught.value.problems]


def model(**fields: object) -> str:
    """A file with one model `m` of the given fields."""
    return json.dumps({"models": {"m": fields}})
