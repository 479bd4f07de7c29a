"""Selects the agents of a request, and their order.

The order is: agents that always run, as configured; the model's own agents; those switched on in this chat; those
named by the request (header `X-Agents`, body field `agents`); slash commands, as typed. An agent that occurs twice
keeps its first position, with the options of both. Required agents cannot be switched off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from multidict import CIMultiDictProxy
from pydantic import BaseModel, ValidationError

from llama_smart_proxy.agents.base import About
from llama_smart_proxy.backends.names import key_of
from llama_smart_proxy.proxy.chat import ChatRequest, Json
from llama_smart_proxy.proxy.config import AgentConfig, Config, ModelConfig
from llama_smart_proxy.proxy.dialects.base import ClientCodec
from llama_smart_proxy.proxy.errors import AgentError, BadRequest
from llama_smart_proxy.proxy.middleware.chats import CHAT_ID_HEADERS, Chats, Identity, is_named
from llama_smart_proxy.proxy.middleware.commands import Called, Commands
from llama_smart_proxy.proxy.middleware.history import (
    RUNNING,
    UNIDENTIFIED,
    History,
    may_hold_commands,
    read_history,
)
from llama_smart_proxy.proxy.middleware.loaded import LoadedAgent
from llama_smart_proxy.proxy.middleware.plugins import HELP_AGENT, Plugin, Plugins
from llama_smart_proxy.proxy.middleware.slash import MAX_ITEMS
from llama_smart_proxy.proxy.models.router import names_by_key

HEADER = "X-Agents"
FIELD = "agents"
_OFF = {"off", "none", "false", "no"}
"""Values that disable all optional agents, in place of names."""


@dataclass(slots=True)
class ActiveAgent:
    """One agent in the chain of one request, with its configuration there. `explicit`: the request itself, or the
    operator for every request, selected it, so another agent's `leave_out` has no effect on it."""

    plugin: Plugin
    loaded: LoadedAgent
    config: BaseModel
    settings: AgentConfig
    explicit: bool


@dataclass(slots=True)
class Selection:
    """How to handle a request: run `chain` around it, or answer it with the proxy's own text `reply`; or neither, so
    that no agent touches it. `called` are the slash commands in its text. `about` returns the descriptions of all
    agents, computed on demand."""

    chat_id: str = ""
    chain: list[ActiveAgent] = field(default_factory=list)
    reply: str | None = None
    called: Called | None = None
    about: Callable[[], list[About]] = list

    def take_commands(self, request: ChatRequest) -> None:
        """Remove the slash commands from the text of the decoded request."""
        if self.called is not None and request.last_user_text == self.called.text:
            request.last_user_text = self.called.rest


@dataclass(slots=True)
class _Candidate:
    """An agent selected for a request. `options` are the operator's, `typed` those of the slash command, unparsed."""

    plugin: Plugin
    settings: AgentConfig
    options: dict[str, Any]
    typed: dict[str, str] = field(default_factory=dict)
    explicit: bool = False

    @classmethod
    def of(cls, plugin: Plugin) -> _Candidate:
        return cls(plugin, plugin.settings, plugin.settings.options)

    def override(self, entry: AgentConfig) -> None:
        """Apply a model's settings and options for the agent on top of those for all models."""
        given = entry.model_fields_set & {"on_error", "timeout_s", "required"}
        self.settings = self.settings.model_copy(update={name: getattr(entry, name) for name in given})
        self.options = self.plugin.options_with(entry, self.options)


class Chain:
    """Selects the agents of each request. A chain that is `limited` calls no others than those named there, as if there
    were none; those that run without being called do so."""

    def __init__(self, config: Config, plugins: Plugins, chats: Chats) -> None:
        self.plugins = plugins
        self._allowed: frozenset[str] | None = None
        self.chats = chats
        self._slash = config.slash_commands
        models = config.models | config.virtual
        self._barred = {name for name, model in models.items() if model.agents is None}
        names = names_by_key(models)
        self._names = {key_of(key): name for key, name in names.items()} | names
        self._of_model = {name: self._entries(model, models) for name, model in models.items()}
        self._models_have_some = any(self._of_model.values())

    def limited(self, agents: frozenset[str] | None) -> Chain:
        """The same chain for a client that may call these agents; None: all."""
        if agents is None:
            return self
        chain = copy(self)
        chain._allowed = agents | {HELP_AGENT}
        return chain

    def may_call(self, name: str) -> bool:
        """Whether this agent can be called."""
        return self._allowed is None or name in self._allowed

    def may_apply(self, headers: Mapping[str, str], body: Json, model: str, codec: ClientCodec) -> bool:
        """Whether agents may apply to this request, in any API. Cheap; True may be a false positive, False is exact."""
        return (
            self.plugins.any_always
            or (len(self.chats) > 0 and is_named(headers))
            or FIELD in body
            or HEADER in headers
            or (self._slash and may_hold_commands(codec, body))
            or (self._models_have_some and bool(self._of_model.get(self._name(model))))
        )

    def check_none_required(self, headers: CIMultiDictProxy[str], model: str) -> None:
        """For endpoints where agents do not run. Raises: BadRequest if the request requires or names an agent."""
        if required := [name for name, candidate in self._default(model).items() if candidate.settings.required]:
            message = f"agents do not run at this endpoint, and these are required: {', '.join(required)}"
            raise BadRequest(message, status=403, code="agents_required")
        if named := _named(_header(headers), None):
            message = f"agents do not run at this endpoint, so it cannot run {named[0][:100]}"
            raise BadRequest(message, param=HEADER)

    def select(
        self, headers: CIMultiDictProxy[str], body: Json, model: str, codec: ClientCodec, *, background: bool = False
    ) -> Selection:
        """The agents of the request with the undecoded `body`, whose field `agents` is removed, and whose earlier
        messages lose what slash commands left there (`read_history`). `model` is the name of the model. A `background`
        prompt of the client, about the chat, has no agents that are there to be called in the chat.

        Raises: BadRequest for an unknown agent named outside the text, and for an invalid option; AgentError for a
        required agent that could not be loaded.
        """
        named = _named(_header(headers), body.pop(FIELD, None))
        chat = Identity.of(headers, codec.beginning(body), resent=codec.resends_chat)
        selection = Selection(chat.id)
        candidates = self._default(model)
        if named is None or self._name(model) in self._barred:
            candidates = {name: candidate for name, candidate in candidates.items() if candidate.settings.required}
        else:
            commands = Commands(self.plugins, self._allowed) if self._slash and may_hold_commands(codec, body) else None
            history = read_history(codec, body, commands) if commands is not None else History()
            if history.messages is not None:
                body[codec.messages_field] = history.messages
            self._add_switched(candidates, self.chats.switched(chat) | history.switches)
            if commands is not None:
                text = codec.user_text(body)
                called = selection.called = commands.called(text)
                selection.reply = commands.idle(called, text) or self._control(chat, called, commands, candidates)
                if selection.reply is not None:
                    return selection
            self._add_named(candidates, named)
            if commands is not None and selection.called is not None:
                self._add_called(candidates, selection.called, commands)
        chain = (_active(candidate) for candidate in candidates.values() if _usable(candidate))
        selection.chain = [active for active in chain if not background or _runs_behind(active)]
        selection.about = partial(self._about, set(candidates))
        return selection

    def partners(self, models: Sequence[str]) -> list[tuple[Sequence[str], bool]]:
        """For each of the models: the names of the agents that run in every chat with it unless switched off, and
        whether `/help` is answered there."""
        names = [self._name(model) for model in models]
        found = {name: self._partners(name) for name in set(names)}
        return [found[name] for name in names]

    def _partners(self, model: str) -> tuple[Sequence[str], bool]:
        agents, barred = self._default(model), model in self._barred
        names = [name for name, agent in agents.items() if agent.settings.required or not barred]
        return names, self._slash and not barred and HELP_AGENT in self.plugins.commands()

    # -- sources of candidates --------------------------------------------------------------------------------------

    def _name(self, model: str) -> str:
        """The model's name in the configuration, of which Ollama accepts several spellings; "" if it is not there."""
        return self._names.get(model.lower()) or self._names.get(key_of(model)) or ""

    def _entries(self, model: ModelConfig, models: Mapping[str, ModelConfig]) -> list[AgentConfig]:
        """The model's configured agents; a virtual model inherits those that its base model requires."""
        base = models.get(self._name(model.model or ""))
        required = [entry for entry in base.agents or () if entry.required] if base is not None else []
        return [*required, *(model.agents or ())]

    def _default(self, model: str) -> dict[str, _Candidate]:
        """The agents that run in every chat with this model unless switched off, by name."""
        candidates: dict[str, _Candidate] = {}
        for plugin in self.plugins:
            if plugin.always:
                self._add(candidates, plugin).explicit = True
        for entry in self._of_model.get(self._name(model), ()):
            self._add(candidates, self.plugins.by_name[entry.name]).override(entry)
        return candidates

    def _add(self, candidates: dict[str, _Candidate], plugin: Plugin) -> _Candidate:
        return candidates.setdefault(plugin.name, _Candidate.of(plugin))

    def _add_switched(self, candidates: dict[str, _Candidate], switches: Mapping[str, bool]) -> None:
        for name, on in switches.items():
            if name not in self.plugins.by_name or not self.may_call(name):
                continue
            if on:
                self._add(candidates, self.plugins.by_name[name])
            elif name in candidates and not candidates[name].settings.required:
                del candidates[name]

    def _add_called(self, candidates: dict[str, _Candidate], called: Called, commands: Commands) -> None:
        for command, plugin in zip(called.commands, commands.plugins(called.commands), strict=True):
            candidate = self._add(candidates, plugin)
            candidate.typed |= command.options
            candidate.explicit = True

    def _add_named(self, candidates: dict[str, _Candidate], names: Iterable[str]) -> None:
        for name in names:
            plugin = self.plugins.by_name.get(name) or self.plugins.commands().get(name.lower())
            if plugin is None or not self.may_call(plugin.name):
                known = ", ".join(sorted(filter(self.may_call, self.plugins.by_name)))
                raise BadRequest(f"unknown agent {name[:100]!r}; known agents: {known}", param=FIELD)
            if plugin.loaded is None:
                raise _unavailable(plugin, "is not available")
            self._add(candidates, plugin).explicit = True

    def _control(
        self, chat: Identity, called: Called | None, commands: Commands, candidates: dict[str, _Candidate]
    ) -> str | None:
        """Execute `/rag on`, `/rag off` or `/agents`, in a chat that runs `candidates`, and return the answer; None if
        nothing of that is called."""
        if called is None or called.action is None:
            return None
        if any(command.options for command in called.commands):
            message = f"/{called.commands[0].name} {called.action} takes no options; give them with each message"
            raise BadRequest(message, param=next(iter(called.commands[0].options), FIELD))
        switched, on = commands.plugins(called.commands), bool(called.switch)
        if switched and not chat.known:
            return f"{UNIDENTIFIED}send the header {CHAT_ID_HEADERS[1]} to switch agents on or off."
        lines = []
        for plugin in switched:
            if not on and plugin.name in candidates and candidates[plugin.name].settings.required:
                lines.append(f"/{plugin.command} is required, and stays on.")
                continue
            self.chats.switch(chat, plugin.name, on)
            self._add_switched(candidates, {plugin.name: on})
            lines.append(f"/{plugin.command} is {called.action} in this chat.")
        names = ", ".join(name for name, candidate in candidates.items() if candidate.plugin.loaded is not None)
        return "\n".join([*lines, f"{RUNNING}{names or 'none'}."])

    def _about(self, running: set[str]) -> list[About]:
        return [
            About(
                plugin.name,
                plugin.command,
                description(plugin.loaded),
                _described(plugin.loaded, plugin.per_call),
                plugin.name in running,
            )
            for plugin in sorted(self.plugins, key=lambda plugin: plugin.name)
            if plugin.loaded is not None and self.may_call(plugin.name)
        ]


def description(loaded: LoadedAgent) -> str:
    """The first paragraph of the agent's docstring, on one line."""
    text = type(loaded.agent).__doc__ or ""
    return " ".join(text.strip().partition("\n\n")[0].split())


def _described(loaded: LoadedAgent, names: Iterable[str]) -> dict[str, str]:
    fields = type(loaded.agent).Config.model_fields
    return {name: fields[name].description or "" for name in sorted(names)}


def _header(headers: CIMultiDictProxy[str]) -> str:
    """The names in all `X-Agents` headers, joined by commas."""
    return ",".join(headers.getall(HEADER, ()))


def _named(header: str, body: object) -> list[str] | None:
    """The agents that the request names; None if the header or the body field disables agents."""
    if body is False:
        return None
    if body is not None and body is not True and not isinstance(body, str | list):
        raise BadRequest("agents must be a list of names, or false", param=FIELD)
    given = body.split(",", MAX_ITEMS) if isinstance(body, str) else body if isinstance(body, list) else []
    if len(given) > MAX_ITEMS:
        raise BadRequest(f"agents names over {MAX_ITEMS} agents", param=FIELD)
    if not all(isinstance(name, str) for name in given):
        raise BadRequest("agents must be a list of names, or false", param=FIELD)
    names = [name.strip() for name in [*header.split(","), *given] if name.strip()]
    return None if any(name.lower() in _OFF for name in names) else [name.removeprefix("/") for name in names]


def _runs_behind(active: ActiveAgent) -> bool:
    """Whether the agent also runs for a prompt that no person wrote."""
    return active.plugin.command is None or active.explicit


def _usable(candidate: _Candidate) -> bool:
    """Whether the agent is loaded. Raises: AgentError if it is not, and is required."""
    if candidate.plugin.loaded is not None:
        return True
    if candidate.settings.required:
        raise _unavailable(candidate.plugin, "is required and not available")
    return False


def _unavailable(plugin: Plugin, problem: str) -> AgentError:
    return AgentError(plugin.name, f"{problem}; the proxy's /plugins shows the reason", status=503)


def _active(candidate: _Candidate) -> ActiveAgent:
    assert candidate.plugin.loaded is not None
    try:
        options = {**candidate.options, **candidate.typed} if candidate.typed else candidate.options
        config = candidate.plugin.config_for(options)
    except ValidationError as exc:
        error = exc.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, error["loc"]))
        problem = error["msg"].removeprefix("Value error, ").replace("Input should", "should", 1)
        option = f"option {where} of" if where else "options of"
        raise BadRequest(f"{option} /{candidate.plugin.command}: {problem}", param=where or None) from None
    explicit = candidate.explicit or candidate.settings.required
    return ActiveAgent(candidate.plugin, candidate.plugin.loaded, config, candidate.settings, explicit)
