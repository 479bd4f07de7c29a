"""Which agents take part in a chat, and in which order.

First those that always run, in the order of the configuration; then the model's own; then those switched on in this
chat; then those that the request names (header `X-Agents`, body field `agents`); last the slash commands, as typed. An
agent that comes up twice stands where it came up first, with the options of both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pydantic import BaseModel, ValidationError

from agents.base import About
from proxy.chat import ChatRequest, Json
from proxy.chats import Chats, chat_id
from proxy.config import AgentConfig, Config
from proxy.errors import AgentError, BadRequest
from proxy.plugins import Made, Plugin, Plugins
from proxy.slash import MOST, Called, leading_commands, may_call

HEADER = "X-Agents"
FIELD = "agents"
_OFF = {"off", "none", "false", "no"}


@dataclass(slots=True)
class Active:
    """One agent in the chain of one request, and its configuration there. One that is `wanted`, by the request itself
    or by the operator in every request, is not to be left out."""

    plugin: Plugin
    made: Made
    config: BaseModel
    settings: AgentConfig
    wanted: bool


@dataclass(slots=True)
class Picked:
    """What is to be done about a request: run `chain` around it, or answer it with `words` of the proxy's own. `about`
    tells of all agents there are; hardly anybody asks."""

    chat_id: str = ""
    chain: list[Active] = field(default_factory=list)
    words: str | None = None
    about: Callable[[], list[About]] = list


@dataclass(slots=True)
class _Wish:
    """An agent that shall run, with options of the operator's and as the user typed them."""

    plugin: Plugin
    settings: AgentConfig
    options: dict[str, Any] = field(default_factory=dict)
    typed: dict[str, str] = field(default_factory=dict)
    wanted: bool = False


class Chain:
    """Picks the agents of each request."""

    def __init__(self, config: Config, plugins: Plugins) -> None:
        self.plugins = plugins
        self.chats = Chats()
        self._slash = config.slash_commands
        self._of_model = {name: model.agents for name, model in (config.models | config.virtual).items()}
        self._models_have_some = any(self._of_model.values())
        self._by_key = {
            key.lower(): name
            for name, model in (config.models | config.virtual).items()
            for key in (name, *model.aliases)
        }

    def concerns(self, headers: Mapping[str, str], body: Json, asked: object) -> bool:
        """Whether agents may have to do with this request, in whatever API: a cheap look. A False is final."""
        return (
            self.plugins.some_always
            or len(self.chats) > 0
            or FIELD in body
            or HEADER in headers
            or (self._slash and may_call(body))
            or (self._models_have_some and bool(self._of_model.get(self._model(asked))))
        )

    def check_unneeded(self, headers: Mapping[str, str]) -> None:
        """Raises: BadRequest if an endpoint where agents have no say cannot answer the request, as some are required or
        named."""
        if required := [plugin.name for plugin in self.plugins if plugin.settings.required]:
            words = f"this endpoint has no agents, and these are required: {', '.join(required)}"
            raise BadRequest(words, status=403, code="agents_required")
        if named := _named(headers.get(HEADER), None):
            raise BadRequest(f"this endpoint has no agents, such as {named[0][:100]}", param=HEADER)

    def pick(self, headers: Mapping[str, str], field: object, request: ChatRequest, asked: object) -> Picked:
        """The agents of `request`, whose commands are taken out of it. `field` is what stood in its field `agents`,
        `asked` the model's name as the client gave it.

        Raises: BadRequest for an unknown agent that is named outside the text, and for a bad option; AgentError for one
        that is required and broken.
        """
        named = _named(headers.get(HEADER), field)
        of_model = self._of_model.get(self._model(asked), [])
        picked = Picked(chat_id(headers, request))
        wishes: dict[str, _Wish] = {}
        off = named is None or of_model is None
        for plugin in self.plugins:
            if plugin.always and (plugin.settings.required or not off):
                wishes[plugin.name] = _Wish(plugin, plugin.settings, wanted=True)
        if named is not None and of_model is not None:
            self._add_of_model(wishes, of_model)
            called = self._called(request)
            if called is not None and (words := self._control(picked.chat_id, called, wishes, request)) is not None:
                picked.words = words
                return picked
            self._add_switched(wishes, picked.chat_id)
            self._add_named(wishes, named)
            for call in called or ():
                wish = self._add(wishes, self.plugins.commands()[call.command])
                wish.typed |= call.options
                wish.wanted = True
        picked.chain = [_active(wish) for wish in wishes.values() if _usable(wish)]
        picked.about = partial(self._about, set(wishes))
        return picked

    # -- who wants which -------------------------------------------------------------------------------------------

    def _model(self, asked: object) -> str:
        return self._by_key.get(asked.lower().removesuffix(":latest"), "") if isinstance(asked, str) else ""

    def _add(self, wishes: dict[str, _Wish], plugin: Plugin) -> _Wish:
        return wishes.setdefault(plugin.name, _Wish(plugin, plugin.settings))

    def _add_of_model(self, wishes: dict[str, _Wish], entries: Iterable[AgentConfig]) -> None:
        for entry in entries:
            plugin = self.plugins.by_name[entry.name]
            wish = self._add(wishes, plugin)
            wish.options |= entry.options
            if entry.model_fields_set & {"on_error", "timeout_s"} or not plugin.everywhere:
                wish.settings = entry

    def _add_switched(self, wishes: dict[str, _Wish], chat: str) -> None:
        for name, on in self.chats.switched(chat).items() if len(self.chats) else ():
            plugin = self.plugins.by_name.get(name)
            if plugin is None:
                continue
            if on:
                self._add(wishes, plugin)
            elif not plugin.settings.required:
                wishes.pop(name, None)

    def _add_named(self, wishes: dict[str, _Wish], names: Iterable[str]) -> None:
        for name in names:
            plugin = self.plugins.by_name.get(name) or self.plugins.commands().get(name)
            if plugin is None:
                known = ", ".join(sorted(self.plugins.by_name))
                raise BadRequest(f"unknown agent {name[:100]!r}; known agents: {known}", param=FIELD)
            if plugin.made is None:
                raise _unavailable(plugin, "is not available")
            self._add(wishes, plugin).wanted = True

    # -- slash commands --------------------------------------------------------------------------------------------

    def _called(self, request: ChatRequest) -> list[Called] | None:
        """The commands that the user's text begins with, which are taken out of it; None if there are none."""
        text = request.last_user_text
        if not self._slash or not text.startswith("/"):
            return None
        known = {name: _per_call(plugin) for name, plugin in self.plugins.commands().items()}
        called, rest = leading_commands(text, {**known, FIELD: frozenset()})
        if not called:
            return None
        if any(call.command == FIELD for call in called) and (rest or len(called) > 1):
            return None  # a text that happens to begin with the word
        request.last_user_text = rest
        return called

    def _control(
        self, chat: str, called: list[Called], wishes: Mapping[str, _Wish], request: ChatRequest
    ) -> str | None:
        """The answer to commands that are about the chain itself: `/rag on`, `/rag off`, `/agents`."""
        commands = self.plugins.commands()
        word = request.last_user_text.strip()
        if called[0].command != FIELD and word not in ("on", "off"):
            return None
        if any(call.options for call in called):
            words = f"/{called[0].command} {word} takes no options: they count for the message that they stand in"
            raise BadRequest(words, param=next(iter(called[0].options), FIELD))
        if called[0].command != FIELD:
            self.chats.switch(chat, [commands[call.command].name for call in called], word == "on")
        running = dict(wishes)
        self._add_switched(running, chat)
        told = [f"/{call.command} is {word} in this chat." for call in called if call.command != FIELD]
        names = ", ".join(name for name, wish in running.items() if wish.plugin.made is not None) or "none"
        return "\n".join([*told, f"Agents that run in this chat: {names}."])

    def _about(self, running: set[str]) -> list[About]:
        return [
            About(
                plugin.name,
                plugin.command,
                description(plugin.made),
                _described(plugin.made, _per_call(plugin)),
                plugin.name in running,
            )
            for plugin in sorted(self.plugins, key=lambda plugin: plugin.name)
            if plugin.made is not None
        ]


def description(made: Made) -> str:
    """The first paragraph of the agent's docstring, on one line."""
    text = type(made.agent).__doc__ or ""
    return " ".join(text.strip().partition("\n\n")[0].split())


def _per_call(plugin: Plugin) -> frozenset[str]:
    return type(plugin.made.agent).per_call if plugin.made is not None else frozenset()


def _described(made: Made, names: Iterable[str]) -> dict[str, str]:
    fields = type(made.agent).Config.model_fields
    return {name: fields[name].description or "" for name in sorted(names)}


def _named(header: str | None, body: object) -> list[str] | None:
    """The agents that the request names; None if it wants none at all, which either of the two may say."""
    if body is False or (isinstance(body, str) and body.strip().lower() in _OFF):
        return None
    if header is not None and header.strip().lower() in _OFF:
        return None
    if body is not None and body is not True and not isinstance(body, str | list):
        raise BadRequest("agents must be a list of names, or false", param=FIELD)
    given = body.split(",", MOST) if isinstance(body, str) else body if isinstance(body, list) else []
    if len(given) > MOST:
        raise BadRequest(f"agents names over {MOST} agents", param=FIELD)
    if not all(isinstance(name, str) for name in given):
        raise BadRequest("agents must be a list of names, or false", param=FIELD)
    return [name.strip().removeprefix("/") for name in [*(header or "").split(","), *given] if name.strip()]


def _usable(wish: _Wish) -> bool:
    """Whether it can run. Raises: AgentError if it must and cannot."""
    if wish.plugin.made is not None:
        return True
    if wish.plugin.settings.required:
        raise _unavailable(wish.plugin, "is required and not available")
    return False


def _unavailable(plugin: Plugin, words: str) -> AgentError:
    return AgentError(plugin.name, f"{words}; the proxy's /plugins tells why", status=503)


def _active(wish: _Wish) -> Active:
    assert wish.plugin.made is not None
    try:
        config = wish.plugin.config_for({**wish.options, **wish.typed})
    except ValidationError as exc:
        error = exc.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, error["loc"]))
        words = error["msg"].removeprefix("Value error, ").replace("Input should", "should", 1)
        raise BadRequest(f"option {where} of /{wish.plugin.command}: {words}", param=where) from None
    return Active(wish.plugin, wish.plugin.made, config, wish.settings, wish.wanted or wish.settings.required)
