"""The enabled agents: their settings, life cycle and counters."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from llama_smart_proxy.agents.loader import AgentSource, AgentUnusable, discover
from llama_smart_proxy.backends.base import Problem
from llama_smart_proxy.backends.threads import run_in_thread
from llama_smart_proxy.proxy.config import AgentConfig, Config
from llama_smart_proxy.proxy.errors import ConfigError
from llama_smart_proxy.proxy.middleware.functions import functions_of
from llama_smart_proxy.proxy.middleware.loaded import LoadedAgent, first_line

logger = logging.getLogger(__name__)

HELP_AGENT = "help"
"""The agent that is enabled without being configured. It runs only when it is called."""
OWN_COMMAND = "agents"
"""The command of the proxy itself."""
HOOKS = ("on_request", "on_chunk", "on_response", "on_reply", "start", "close")


@dataclass(slots=True)
class Counts:
    """`calls` counts the requests that an agent took part in, `failures` those it failed in, `spent_s` sums the seconds
    that its own code took."""

    calls: int = 0
    failures: int = 0
    spent_s: float = 0.0


@dataclass(eq=False, slots=True)
class Plugin:
    """One enabled agent. `loaded` is None while it cannot be used; `error` is the reason.

    An agent that is enabled for some models only (not `everywhere`) uses the options of the first of them when called
    in a chat with another model. `of_models` are the options that each model has for it.
    """

    name: str
    settings: AgentConfig
    source: AgentSource
    everywhere: bool
    loaded: LoadedAgent | None = None
    error: str | None = None
    stamp: tuple[tuple[str, int], ...] = ()
    of_models: list[dict[str, Any]] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)

    @property
    def always(self) -> bool:
        """Whether it runs in every chat without being called."""
        if not self.everywhere:
            return False
        if self.settings.always is not None or self.settings.required:
            return self.settings.required or bool(self.settings.always)
        return self.loaded is None or type(self.loaded.agent).command is None

    @property
    def command(self) -> str | None:
        return type(self.loaded.agent).command if self.loaded is not None else None

    @property
    def per_call(self) -> frozenset[str]:
        """The options that a command may set."""
        return type(self.loaded.agent).per_call if self.loaded is not None else frozenset()

    def options_with(self, entry: AgentConfig, options: dict[str, Any]) -> dict[str, Any]:
        """The options for a model with this entry; `options` are those for all models, or those of another model."""
        return {**options, **entry.options} if self.everywhere else entry.options

    def config_for(self, options: Mapping[str, Any]) -> BaseModel:
        """Its configuration with these options. Raises: ValidationError."""
        assert self.loaded is not None
        if options == self.settings.options:
            shared: BaseModel = self.loaded.agent.config
            return shared
        return type(self.loaded.agent).Config(**options)

    def load_again(self, before: Plugin) -> None:
        """As `load`, for one that an earlier configuration has. Unless it has changed, it keeps its object, and with
        that what it remembers; one that cannot be loaded any more stays as it was."""
        self.counts = before.counts
        kept = before.loaded
        if (before.source, before.settings.options) != (self.source, self.settings.options):
            kept = None
        if kept is not None and before.error is None and before.stamp == self.source.stamp():
            self.stamp, self.loaded = before.stamp, kept
        else:
            self.load()
            self.loaded = self.loaded or kept

    def load(self) -> None:
        """Import it and create its object; sets `error` on failure. Raises: ValidationError for invalid options."""
        self.stamp = self.source.stamp()
        try:
            cls = self.source.load()
            config = cls.Config(**self.settings.options)
            for options in self.of_models:
                cls.Config(**options)
            self.loaded = LoadedAgent(cls(config), functions_of(cls))
        except ValidationError:
            raise
        except AgentUnusable as exc:
            self.error = str(exc)
        except BaseException as exc:  # agent code may raise anything
            self.error = f"{type(exc).__name__}: {exc}"


@dataclass(slots=True)
class Plugins:
    """All enabled agents, by name and in the order of the configuration.

    `Plugins.of` imports them. One that cannot be imported is kept with its `error`; the others work.
    """

    by_name: dict[str, Plugin] = field(default_factory=dict)
    reload: bool = False
    any_always: bool = False
    """Whether any agent runs without being called; cached, as every request checks it."""
    idle: dict[str, AgentSource] = field(default_factory=dict)
    """The built-in agents that are not enabled, by name."""
    folders: list[Path] = field(default_factory=list)
    """The configured folders of agents."""
    _started: bool = False
    missing: list[str] = field(default_factory=list)
    """Warnings about agents that a configuration of a replaced project names, and that do not exist here."""

    @classmethod
    def of(cls, config: Config, before: Plugins | None = None) -> Plugins:
        """The agents that `config` enables; those that have not changed since the configuration `before` are the same.

        Raises: ConfigError with every unknown name and invalid option.
        """
        found = discover(config.agents_dirs, config.plugins_dir)
        sources = {name: source for name, source in found.items() if not source.off}
        plugins, problems = cls(folders=config.agents_dirs), list[str]()
        known = before.by_name if before is not None else {}
        plugins.reload = before is not None and before.reload
        for path, entry, everywhere in _all_entries(config, [*config.agents, *_unlisted(config, sources)]):
            source = sources.get(entry.name)
            if source is None:
                absent = plugins.missing if config.is_old_form else problems
                absent.append(_absence(path, entry.name, found.get(entry.name), sources))
            elif everywhere and entry.name in plugins.by_name:
                problems.append(f"{path}: the agent {entry.name} is named twice")
            else:
                problems += plugins._enable(entry, source, path, everywhere, known.get(entry.name))
        problems += plugins._resolve_commands()
        plugins._update_any_always()
        plugins.idle = {n: source for n, source in sources.items() if source.is_shipped and n not in plugins.by_name}
        if problems:
            raise ConfigError(problems)
        return plugins

    def __iter__(self) -> Iterator[Plugin]:
        return iter(self.by_name.values())

    def _enable(
        self, entry: AgentConfig, source: AgentSource, path: str, everywhere: bool, before: Plugin | None
    ) -> list[str]:
        """Load the agent if it is not loaded yet, and check the options of this entry. Returns the problems."""
        if not everywhere and entry.always is not None:
            return [f"{path}.{entry.name}.always: belongs in agents: at the top; here it runs in all chats anyway"]
        try:
            plugin = self.by_name.get(entry.name)
            if plugin is None:
                settings = entry if everywhere else AgentConfig(name=entry.name, options=entry.options)
                plugin = self.by_name[entry.name] = Plugin(entry.name, settings, source, everywhere)
                plugin.load() if before is None else plugin.load_again(before)
            if plugin.loaded is not None and not everywhere:
                options = plugin.options_with(entry, plugin.settings.options)
                plugin.config_for(options)
                plugin.of_models.append(options)
        except ValidationError as exc:
            return option_problems(exc, f"{path}.{entry.name}")
        return []

    def _resolve_commands(self) -> list[str]:
        """Make commands unique: a built-in agent is dropped in favour of the operator's own, as with names, unless it
        is configured for a model. Returns the problems with all other duplicates."""
        owners: dict[str, Plugin] = {}
        problems = []
        for plugin in sorted(self, key=lambda plugin: plugin.source.is_shipped):
            owner = owners.setdefault(plugin.command, plugin) if plugin.command is not None else plugin
            if plugin.command == OWN_COMMAND:
                problems.append(f"agents: {plugin.name} and the proxy itself both have the command /{plugin.command}")
            elif owner is not plugin and plugin.source.is_shipped and not plugin.of_models:
                logger.warning("the agent %s is left out: /%s calls %s", plugin.name, plugin.command, owner.name)
                del self.by_name[plugin.name]
            elif owner is not plugin:
                problems.append(f"agents: {plugin.name} and {owner.name} both have the command /{plugin.command}")
        return problems

    def _update_any_always(self) -> None:
        self.any_always = any(plugin.always for plugin in self)

    def commands(self) -> dict[str, Plugin]:
        """The agents that can be called, by their command."""
        return {plugin.command: plugin for plugin in self if plugin.command is not None}

    def could_be_enabled(self, command: str) -> bool:
        """Whether this is the command of a built-in agent that is not enabled. Such an agent has it as its name."""
        source = self.idle.get(command)
        if source is None or command in self.commands():
            return False
        if source.load().command != command:  # an agent without a command; checked once
            del self.idle[command]
        return command in self.idle

    @property
    def broken(self) -> list[str]:
        return [plugin.name for plugin in self if plugin.error is not None]

    async def problems(self) -> list[Problem]:
        """Missing folders, and agents that cannot be loaded; the proxy serves without them."""
        found = await run_in_thread(partial(_missing, self.folders)) if self.folders else []
        unusable = [plugin for plugin in self if plugin.error is not None]
        found += [Problem("agents", f"{item.name} cannot be loaded: {item.error}") for item in unusable]
        return found + [
            Problem(where, message) for where, _, message in (line.partition(": ") for line in self.missing)
        ]

    async def start(self) -> None:
        """Start those that have not been started for an earlier configuration."""
        for plugin in self:
            if plugin.loaded is not None and plugin.loaded.closed:  # its file has changed just now
                plugin.loaded = None
                plugin.load()
        self._started = True
        for plugin in self:  # before any is awaited: `close` gives back all of them
            if plugin.loaded is not None:
                plugin.loaded.holders += 1
        for plugin in self:
            if plugin.loaded is not None:
                await _start(plugin)
            if plugin.error is not None:
                logger.error("the agent %s is not available: %s", plugin.name, plugin.error)

    async def close(self) -> None:
        """Close those that no other configuration has."""
        for plugin in self:
            if plugin.loaded is not None:
                plugin.loaded.holders -= self._started
                if plugin.loaded.holders <= 0:
                    await plugin.loaded.close(plugin.name)
        self.by_name.clear()  # their objects may be large, and the configuration itself is let go later
        self._started = False

    async def refresh(self) -> None:
        """If `reload` is set, reload agents whose files have changed. An agent that cannot be reloaded stays as it was;
        requests in progress keep the object they began with."""
        for plugin in self if self.reload else ():
            if plugin.source.stamp() != plugin.stamp:
                await self._reload(plugin)

    async def _reload(self, plugin: Plugin) -> None:
        fresh = Plugin(plugin.name, plugin.settings, plugin.source, plugin.everywhere, of_models=plugin.of_models)
        plugin.stamp = plugin.source.stamp()  # before the first await, so that concurrent requests do not reload it too
        try:
            fresh.load()
        except ValidationError as exc:
            fresh.error = first_line(exc)
        if fresh.loaded is not None:
            await _start(fresh)
        if fresh.loaded is None or fresh.error is not None:
            plugin.error = fresh.error
            state = "the previous version stays in use" if plugin.loaded is not None else "it does not run"
            logger.error("the agent %s was changed, but cannot be loaded; %s: %s", plugin.name, state, fresh.error)
            return
        old, plugin.loaded, plugin.error = plugin.loaded, fresh.loaded, None
        fresh.loaded.holders += 1
        self._update_any_always()
        logger.info("the agent %s was reloaded", plugin.name)
        if old is not None:
            await old.retire(plugin.name)


def _missing(folders: list[Path]) -> list[Problem]:
    return [Problem("agents_dirs", f"{folder}: no such folder") for folder in folders if not folder.is_dir()]


def _absence(path: str, name: str, disabled: AgentSource | None, known: Iterable[str]) -> str:
    """Why the agent that is named at `path` cannot be enabled."""
    if disabled is not None:
        return f"{path}: the agent {name} is not enabled in {disabled.path}/config.json"
    return f"{path}: unknown agent {name}; known agents: {', '.join(sorted(known))}"


def _unlisted(config: Config, sources: Mapping[str, AgentSource]) -> list[AgentConfig]:
    """The agents that are enabled although `agents` does not list them: all of the operator's own if the configuration
    has no such list, and always the plugins of the replaced projects."""
    implicit = {config.plugins_dir, *config.enabled_dirs}
    listed = {entry.name for entry in config.agents}
    return [
        AgentConfig(name=name)
        for name, source in sources.items()
        if source.path is not None
        and name not in listed
        and ("agents" not in config.model_fields_set or source.path.parent in implicit)
    ]


def _all_entries(config: Config, entries: list[AgentConfig]) -> Iterator[tuple[str, AgentConfig, bool]]:
    """The path in the configuration of each agent's entry, the entry, and whether it applies to all models."""
    for position, entry in enumerate(entries):
        yield f"agents.{position}", entry, True
    if all(entry.name != HELP_AGENT for entry in entries):
        yield "agents", AgentConfig(name=HELP_AGENT), True
    for name, model in (config.models | config.virtual).items():
        for position, entry in enumerate(model.agents or ()):
            yield f"models.{name}.agents.{position}", entry, False


def option_problems(exc: ValidationError, path: str) -> list[str]:
    """Invalid options, each as `path.option: problem`."""
    problems = []
    for error in exc.errors(include_url=False, include_input=False):
        where = ".".join([path, *map(str, error["loc"])])
        problem = "unknown option" if error["type"] == "extra_forbidden" else error["msg"].removeprefix("Value error, ")
        problems.append(f"{where}: {problem}")
    return problems


async def _start(plugin: Plugin) -> None:
    assert plugin.loaded is not None
    if (exc := await plugin.loaded.start()) is not None:
        logger.debug("start of %s", plugin.name, exc_info=exc)
        plugin.error = f"start: {first_line(exc)}"
        plugin.loaded = None
