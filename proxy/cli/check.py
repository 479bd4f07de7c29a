"""`llama-smart-proxy check` and `llama-smart-proxy schema`: validate a configuration file, and print its schema."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sized
from pathlib import Path

from llama_smart_proxy.backends.llamacpp.command import server_command
from llama_smart_proxy.proxy.config import Config, read_config, schema_json
from llama_smart_proxy.proxy.errors import ConfigError
from llama_smart_proxy.proxy.middleware.plugins import Plugins


def check_command(path: Path | None, env: Mapping[str, str]) -> int:
    """Print every problem and warning to stderr, one per line, and `OK: ...` to stdout if there is no problem.

    Returns the exit status: 0, or 2 if the proxy would refuse to start.
    """
    reading = read_config(path, env=env)
    for line in reading.problems:
        print(line, file=sys.stderr)
    for line in reading.warnings:
        print(f"warning: {line}", file=sys.stderr)
    missing = [*machine_problems(reading.config), *agent_problems(reading.config)] if reading.config is not None else []
    for line in missing:
        print(f"{path or 'defaults'}: {line}", file=sys.stderr)
    if reading.config is None or missing:
        return 2
    config = reading.config
    counts = [_count(config.models | config.virtual, "model"), _count(config.remotes, "remote")]
    if config.uses_ollama:
        counts.append(_count(config.ollama.urls, "Ollama host"))
    print(f"OK: {path or 'defaults'} ({', '.join(counts)})")
    return 0


def machine_problems(config: Config) -> list[str]:
    """Programs and folders that are configured but missing on this machine, each as `path: problem`."""
    found = []
    try:
        server_command(config.llama_cpp.server)
    except ConfigError as exc:
        found += exc.problems
    folder = config.llama_cpp.models_dir
    if folder is not None and not folder.is_dir():
        found.append(f"llama_cpp.models_dir: {folder}: no such folder")
    return found


def agent_problems(config: Config) -> list[str]:
    """Missing agents and invalid options. An agent that cannot be imported only causes a warning on stderr, as the
    proxy serves without it."""
    try:
        plugins = Plugins.of(config)
    except ConfigError as exc:
        return exc.problems
    for line in plugins.missing:
        print(f"warning: {line}", file=sys.stderr)
    for folder in config.agents_dirs:
        if not folder.is_dir():
            print(f"warning: agents_dirs: {folder}: no such folder", file=sys.stderr)
    for plugin in plugins:
        if plugin.error is not None:
            print(f"warning: agents: {plugin.name} cannot be loaded: {plugin.error}", file=sys.stderr)
    return []


def schema_command() -> int:
    """Print the JSON schema of the configuration file. Returns 0."""
    print(schema_json())
    return 0


def _count(things: Sized, noun: str) -> str:
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"
