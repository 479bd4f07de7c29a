"""`llama-smart-proxy check` and `llama-smart-proxy schema`: validate a configuration file, and print its schema."""

from __future__ import annotations

import asyncio
import shlex
import sys
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path

import uvloop

from llama_smart_proxy.backends.base import Problem
from llama_smart_proxy.backends.http.connection import Endpoint
from llama_smart_proxy.proxy.access.peers import exposure
from llama_smart_proxy.proxy.app import App
from llama_smart_proxy.proxy.config import Config, read_config, schema_json, without_secret_values
from llama_smart_proxy.proxy.errors import ConfigError, ProxyError, StartFailed

PATIENCE_S = 3.0
"""Longest wait in seconds for disks and servers."""


def check_command(
    path: Path | None, env: Mapping[str, str], *, strict: bool = False, argv_of: str | None = None
) -> int:
    """Print every problem and warning to stderr, one per line, and `OK: ...` to stdout if there is no problem; in place
    of that, the command line of the server of the model `argv_of`, quoted for a shell and without secrets.

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
    problems, argv = _looked_at(reading.config, argv_of)
    if (exposed := exposure(reading.config.server)) is not None:
        problems.append(Problem("server.host", exposed, fatal=True))
    for problem in problems:
        grave = problem.fatal or strict
        print(f"{path or 'defaults'}: {problem}" if grave else f"warning: {problem}", file=sys.stderr)
    if any(problem.fatal for problem in problems) or (strict and (problems or reading.warnings)):
        return 2
    print(shlex.join(without_secret_values(argv)) if argv else f"OK: {path or 'defaults'} ({_summary(reading.config)})")
    return 0


def _looked_at(config: Config, argv_of: str | None) -> tuple[list[Problem], Sequence[str]]:
    """What is configured but cannot be used on this machine now, and the command line of a model's server."""
    try:
        app = App(config)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_inspected(app, argv_of))
    except ConfigError as exc:  # of agents and modules
        parts = [line.partition(": ") for line in exc.problems]
        return [Problem(where, message, fatal=True) for where, _, message in parts], ()


async def _inspected(app: App, argv_of: str | None) -> tuple[list[Problem], Sequence[str]]:
    app.proxy.inspection.limit_s = PATIENCE_S
    try:
        problems = await app.proxy.inspection.problems(harmless=True)
        return (problems, ()) if argv_of is None else (problems, await _command_line(app, argv_of))
    except ProxyError as exc:
        return [*problems, Problem("--argv", exc.message, fatal=True)], ()
    finally:
        await app.close()


async def _command_line(app: App, name: str) -> Sequence[str]:
    """Raises: ModelNotFound, and StartFailed, also for a model of another's server."""
    model = (await app.proxy.router.resolve(name, pull=False)).model
    pool = app.proxy.config.server_pool
    argv = model.command_line(Endpoint(pool.host, pool.port_start))
    if not argv:
        raise StartFailed(f"the proxy does not start the server of the model {name[:100]!r} ({model.kind})")
    return argv


def schema_command() -> int:
    """Print the JSON schema of the configuration file. Returns 0."""
    print(schema_json())
    return 0


def _summary(config: Config) -> str:
    counts = [_count(config.models | config.virtual, "model"), _count(config.remotes, "remote")]
    if config.uses_ollama:
        counts.append(_count(config.ollama.urls, "Ollama host"))
    return ", ".join(counts)


def _count(things: Sized, noun: str) -> str:
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"
