"""The agents of this proxy: which are enabled, with which settings, and how they are doing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ValidationError

from llama_smart_proxy.agents.base import Agent
from llama_smart_proxy.agents.loader import Broken, Place, discover
from llama_smart_proxy.proxy.config import AgentConfig, Config
from llama_smart_proxy.proxy.errors import ConfigError

logger = logging.getLogger(__name__)

ALWAYS_THERE = "help"
"""The agent that is enabled unasked: it only answers when it is called."""
OWN_COMMAND = "agents"
"""The command of the proxy itself."""
START_S = 60.0
"""Seconds that an agent may take to start, and to close; one that needs longer is broken."""
HOOKS = ("on_request", "on_chunk", "on_response", "start", "close")


@dataclass(eq=False, slots=True)
class Made:
    """One agent object, of one import of its module. `users` are the requests that it takes part in now."""

    agent: Agent
    users: int = 0
    retired: bool = False

    @property
    def rewrites(self) -> bool:
        """Whether it has a hook for answers."""
        cls = type(self.agent)
        return cls.on_chunk is not Agent.on_chunk or cls.on_response is not Agent.on_response


@dataclass(eq=False, slots=True)
class Plugin:
    """One enabled agent. `made` is None while it cannot be used, for the reason `error`. `calls` are the requests it
    took part in, `failures` those it failed in, `spent_s` the seconds of its own that it added to all of them.

    One that is not enabled `everywhere`, but for some models, has the options of the first of them where it is called
    in a chat with another one. `of_models` are the options that each model has for it.
    """

    name: str
    settings: AgentConfig
    place: Place
    everywhere: bool
    made: Made | None = None
    error: str | None = None
    stamp: tuple[tuple[str, int], ...] = ()
    of_models: list[dict[str, Any]] = field(default_factory=list)
    calls: int = 0
    failures: int = 0
    spent_s: float = 0.0

    @property
    def always(self) -> bool:
        """Whether it runs in every chat without being called."""
        if not self.everywhere:
            return False
        if self.settings.always is not None or self.settings.required:
            return self.settings.required or bool(self.settings.always)
        return self.made is None or type(self.made.agent).command is None

    @property
    def command(self) -> str | None:
        return type(self.made.agent).command if self.made is not None else None

    def options_with(self, entry: AgentConfig, options: dict[str, Any]) -> dict[str, Any]:
        """What becomes of `options` where a model has this entry: they are those for all models, or another one's."""
        return {**options, **entry.options} if self.everywhere else entry.options

    def config_for(self, options: Mapping[str, Any]) -> BaseModel:
        """Its configuration with these options. Raises: ValidationError."""
        assert self.made is not None
        if options == self.settings.options:
            shared: BaseModel = self.made.agent.config
            return shared
        return type(self.made.agent).Config(**options)

    def load(self) -> None:
        """Import it and make its object; what stands in the way is in `error`. Raises: ValidationError for options."""
        self.stamp = self.place.stamp()
        try:
            cls = self.place.load()
            config = cls.Config(**self.settings.options)
            for options in self.of_models:
                cls.Config(**options)
            self.made = Made(cls(config))
        except ValidationError:
            raise
        except Broken as exc:
            self.error = str(exc)
        except Exception as exc:  # its `__init__` is not ours, and may raise anything
            self.error = f"{type(exc).__name__}: {exc}"


@dataclass(slots=True)
class Plugins:
    """All enabled agents, by name and in the order of the configuration.

    `Plugins.of` imports them. One that cannot be imported is kept, broken, and the rest serve.
    """

    by_name: dict[str, Plugin] = field(default_factory=dict)
    reload: bool = False
    some_always: bool = False
    """Whether any agent runs uncalled; asked for every request."""

    @classmethod
    def of(cls, config: Config) -> Plugins:
        """Those that `config` names. Raises: ConfigError with every unknown name and bad option."""
        found = discover(config.agents_dirs, config.plugins_dir)
        places = {name: place for name, place in found.items() if not place.off}
        plugins, problems = cls(), list[str]()
        for path, entry, everywhere in _all_entries(config, [*config.agents, *_unlisted(config, places)]):
            place = places.get(entry.name)
            if place is None and entry.name in found:
                problems.append(
                    f"{path}: the agent {entry.name} is not enabled in {found[entry.name].path}/config.json"
                )
            elif place is None:
                known = ", ".join(sorted(places))
                problems.append(f"{path}: unknown agent {entry.name}; known agents: {known}")
            elif everywhere and entry.name in plugins.by_name:
                problems.append(f"{path}: the agent {entry.name} is named twice")
            else:
                problems += plugins._enable(entry, place, path, everywhere)
        problems += plugins._settle_commands()
        plugins._note_always()
        if problems:
            raise ConfigError(problems)
        return plugins

    def __iter__(self) -> Iterator[Plugin]:
        return iter(self.by_name.values())

    def _enable(self, entry: AgentConfig, place: Place, path: str, everywhere: bool) -> list[str]:
        """Load the agent, unless that was done, and check the options of this entry; the problems with them."""
        if not everywhere and entry.always is not None:
            return [f"{path}.{entry.name}.always: belongs in agents: at the top; here it runs in all chats anyway"]
        try:
            plugin = self.by_name.get(entry.name)
            if plugin is None:
                settings = entry if everywhere else AgentConfig(name=entry.name, options=entry.options)
                plugin = self.by_name[entry.name] = Plugin(entry.name, settings, place, everywhere)
                plugin.load()
            if plugin.made is not None and not everywhere:
                options = plugin.options_with(entry, plugin.settings.options)
                plugin.config_for(options)
                plugin.of_models.append(options)
        except ValidationError as exc:
            return option_problems(exc, f"{path}.{entry.name}")
        return []

    def _settle_commands(self) -> list[str]:
        """Have each command belong to one agent. A shipped one gives way to the operator's own, as with names, unless
        some model requires it; the problems with all others."""
        owners: dict[str, Plugin] = {}
        wrong = []
        for plugin in sorted(self, key=lambda plugin: plugin.place.is_shipped):
            owner = owners.setdefault(plugin.command, plugin) if plugin.command is not None else plugin
            if plugin.command == OWN_COMMAND:
                wrong.append(f"agents: {plugin.name} and the proxy itself both have the command /{plugin.command}")
            elif owner is not plugin and plugin.place.is_shipped and not plugin.of_models:
                logger.warning("the agent %s is left out: /%s calls %s", plugin.name, plugin.command, owner.name)
                del self.by_name[plugin.name]
            elif owner is not plugin:
                wrong.append(f"agents: {plugin.name} and {owner.name} both have the command /{plugin.command}")
        return wrong

    def _note_always(self) -> None:
        self.some_always = any(plugin.always for plugin in self)

    def commands(self) -> dict[str, Plugin]:
        """The agents that can be called, by their command."""
        return {plugin.command: plugin for plugin in self if plugin.command is not None}

    @property
    def broken(self) -> list[str]:
        return [plugin.name for plugin in self if plugin.error is not None]

    async def start(self) -> None:
        for plugin in self:
            if plugin.made is not None:
                await _start(plugin)
            if plugin.error is not None:
                logger.error("the agent %s is not available: %s", plugin.name, plugin.error)

    async def close(self) -> None:
        for plugin in self:
            if plugin.made is not None:
                await _close(plugin.name, plugin.made)

    async def refresh(self) -> None:
        """Load anew what was saved since it was loaded, if `reload` is set. What cannot be loaded now leaves the agent
        as it was; requests under way keep the object they began with."""
        for plugin in self if self.reload else ():
            if plugin.place.stamp() != plugin.stamp:
                await self._reload(plugin)

    async def _reload(self, plugin: Plugin) -> None:
        fresh = Plugin(plugin.name, plugin.settings, plugin.place, plugin.everywhere, of_models=plugin.of_models)
        plugin.stamp = plugin.place.stamp()  # before anything is awaited: others need not do it too
        try:
            fresh.load()
        except ValidationError as exc:
            fresh.error = _first_line(exc)
        if fresh.made is not None:
            await _start(fresh)
        if fresh.made is None or fresh.error is not None:
            plugin.error = fresh.error
            state = "it goes on as it was" if plugin.made is not None else "it does not run"
            logger.error("the agent %s was saved, but cannot be loaded; %s: %s", plugin.name, state, fresh.error)
            return
        old, plugin.made, plugin.error = plugin.made, fresh.made, None
        self._note_always()
        logger.info("the agent %s was loaded anew", plugin.name)
        if old is not None:
            old.retired = True
            if not old.users:
                await _close(plugin.name, old)

    async def release(self, name: str, made: Made) -> None:
        """A request is done with `made`."""
        made.users -= 1
        if made.retired and not made.users:
            await _close(name, made)


def _unlisted(config: Config, places: Mapping[str, Place]) -> list[AgentConfig]:
    """Those that are enabled though `agents` does not name them: all of the operator's where there is no such list;
    plugins of the replaced projects, as they were there."""
    by_itself = {config.plugins_dir, *config.enabled_dirs}
    listed = {entry.name for entry in config.agents}
    return [
        AgentConfig(name=name)
        for name, place in places.items()
        if place.path is not None
        and name not in listed
        and ("agents" not in config.model_fields_set or place.path.parent in by_itself)
    ]


def _all_entries(config: Config, entries: list[AgentConfig]) -> Iterator[tuple[str, AgentConfig, bool]]:
    """Where each agent is named, its entry, and whether it is enabled for all models."""
    for position, entry in enumerate(entries):
        yield f"agents.{position}", entry, True
    if all(entry.name != ALWAYS_THERE for entry in entries):
        yield "agents", AgentConfig(name=ALWAYS_THERE), True
    for name, model in (config.models | config.virtual).items():
        for position, entry in enumerate(model.agents or ()):
            yield f"models.{name}.agents.{position}", entry, False


def option_problems(exc: ValidationError, path: str) -> list[str]:
    """Bad options as `path.option: problem`."""
    problems = []
    for error in exc.errors(include_url=False, include_input=False):
        where = ".".join([path, *map(str, error["loc"])])
        problem = "unknown option" if error["type"] == "extra_forbidden" else error["msg"].removeprefix("Value error, ")
        problems.append(f"{where}: {problem}")
    return problems


async def _start(plugin: Plugin) -> None:
    assert plugin.made is not None
    try:
        async with asyncio.timeout(START_S):
            await plugin.made.agent.start()
    except BaseException as exc:  # an agent's own failure must not be the proxy's, be it a BaseException
        _unless_cancelled(exc)
        logger.debug("start of %s", plugin.name, exc_info=exc)
        plugin.error = f"start: {_first_line(exc)}"
        plugin.made = None


async def _close(name: str, made: Made) -> None:
    try:
        async with asyncio.timeout(START_S):
            await made.agent.close()
    except BaseException as exc:  # as above
        _unless_cancelled(exc)
        logger.error("the agent %s did not close properly: %s", name, _first_line(exc), exc_info=exc)


def _unless_cancelled(exc: BaseException) -> None:
    """Raises: `exc`, if it is the cancellation of the task that runs the agent, rather than the agent's invention."""
    task = asyncio.current_task()
    if isinstance(exc, asyncio.CancelledError) and task is not None and task.cancelling():
        raise exc


def _first_line(exc: BaseException) -> str:
    return f"{type(exc).__name__}: {exc}".partition("\n")[0].rstrip(": ")
