"""Equality of model names."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from llama_smart_proxy.proxy.errors import BadRequest

LONGEST_NAME = 512
"""Characters of a model's name. Ollama's own limit is 350 for the host and 80 for each other part."""


def checked_length(name: str) -> str:
    """`name`, which a client has sent, if it may be looked up: what compares names takes more time for longer ones.

    Raises: BadRequest.
    """
    if len(name) > LONGEST_NAME:
        raise BadRequest(f"a model's name has at most {LONGEST_NAME} characters, not {len(name)}", param="model")
    return name


def key_of(name: str) -> str:
    """The canonical form of a name by Ollama's rules: case-insensitive; the tag `latest`, Ollama's own registry and its
    user `library` are optional."""
    key = name.lower().removeprefix("registry.ollama.ai/").removeprefix("library/")
    return key if ":" in key.rpartition("/")[2] else f"{key}:latest"


@lru_cache(maxsize=256)
def other_forms(name: str) -> Sequence[str]:
    """The other spellings of `name` by these rules, apart from case, the closest first."""
    short = name
    for prefix in ("registry.ollama.ai/", "library/"):
        if short.lower().startswith(prefix):
            short = short[len(prefix) :]
    forms = [_other_tag(name)]
    if short != name and short:
        forms += [short, _other_tag(short)]
    return tuple(form for form in forms if form != name)


def _other_tag(name: str) -> str:
    """`name` without its tag `latest`, or with it; unchanged with any other tag."""
    if name.lower().endswith(":latest"):
        return name[: -len(":latest")]
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"
