"""The extension points of the proxy: providers of models, endpoints with their APIs, observers.

A module listed under `modules` in the configuration is a Python file with a function `extend(registry: Registry)`.
Agents are loaded from `agents_dirs` instead.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from llama_smart_proxy.backends.base import Provider
from llama_smart_proxy.backends.commands.provider import Commands
from llama_smart_proxy.backends.llamacpp.provider import LlamaCpp
from llama_smart_proxy.backends.ollama.provider import Ollama
from llama_smart_proxy.backends.openai import Remotes
from llama_smart_proxy.proxy.api.endpoints import ENDPOINTS, Endpoint
from llama_smart_proxy.proxy.chat import Observer
from llama_smart_proxy.proxy.config import Config
from llama_smart_proxy.proxy.errors import ConfigError
from llama_smart_proxy.proxy.log import access


@dataclass(slots=True)
class Registry:
    """`providers` in the order in which they are searched for a model; `endpoints` by path; `observers` are called with
    the record of each request when it has ended."""

    providers: list[type[Provider]] = field(default_factory=lambda: [LlamaCpp, Commands, Remotes, Ollama])
    endpoints: dict[str, Endpoint] = field(default_factory=lambda: dict(ENDPOINTS))
    observers: list[Observer] = field(default_factory=lambda: [access.line])
    modules: dict[Path, tuple[bytes, ModuleType]] = field(default_factory=dict)
    """The modules by their files, with the files' contents."""

    @classmethod
    def of(cls, config: Config, before: Registry | None = None) -> Registry:
        """The built-in entries, and those that the modules of `config` add. A module whose file is as it was `before`
        is not imported again, so that its classes stay the same. Raises: ConfigError."""
        registry = cls()
        problems = []
        for number, file in enumerate(config.modules):
            try:
                content = file.read_bytes()
                known = before.modules.get(file) if before is not None else None
                module = known[1] if known is not None and known[0] == content else _loaded(file, number)
                registry.modules[file] = content, module
                module.extend(registry)
            except Exception as exc:  # importing a module may raise anything
                problems.append(f"modules.{number}: {file}: {type(exc).__name__}: {exc}")
        if problems:
            raise ConfigError(problems)
        return registry


def _loaded(file: Path, number: int) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"_lsp_module{number}", file)
    if spec is None or spec.loader is None:
        raise ImportError("not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, "extend", None)):
        raise ImportError("has no function extend(registry)")
    return module
