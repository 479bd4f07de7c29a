"""Which agents take part in a chat, and in which order.

First those that always run, in the order of the configuration; then the model's own; then those switched on in this
chat; then those that the request names (header `X-Agents`, body field `agents`); last the slash commands, as typed. An
agent that comes up twice stands where it came up first, with the options of both. Those that are required run whatever
anybody says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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
from llama_smart_proxy.proxy.middleware.chats import CHAT_ID_HEADERS, Chats, chat_id, is_named
from llama_smart_proxy.proxy.middleware.plugins import ALWAYS_THERE, Made, Plugin, Plugins
from llama_smart_proxy.proxy.middleware.slash import MOST, Called, leading_commands
from llama_smart_proxy.proxy.models.router import names_by_key

HEADER = "X-Agents"
FIELD = "agents"
_OFF = {"off", "none", "false", "no"}
"""What says, in place of names, that no agent shall run."""


@dataclass(slots=True)
class Active:
    """One agent in the chain of one request, and its configuration there. Of one that is `wanted`, by the request
    itself or by the operator in every request, another agent's `leave_out` does not get rid."""

    plugin: Plugin
    made: Made
    config: BaseModel
    settings: AgentConfig
    wanted: bool


@dataclass(slots=True)
class Selection:
    """What is to be done about a request: run `chain` around it, or answer it with `reply`, a text of the proxy's own.
    `about` describes all agents there are: a function, because few agents ask for that."""

    chat_id: str = ""
    chain: list[Active] = field(default_factory=list)
    reply: str | None = None
    about: Callable[[], list[About]] = list


@dataclass(slots=True)
class _Wish:
    """An agent that shall run, with options of the operator's and as the user typed them."""

    plugin: Plugin
    settings: AgentConfig
    options: dict[str, Any]
    typed: dict[str, str] = field(default_factory=dict)
    wanted: bool = False

    @classmethod
    def of(cls, plugin: Plugin) -> _Wish:
        return cls(plugin, plugin.settings, plugin.settings.options)

    def obey(self, entry: AgentConfig) -> None:
        """Settings and options that a model has for the agent, on top of those for all models if there are any."""
        said = entry.model_fields_set & {"on_error", "timeout_s", "required"}
        self.settings = self.settings.model_copy(update={name: getattr(entry, name) for name in said})
        self.options = self.plugin.options_with(entry, self.options)


class Chain:
    """Picks the agents of each request."""

    def __init__(self, config: Config, plugins: Plugins) -> None:
        self.plugins = plugins
        self.chats = Chats()
        self._slash = config.slash_commands
        models = config.models | config.virtual
        self._barred = {name for name, model in models.items() if model.agents is None}
        names = names_by_key(models)
        self._names = {key_of(key): name for key, name in names.items()} | names
        self._of_model = {name: self._entries(model, models) for name, model in models.items()}
        self._models_have_some = any(self._of_model.values())

    def concerns(self, headers: Mapping[str, str], body: Json, model: str, codec: ClientCodec) -> bool:
        """Whether agents may have to do with this request, in whatever API: a cheap look. A False is final."""
        return (
            self.plugins.some_always
            or len(self.chats) > 0
            or FIELD in body
            or HEADER in headers
            or (self._slash and codec.user_text(body).startswith("/"))
            or (self._models_have_some and bool(self._of_model.get(self._name(model))))
        )

    def check_unneeded(self, headers: CIMultiDictProxy[str], model: str) -> None:
        """Raises: BadRequest if an endpoint where agents do not run cannot answer the request, as some are required or
        named."""
        if required := [wish.plugin.name for wish in self._own(model).values() if wish.settings.required]:
            words = f"agents do not run at this endpoint, and these are required: {', '.join(required)}"
            raise BadRequest(words, status=403, code="agents_required")
        if named := _named(_header(headers), None):
            words = f"agents do not run at this endpoint, so it cannot run {named[0][:100]}"
            raise BadRequest(words, param=HEADER)

    def select(
        self, headers: CIMultiDictProxy[str], field: object, request: ChatRequest, model: str, *, resends_chat: bool
    ) -> Selection:
        """The agents of `request`, whose commands are taken out of it. `field` is what stood in its field `agents`,
        `model` the name of the model; with `resends_chat` its API sends all that was said in a chat with each request.

        Raises: BadRequest for an unknown agent that is named outside the text, and for a bad option; AgentError for one
        that is required and broken.
        """
        named = _named(_header(headers), field)
        selection = Selection(chat_id(headers, request))
        wishes = self._own(model)
        if named is None or self._name(model) in self._barred:
            wishes = {name: wish for name, wish in wishes.items() if wish.settings.required}
        else:
            called, known = self._called(request), resends_chat or is_named(headers)
            if called is not None and (word := self._control_word(called, request)) is not None:
                selection.reply = self._control(selection.chat_id if known else None, called, word, wishes)
                return selection
            if known:
                self._add_switched(wishes, selection.chat_id)
            self._add_named(wishes, named)
            for call in called or ():
                wish = self._add(wishes, self.plugins.commands()[call.command])
                wish.typed |= call.options
                wish.wanted = True
        selection.chain = [_active(wish) for wish in wishes.values() if _usable(wish)]
        selection.about = partial(self._about, set(wishes))
        return selection

    # -- who wants which -------------------------------------------------------------------------------------------

    def _name(self, model: str) -> str:
        """The name in the configuration, which an Ollama may spell in another way."""
        return self._names.get(model.lower()) or self._names.get(key_of(model)) or ""

    def _entries(self, model: ModelConfig, models: Mapping[str, ModelConfig]) -> list[AgentConfig]:
        """The agents that the configuration has for the model: a virtual one's base may require some."""
        base = models.get(self._name(model.model or ""))
        required = [entry for entry in base.agents or () if entry.required] if base is not None else []
        return [*required, *(model.agents or ())]

    def _own(self, model: str) -> dict[str, _Wish]:
        """The agents that run in every chat with this model, for all anybody says."""
        wishes: dict[str, _Wish] = {}
        for plugin in self.plugins:
            if plugin.always:
                self._add(wishes, plugin).wanted = True
        for entry in self._of_model.get(self._name(model), ()):
            self._add(wishes, self.plugins.by_name[entry.name]).obey(entry)
        return wishes

    def _add(self, wishes: dict[str, _Wish], plugin: Plugin) -> _Wish:
        return wishes.setdefault(plugin.name, _Wish.of(plugin))

    def _add_switched(self, wishes: dict[str, _Wish], chat: str) -> None:
        for name, on in self.chats.switched(chat).items() if len(self.chats) else ():
            if name not in self.plugins.by_name:
                continue
            if on:
                self._add(wishes, self.plugins.by_name[name])
            elif name in wishes and not wishes[name].settings.required:
                del wishes[name]

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
        commands = self.plugins.commands()
        known = {name: _per_call(plugin) for name, plugin in commands.items()} | {FIELD: frozenset()}
        if ALWAYS_THERE in known and leading_commands(text, {ALWAYS_THERE: known[ALWAYS_THERE]})[0]:
            known = {ALWAYS_THERE: known[ALWAYS_THERE]}  # what comes after it is what is asked about
        called, rest = leading_commands(text, known)
        if not called:
            return None
        if any(call.command == FIELD for call in called) and (rest or len(called) > 1):
            return None  # a text that happens to begin with the word
        request.last_user_text = rest
        return called

    def _control_word(self, called: list[Called], request: ChatRequest) -> str | None:
        """Which of the commands that are about the chain itself this is: `on`, `off` or `agents`; None if none."""
        if called[0].command == FIELD:
            return FIELD
        word = request.last_user_text.strip()
        asks_help = any(call.command == ALWAYS_THERE for call in called)
        return word if word in ("on", "off") and not asks_help else None

    def _control(self, chat: str | None, called: list[Called], word: str, wishes: dict[str, _Wish]) -> str:
        """The answer to `/rag on`, `/rag off` and `/agents`, in a chat that runs `wishes` by itself; without `chat`
        nothing tells which one it is."""
        if any(call.options for call in called):
            words = f"/{called[0].command} {word} takes no options; give them with each message"
            raise BadRequest(words, param=next(iter(called[0].options), FIELD))
        told = []
        switched = [self.plugins.commands()[call.command] for call in called if call.command != FIELD]
        if switched and chat is None:
            return f"Nothing tells which chat this is; send the header {CHAT_ID_HEADERS[1]} to have agents on or off."
        for plugin in switched:
            if word == "off" and plugin.name in wishes and wishes[plugin.name].settings.required:
                told.append(f"/{plugin.command} is required, and stays on.")
                continue
            self.chats.switch(chat or "", [plugin.name], word == "on")
            told.append(f"/{plugin.command} is {word} in this chat.")
        running = dict(wishes)
        self._add_switched(running, chat or "")
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


def _header(headers: CIMultiDictProxy[str]) -> str:
    """The header, which may be there more than once."""
    return ",".join(headers.getall(HEADER, ()))


def _named(header: str, body: object) -> list[str] | None:
    """The agents that the request names; None if it wants none at all, which either of the two may say."""
    if body is False:
        return None
    if body is not None and body is not True and not isinstance(body, str | list):
        raise BadRequest("agents must be a list of names, or false", param=FIELD)
    given = body.split(",", MOST) if isinstance(body, str) else body if isinstance(body, list) else []
    if len(given) > MOST:
        raise BadRequest(f"agents names over {MOST} agents", param=FIELD)
    if not all(isinstance(name, str) for name in given):
        raise BadRequest("agents must be a list of names, or false", param=FIELD)
    names = [name.strip() for name in [*header.split(","), *given] if name.strip()]
    return None if any(name.lower() in _OFF for name in names) else [name.removeprefix("/") for name in names]


def _usable(wish: _Wish) -> bool:
    """Whether it can run. Raises: AgentError if it must and cannot."""
    if wish.plugin.made is not None:
        return True
    if wish.settings.required:
        raise _unavailable(wish.plugin, "is required and not available")
    return False


def _unavailable(plugin: Plugin, words: str) -> AgentError:
    return AgentError(plugin.name, f"{words}; the proxy's /plugins tells why", status=503)


def _active(wish: _Wish) -> Active:
    assert wish.plugin.made is not None
    try:
        config = wish.plugin.config_for({**wish.options, **wish.typed} if wish.typed else wish.options)
    except ValidationError as exc:
        error = exc.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, error["loc"]))
        words = error["msg"].removeprefix("Value error, ").replace("Input should", "should", 1)
        raise BadRequest(f"option {where} of /{wish.plugin.command}: {words}", param=where) from None
    return Active(wish.plugin, wish.plugin.made, config, wish.settings, wish.wanted or wish.settings.required)
