"""Reads the configuration again while the proxy runs, and lets it apply if it is valid as a whole."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from llama_smart_proxy.backends.llamacpp.problems import machine_problems
from llama_smart_proxy.backends.threads import run_in_thread
from llama_smart_proxy.proxy import log
from llama_smart_proxy.proxy.access.peers import exposure
from llama_smart_proxy.proxy.api.reloads import Outcome
from llama_smart_proxy.proxy.app import App
from llama_smart_proxy.proxy.config import Config, Section, load_config
from llama_smart_proxy.proxy.config.secrets import secrets_of
from llama_smart_proxy.proxy.errors import ConfigError, StartFailed
from llama_smart_proxy.proxy.log import hide
from llama_smart_proxy.proxy.systemd import Supervisor

logger = logging.getLogger(__name__)

LOOK_S = 0.5
"""Interval in seconds in which files are looked at for changes: network and bind mounts report none."""
FIXED = (
    "server.host",
    "server.port",
    "state_dir",
    "store",
    "log_format",
    "log_content",
    "telemetry.otlp",
    "knowledge.index",
)
"""The settings that apply when the proxy starts, and not when it reads its configuration again."""

LISTED = ("models", "llama_cpp.models", "remotes", "agents")
"""The settings whose items are reported one by one."""
SHUTTING_DOWN = "the proxy is shutting down"


@dataclass(frozen=True, slots=True)
class Source:
    """Where the configuration comes from: a file (None: the defaults), the environment, and the command line."""

    path: Path | None = None
    overrides: Mapping[str, object] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What problems begin with."""
        return str(self.path or "defaults")

    def read(self) -> Config:
        """The configuration as it is now. Blocks on the disk.

        Raises: ConfigError with all problems of the file, and of the machine if the proxy cannot run with those.
        """
        config = load_config(self.path, env=os.environ, overrides=self.overrides)
        if missing := [problem for problem in machine_problems(config) if problem.fatal]:
            raise ConfigError([f"{self.name}: {problem}" for problem in missing])
        hide(secrets_of(config, os.environ))
        return config

    def is_empty(self) -> bool:
        """Whether there is a file with nothing in it. Blocks on the disk."""
        with suppress(OSError):
            return self.path is not None and not self.path.read_bytes().strip()
        return False

    def stamps(self, config: Config) -> list[object]:
        """Different after a change of a file that the configuration is made of. Blocks on the disk."""
        folder = os.environ.get("CREDENTIALS_DIRECTORY")
        credentials: list[Path] = []
        with suppress(OSError):
            credentials = sorted(Path(folder).iterdir()) if folder else []
        return [_stamp(path) for path in (self.path, *config.modules, *credentials) if path is not None]


class Reloader:
    """The reloads of one app, one at a time. One that is asked for while another one reads is done after it."""

    def __init__(self, app: App, source: Source, supervisor: Supervisor) -> None:
        self._app = app
        self._source = source
        self._supervisor = supervisor
        self._started_with = app.proxy.config
        self._lock = asyncio.Lock()
        self._next: asyncio.Task[Outcome] | None = None
        self._running: set[asyncio.Task[Outcome]] = set()
        app.lasting.reloads.reload = self.reload

    async def reload(self, cause: str) -> Outcome:
        """Read the configuration again. It goes on if the caller is cancelled."""
        if self._next is None:
            self._next = asyncio.get_running_loop().create_task(self._in_turn(cause), name="reload")
            self._running.add(self._next)
            self._next.add_done_callback(self._running.discard)
        return await asyncio.shield(self._next)

    async def watch(self, applied: list[object]) -> None:
        """Reload whenever a file of the configuration has changed since `applied`, its stamps, and is not being written
        any more."""
        before = applied
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                now = await run_in_thread(partial(self._source.stamps, self._app.proxy.config))
            except StartFailed:  # no thread, for a while
                continue
            if now == before and now != applied:
                applied = now
                await self.reload("a file has changed")
            before = now

    async def close(self) -> None:
        """Break off what is under way."""
        for task in list(self._running):
            task.cancel()
        if self._running:
            await asyncio.wait(self._running)

    async def _in_turn(self, cause: str) -> Outcome:
        async with self._lock:
            self._next = None  # what changes from here on may have been read already
            if self._app.proxy.draining.is_set():
                return Outcome([SHUTTING_DOWN])
            logger.info("reloading the configuration: %s", cause)
            self._supervisor.reloading()
            try:
                outcome = await self._reloaded()
            except Exception as exc:  # of a backend that a module adds, or of the system
                logger.error("the configuration was not reloaded", exc_info=exc)
                outcome = _refused([f"{self._source.name}: {type(exc).__name__}: {exc}"])
            finally:
                self._supervisor.ready()
            self._app.lasting.reloads.problems = outcome.problems
            first = next(iter(outcome.problems), "")
            self._supervisor.remark(first and f"configuration not reloaded: {first}")
            return outcome

    async def _reloaded(self) -> Outcome:
        before = self._app.proxy.config
        try:
            config = await run_in_thread(self._read)
            generation = await self._app.prepared(config)
            if self._app.proxy.draining.is_set():
                await generation.close()
                return Outcome([SHUTTING_DOWN])
        except ConfigError as exc:
            return _refused([self._placed(line) for line in exc.problems])
        replaced = await self._app.apply(generation)
        log.set_level(config.log_level)
        for warning in config.warnings:
            logger.warning("%s", warning)
        if fixed := _fixed(self._started_with, config):
            logger.warning("changed, but requires a restart: %s", ", ".join(fixed))
        changes = {**_changes(before, config), "models_restarted": replaced, "requires_restart": fixed}
        logger.info("the configuration was reloaded%s", _summary(changes))
        for problem in await generation.proxy.inspection.problems():
            logger.warning("%s", problem)
        return Outcome(changes=changes)

    def _read(self) -> Config:
        """Raises: ConfigError, also for an empty file, which is one that is being written, and if the address that is
        listened on must not be with this configuration."""
        config = self._source.read()
        if self._source.is_empty():
            raise ConfigError(["is empty; `{}` has all defaults"])
        server = config.server.model_copy(update={"host": self._started_with.server.host})
        if (problem := exposure(server, self._supervisor.sockets)) is not None:
            raise ConfigError([f"server: {problem}"])
        return config

    def _placed(self, line: str) -> str:
        """A problem with the name of the file, which those of agents and modules do not have."""
        named = line.startswith((f"{self._source.name}: ", "environment: ", "command line: "))
        return line if named else f"{self._source.name}: {line}"


def _refused(problems: Sequence[str]) -> Outcome:
    logger.error("the configuration was not reloaded, the previous one stays in use: %s", "; ".join(problems))
    return Outcome(problems)


def _fixed(started_with: Config, config: Config) -> list[str]:
    """The settings that a restart would change."""
    return [name for name in FIXED if _at(started_with, name) != _at(config, name)]


def _at(config: Config, name: str) -> object:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _changes(before: Config, after: Config) -> dict[str, list[str]]:
    """What was added, removed and changed."""
    changes = {}
    for what, old, new in (
        ("models", before.models | before.virtual, after.models | after.virtual),
        ("remotes", before.remotes, after.remotes),
        ("agents", {agent.name: agent for agent in before.agents}, {agent.name: agent for agent in after.agents}),
    ):
        changes[f"{what}_added"] = [name for name in new if name not in old]
        changes[f"{what}_removed"] = [name for name in old if name not in new]
        changes[f"{what}_changed"] = [name for name in new if name in old and old[name] != new[name]]
    changes["settings_changed"] = list(_settings(before, after))
    return changes


def _settings(before: Section, after: Section, path: str = "") -> Iterator[str]:
    """The paths of all other settings that differ."""
    for name in type(after).model_fields:
        old, new = getattr(before, name), getattr(after, name)
        if f"{path}{name}" in LISTED or old == new:
            continue
        if isinstance(old, Section) and isinstance(new, Section):
            yield from _settings(old, new, f"{path}{name}.")
        else:
            yield f"{path}{name}"


def _summary(changes: Mapping[str, list[str]]) -> str:
    parts = [f"{what.replace('_', ' ')}: {', '.join(names)}" for what, names in changes.items() if names]
    return f" ({'; '.join(parts)})" if parts else ""


def _stamp(path: Path) -> object:
    try:
        found = path.stat()
        return found.st_mtime_ns, found.st_size, found.st_ino
    except OSError:
        return None
