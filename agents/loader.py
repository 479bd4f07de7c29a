"""Discovers and imports agents: built-in ones, those of installed packages, and those in the operator's folders.

A folder contains single files (`name.py`) and folders with an `agent.py`; an installed package lists its agents in the
entry-point group `llama_smart_proxy.agents`. Of agents with the same name the operator's own takes precedence, then the
installed one. Plugins of the replaced projects, which `compat` adapts, count as agents.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import itertools
import pkgutil
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel

from llama_smart_proxy.agents import base
from llama_smart_proxy.agents.base import Agent
from llama_smart_proxy.agents.compat import Misfit, adapted, manifest, standing_in

GROUP = "llama_smart_proxy.agents"
RESERVED = frozenset({"always", "required", "on_error", "timeout_s"})
"""Keys of an agent's entry in the configuration that are not its own options."""
_HERE = Path(base.__file__).parent
_PACKAGE = base.__name__.rpartition(".")[0]
_OURS = {"base", "compat", "loader", "substitution"}
_NO_AGENTS = ("_*", ".*", "test_*.py", "*_test.py", "conftest.py")
"""Names of files and folders beside agents that are not agents."""
_NAME = re.compile(r"[a-z][a-z0-9_-]*")
_serial = itertools.count(1)


class AgentUnusable(Exception):
    """An agent cannot be used; the message has the reason and the place."""


@dataclass(frozen=True, slots=True)
class AgentSource:
    """Where an agent comes from: a built-in module, an `entry` of an installed package, or a `path`: a file, or a
    folder with an `agent.py`. `off`: its own `config.json` disables it."""

    name: str
    path: Path | None = None
    entry: EntryPoint | None = None
    off: bool = False

    @property
    def is_shipped(self) -> bool:
        """Whether it is built in."""
        return self.path is None and self.entry is None

    @property
    def label(self) -> str:
        """For display: `built-in`, `package NAME`, or the path."""
        if self.entry is not None:
            return f"package {self.entry.dist.name if self.entry.dist else self.entry.value}"
        return str(self.path) if self.path is not None else "built-in"

    def stamp(self) -> tuple[tuple[str, int], ...]:
        """Its files with their modification times in ns, to detect changes; empty for an installed package."""
        if self.entry is not None:
            return ()
        root = self.path or _HERE / self.name
        files = sorted(root.rglob("*.py")) if root.is_dir() else [root.with_suffix(".py")]
        return tuple((str(file), _changed_ns(file)) for file in files)

    def load(self) -> type[Agent]:
        """The agent's class, from a fresh import. Raises: AgentUnusable."""
        try:
            with standing_in(self.path):
                classes = _classes_of(self._import())
                found = [cls for cls in classes if issubclass(cls, Agent)]
                if not found and self.path is not None:
                    found = adapted(classes, self.path)
        except Misfit as exc:
            raise AgentUnusable(str(exc)) from exc
        except BaseException as exc:  # agent code may raise anything
            if isinstance(exc, KeyboardInterrupt):  # by Ctrl-C, while a large library is imported
                raise
            raise AgentUnusable(_reason(exc)) from exc
        if len(found) != 1:
            names = ", ".join(sorted(cls.__name__ for cls in found))
            raise AgentUnusable(
                f"contains several agents ({names}); keep one" if found else "contains no class derived from Agent"
            )
        if problem := _problem(found[0]):
            raise AgentUnusable(problem)
        return found[0]

    def _import(self) -> ModuleType:
        if self.entry is not None:
            loaded = self.entry.load()
            return loaded if isinstance(loaded, ModuleType) else _holding(loaded)
        if self.path is None:
            _forget(f"{_PACKAGE}.{self.name}")
            return importlib.import_module(f"{_PACKAGE}.{self.name}")
        name = f"_agent{next(_serial)}_{re.sub(r'[^A-Za-z0-9_]', '_', self.name)}"  # unique for every import
        if self.path.suffix == ".py":
            return _exec(name, self.path, None)
        if (self.path / "__init__.py").exists():
            _exec(name, self.path / "__init__.py", self.path)
        else:
            package = sys.modules[name] = ModuleType(name)
            package.__path__ = [str(self.path)]
        return _exec(f"{name}.agent", self.path / "agent.py", None)


def discover(folders: Iterable[Path], plugins: Path | None = None) -> dict[str, AgentSource]:
    """The sources of all agents, by name, without importing any. A folder that cannot be read counts as empty.

    In the folder `plugins` only folders with a `config.json` beside the `agent.py` count.
    """
    found = {info.name: AgentSource(info.name) for info in pkgutil.iter_modules([str(_HERE)]) if info.name not in _OURS}
    for entry in entry_points(group=GROUP):
        found[entry.name] = AgentSource(entry.name, entry=entry)
    for path in _in_folder(plugins):
        if holds_plugin(path):
            found[path.name] = AgentSource(path.name, path, off=not _setting(path))
    for folder in folders:
        for path in _in_folder(folder):
            if (path / "agent.py").is_file():
                found[path.name] = AgentSource(path.name, path, off=_setting(path) is False)
            elif path.suffix == ".py" and path.is_file():
                found[path.stem] = AgentSource(path.stem, path)
    return found


def holds_plugin(folder: Path) -> bool:
    """Whether the folder has the layout of a plugin of the former llama-smart-proxy."""
    return (folder / "agent.py").is_file() and (folder / "config.json").is_file()


def _in_folder(folder: Path | None) -> list[Path]:
    try:
        paths = sorted(folder.iterdir()) if folder is not None and folder.is_dir() else []
    except OSError:
        return []
    return [path for path in paths if not any(fnmatchcase(path.name, name) for name in _NO_AGENTS)]


def _setting(folder: Path) -> object:
    """The value of `enabled` in the plugin's own `config.json`; True if it is unreadable, which its import reports."""
    try:
        return (manifest(folder) or {}).get("enabled")
    except Misfit:
        return True


def _classes_of(module: ModuleType) -> list[type[Any]]:
    """The classes that the module, or its own package, defines; not those it imports from elsewhere."""
    own = module.__name__.removesuffix(".agent")
    return [
        value
        for value in dict.fromkeys(filter(inspect.isclass, vars(module).values()))
        if value is not Agent
        and not value.__name__.startswith("_")
        and (value.__module__ == module.__name__ or value.__module__.startswith(f"{own}."))
    ]


def _problem(cls: type[Agent]) -> str | None:
    """What is wrong with the class, as far as that can be checked without an instance; None if nothing is."""
    if not (inspect.isclass(cls.Config) and issubclass(cls.Config, BaseModel)):
        return "its Config must be a class derived from pydantic's BaseModel"
    if cls.command is not None and not _NAME.fullmatch(cls.command):
        return f"its command {cls.command!r} must match {_NAME.pattern}"
    if taken := sorted(RESERVED & cls.Config.model_fields.keys()):
        return f"its Config must not have fields called {', '.join(taken)}: these are reserved"
    if unknown := sorted(cls.per_call - cls.Config.model_fields.keys()):
        return f"per_call contains names that Config does not have: {', '.join(unknown)}"
    for hook in ("on_request", "on_chunk", "on_reply", "start", "close"):
        if not inspect.iscoroutinefunction(getattr(cls, hook)):
            return f"{hook} must be an `async def` without `yield`"
    if inspect.iscoroutinefunction(cls.on_response):
        return "on_response must be an async generator: an `async def` with `yield`"
    return None


def _exec(name: str, file: Path, package: Path | None) -> ModuleType:
    locations = [str(package)] if package is not None else None
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=locations)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    importlib.invalidate_caches()  # a file saved twice within a second may still be cached
    try:
        # Not with the loader: it accepts a cached .pyc by its time stamp, which has a resolution of 1 s.
        exec(compile(file.read_bytes(), str(file), "exec"), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _forget(name: str) -> None:
    for known in [known for known in sys.modules if known == name or known.startswith(f"{name}.")]:
        del sys.modules[known]


def _holding(value: object) -> ModuleType:
    """A module around a class that an entry point names."""
    module = ModuleType(getattr(value, "__module__", "entry"))
    vars(module)[getattr(value, "__name__", "value")] = value
    return module


def _changed_ns(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0


def _reason(exc: BaseException) -> str:
    """The exception with the line and file where it was raised, on one line."""
    if isinstance(exc, SyntaxError):
        return f"SyntaxError: {exc.msg} (line {exc.lineno})"
    trace = exc.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f" (line {trace.tb_lineno} of {Path(trace.tb_frame.f_code.co_filename).name})" if trace is not None else ""
    return f"{type(exc).__name__}: {exc}{where}"
