"""What a user's text calls with slash commands: agents, or the chain itself (`/rag on`, `/agents`). No I/O."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from llama_smart_proxy.proxy.middleware.plugins import HELP_AGENT, Plugin, Plugins
from llama_smart_proxy.proxy.middleware.slash import Command, first_command, leading_commands

LIST = "agents"
"""The command that lists the agents of the chat."""
_SWITCHES = {"on": True, "off": False}


@dataclass(frozen=True, slots=True)
class Called:
    """The slash commands that `text` begins with, and the rest of it."""

    commands: list[Command]
    rest: str
    text: str

    @property
    def action(self) -> str | None:
        """`on`, `off` or `agents` if the commands control the chain itself; otherwise None."""
        if self.commands[0].name == LIST:
            return LIST
        text = self.rest.strip()
        return text if text in _SWITCHES and all(command.name != HELP_AGENT for command in self.commands) else None

    @property
    def is_help(self) -> bool:
        """Whether it is a question to the agent `help`."""
        return self.commands[0].name == HELP_AGENT

    @property
    def switch(self) -> bool | None:
        """True for `/rag on`, False for `/rag off`; otherwise None."""
        return _SWITCHES.get(self.action or "")


class Commands:
    """The commands of the agents that are enabled at this moment, if `allowed` names some only of those."""

    def __init__(self, plugins: Plugins, allowed: Collection[str] | None = None) -> None:
        self._plugins = plugins
        every = plugins.commands()
        self._by_command = {
            command: plugin for command, plugin in every.items() if allowed is None or plugin.name in allowed
        }
        self._known = {name: plugin.per_call for name, plugin in self._by_command.items()} | {LIST: frozenset()}

    def called(self, text: str) -> Called | None:
        """The slash commands that the user's text begins with; None if there are none."""
        if not text.startswith("/"):
            return None
        known = self._known
        if HELP_AGENT in known and leading_commands(text, {HELP_AGENT: known[HELP_AGENT]})[0]:
            known = {HELP_AGENT: known[HELP_AGENT]}  # further commands are the topic of the help, not calls
        commands, rest = leading_commands(text, known)
        if not commands:
            return None
        if any(command.name == LIST for command in commands) and (rest or len(commands) > 1):
            return None  # ordinary text that begins with "/agents"
        return Called(commands, rest, text)

    def plugins(self, commands: Iterable[Command]) -> list[Plugin]:
        """The agents that these commands call."""
        return [self._by_command[command.name] for command in commands if command.name != LIST]

    def idle(self, called: Called | None, text: str) -> str | None:
        """How to enable the agent whose command is the next word; None if that is no agent that could be enabled."""
        rest = called.rest if called is not None else text
        command = first_command(rest)
        if called is not None and called.is_help:
            return None  # the topic of the help
        if command is None or not self._plugins.could_be_enabled(command):
            return None
        return (
            f"The agent /{command} is part of this proxy, but it is not enabled. To enable it, add `{command}` to "
            "`agents:` in the configuration of the proxy, and restart the proxy. No model was asked."
        )
