"""Modules that plugins of the replaced projects import, present for as long as one is imported."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

BASE_AGENT = ("src.shared.base_agent", "shared.base_agent")
"""Where that project had its base class: the folder `src` was on its path, too."""
PLUGINS = ("plugins", "src.plugins")
"""The packages under which a plugin found modules of its own."""


class BaseAgent:
    """In place of ollama-smart-proxy's class of this name. A hook that is not overridden does not run."""

    async def on_request(self, request: dict[str, Any]) -> dict[str, Any]:
        """Changes nothing."""
        return request

    async def on_response(self, request: dict[str, Any], response: dict[str, Any]) -> dict[str, Any]:
        """Changes nothing."""
        return response


@contextmanager
def standing_in(path: Path | None) -> Iterator[None]:
    """Within, `src.shared.base_agent` can be imported, and modules of the plugin in the folder `path` as
    `plugins.NAME.MODULE`; a real module of such a name takes precedence. Afterwards the stand-ins, and what was
    imported from them, are gone from `sys.modules`, so that they hide no module of these names."""
    made: list[str] = []
    try:
        if path is not None:
            for name in BASE_AGENT:
                if not _exists(name):
                    _put(name, [], made).BaseAgent = BaseAgent  # type: ignore[attr-defined]
        if path is not None and path.is_dir():
            for name in PLUGINS:
                if name not in sys.modules and not _exists(f"{name}.{path.name}"):
                    _put(name, [str(path.parent)], made)
        yield
    finally:
        for name in [known for known in sys.modules if any(f"{known}.".startswith(f"{top}.") for top in made)]:
            del sys.modules[name]


def _exists(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except Exception:  # the packages around it are imported for this, and may raise anything
        return False


def _put(name: str, search: list[str], made: list[str]) -> ModuleType:
    """A module of this name, in packages that are made where there are none; names of what is new go into `made`."""
    parent, _, _ = name.rpartition(".")
    if parent and parent not in sys.modules:
        _put(parent, [], made)
    module = sys.modules[name] = ModuleType(name)
    module.__path__ = search
    made.append(name)
    return module
