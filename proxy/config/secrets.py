"""The secrets that a configuration and the environment contain, so that they can be kept out of the log."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from llama_smart_proxy.proxy.config.schema import Config

_NAME = re.compile(
    r"(?<![^-_])(?:apikey|key|token|secret|password|passwd|credentials?|auth|authorization|hft)\Z", re.IGNORECASE
)
"""Names of fields, flags and variables whose value is a secret."""
_USER = re.compile(r"://([^\s/@]{1,400})@")
_LARGEST = 8192
"""Largest file of a credential, in bytes."""


def secrets_of(config: Config, environ: Mapping[str, str]) -> Iterator[str]:
    """The values of fields, flags and variables that are named like secrets, user and password of URLs, and what the
    service manager has handed over (`$CREDENTIALS_DIRECTORY`)."""
    yield from _within(config.model_dump())
    yield from _within(dict(environ))
    folder = environ.get("CREDENTIALS_DIRECTORY")
    for file in Path(folder).iterdir() if folder and Path(folder).is_dir() else ():
        with suppress(OSError, UnicodeDecodeError):
            if file.stat().st_size <= _LARGEST:
                yield file.read_text(encoding="utf-8")


def _within(value: Any, name: str = "") -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _within(item, str(key))
    elif isinstance(value, SecretStr):
        yield value.get_secret_value()
    elif isinstance(value, str):
        if _NAME.search(name):
            yield value
        for found in _USER.finditer(value):
            yield found[1]
            yield found[1].partition(":")[2]
    elif isinstance(value, Sequence):
        before = ""
        for item in value:
            flag, mark, given = str(item).partition("=")
            if mark and _NAME.search(flag.lstrip("-")):
                yield given
            yield from _within(item, before or name)
            before = flag.lstrip("-") if flag.startswith("-") and not mark else ""
