"""Stand-ins for modules that plugins of the replaced projects import, available during an import only."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

BASE_AGENT = ("src.shared.base_agent", "shared.base_agent")
"""The modules of that project's base class: the folder `src` was on its path, too."""
PLUGINS = ("plugins", "src.plugins")
"""The packages under which a plugin imported its own modules."""
_PACKAGES = {"src", "src.shared", "shared", *PLUGINS}


class BaseAgent:
    """Stand-in for ollama-smart-proxy's class of this name. A hook that is not overridden does not run."""

    async def on_request(self, request: dict[str, Any]) -> dict[str, Any]:
        """Changes nothing."""
        return request

    async def on_response(self, request: dict[str, Any], response: dict[str, Any]) -> dict[str, Any]:
        """Changes nothing."""
        return response


@contextmanager
def standing_in(path: Path | None) -> Iterator[None]:
    """Within the context, `src.shared.base_agent` can be imported, and modules of the plugin in the folder `path` as
    `plugins.NAME.MODULE`; a real module of such a name takes precedence. Afterwards the stand-ins, and what was
    imported from them, are gone from `sys.modules`, so that they hide no module of these names."""
    if path is None:
        yield
        return
    finder = _Finder(path)
    sys.meta_path.append(finder)  # after the finders of real modules
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        tops = tuple(f"{name}." for name in finder.found)
        for name in [known for known in sys.modules if f"{known}.".startswith(tops)]:
            del sys.modules[name]


class _Finder(MetaPathFinder, Loader):
    """Finds the stand-ins for the plugin at `path`, and loads the one with the base class. `found` lists the names it
    has found."""

    def __init__(self, path: Path) -> None:
        self.found: list[str] = []
        self._folders = {f"{package}.{path.name}": path for package in PLUGINS} if path.is_dir() else {}

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec: ModuleSpec | None = None
        if name in BASE_AGENT:
            spec = ModuleSpec(name, self)
        elif name in self._folders and (self._folders[name] / "__init__.py").is_file():
            spec = spec_from_file_location(name, self._folders[name] / "__init__.py")
        elif name in _PACKAGES or name in self._folders:
            spec = ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [str(self._folders[name])] if name in self._folders else []
        if spec is not None:
            self.found.append(name)
        return spec

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["BaseAgent"] = BaseAgent
