"""`llama-smart-proxy check` and `llama-smart-proxy schema`: validate a configuration file, and print its schema."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path

from llama_smart_proxy.backends.base import Problem
from llama_smart_proxy.proxy.app import App
from llama_smart_proxy.proxy.config import Config, read_config, schema_json
from llama_smart_proxy.proxy.errors import ConfigError

PATIENCE_S = 3.0
"""Longest wait in seconds for disks and servers."""


def check_command(path: Path | None, env: Mapping[str, str], *, strict: bool = False) -> int:
    """Print every problem and warning to stderr, one per line, and `OK: ...` to stdout if there is no problem.

    What this machine lacks is a problem if the proxy would not start without it, and otherwise a warning; with
    `strict`, a problem. Returns the exit status: 0, or 2 if there is a problem.
    """
    reading = read_config(path, env=env)
    for line in reading.problems:
        print(line, file=sys.stderr)
    for line in reading.warnings:
        print(f"warning: {line}", file=sys.stderr)
    if reading.config is None:
        return 2
    config, failed = reading.config, strict and bool(reading.warnings)
    for problem in _machine_problems(config):
        grave = problem.fatal or strict
        print(f"{path or 'defaults'}: {problem}" if grave else f"warning: {problem}", file=sys.stderr)
        failed |= grave
    if failed:
        return 2
    counts = [_count(config.models | config.virtual, "model"), _count(config.remotes, "remote")]
    if config.uses_ollama:
        counts.append(_count(config.ollama.urls, "Ollama host"))
    print(f"OK: {path or 'defaults'} ({', '.join(counts)})")
    return 0


def _machine_problems(config: Config) -> Sequence[Problem]:
    """What is configured but cannot be used on this machine now."""
    try:
        return asyncio.run(_inspected(App(config)))
    except ConfigError as exc:  # of agents and modules
        parts = [line.partition(": ") for line in exc.problems]
        return [Problem(where, message, fatal=True) for where, _, message in parts]


async def _inspected(app: App) -> list[Problem]:
    app.proxy.inspection.limit_s = PATIENCE_S
    try:
        return await app.proxy.inspection.problems(harmless=True)
    finally:
        await app.close()


def schema_command() -> int:
    """Print the JSON schema of the configuration file. Returns 0."""
    print(schema_json())
    return 0


def _count(things: Sized, noun: str) -> str:
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"
