"""What earlier slash commands left in a chat that the client sends again, and what they switched. No I/O."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.chat.chunk import REASONING
from llama_smart_proxy.proxy.chat.sources import may_have_sources, without_sources
from llama_smart_proxy.proxy.chat.status import STATUS_MARK, without_status
from llama_smart_proxy.proxy.dialects.base import ClientCodec, TextPlace
from llama_smart_proxy.proxy.errors import ERROR_TEXT, MAX_ERROR_TEXT, without_error_text
from llama_smart_proxy.proxy.middleware.commands import Called, Commands

MAX_MESSAGES = 10_000
"""Messages of a chat that are looked through; a longer one is taken as it is."""
LONGEST_ERROR = MAX_ERROR_TEXT + len(ERROR_TEXT)
RUNNING = "Agents that run in this chat: "
"""The beginning of the last line of every answer to a control command."""
UNIDENTIFIED = "This chat cannot be identified; "
"""The beginning of the answer where nothing could be switched."""


@dataclass(slots=True)
class History:
    """`switches`: True for on, False for off, by the agent's name, in the order of switching. `messages`: the chat as
    models are to see it, None if that is how it came."""

    switches: dict[str, bool] = field(default_factory=dict)
    messages: list[Any] | None = None


def may_hold_commands(codec: ClientCodec, body: Json) -> bool:
    """Whether any text of this undecoded body begins with a slash, or has an error or a list of sources of ours, or any
    reasoning begins with a status line. Cheap; True may be a false positive."""
    messages = codec.messages(body)
    if messages is None:
        return codec.user_text(body).startswith("/")
    return any(map(_is_suspect, messages[-MAX_MESSAGES:]))


def _is_suspect(message: Any) -> bool:
    if message.__class__ is not dict:
        return False
    content = message.get("content")
    if content.__class__ is str:  # most are, and every message of every chat is looked at
        marked = _is_marked(content)
    else:
        marked = content.__class__ is list and any(map(_is_marked, _texts(content)))
    return marked or (len(message) > 2 and any(map(message.get, REASONING)) and _has_status(message))


def _is_marked(text: str) -> bool:
    return text.startswith("/") or ERROR_TEXT in text[-LONGEST_ERROR:] or may_have_sources(text)


def read_history(codec: ClientCodec, body: Json, commands: Commands) -> History:
    """The history in this undecoded and unchecked body, before the user's last message.

    Commands are taken out of the user's texts, as they were when these were new: else the model would not find the
    prompt that it has cached, and would read them. A command that no model answered goes together with its answer, and
    so do errors that were shown as a part of an answer, lists of sources below it, and status lines in front of its
    reasoning.
    """
    messages = codec.messages(body)
    history = History()
    if messages is None or len(messages) > MAX_MESSAGES:
        return history
    earlier = max((at for at, item in enumerate(messages) if codec.text_place(item) is not None), default=0)
    kept: list[Any] = []
    following = enumerate(messages[:earlier])
    for at, message in following:
        if not _is_suspect(message):
            kept.append(message)
            continue
        place = codec.text_place(message)
        text = place.text if place is not None else ""
        called = commands.called(text)
        answer = _assistant_text(messages[at + 1]) if at + 1 < earlier else None
        if _is_control(called, text, answer, commands):
            _switch(history, called, commands)
            if answer is not None:
                next(following)
        elif called is not None and called.action is None and place is not None:
            kept.append(_with_text(message, place, called.rest))
        elif (clean := _without_status(_without_end(message))) is not message:
            kept.append(clean)
        else:
            kept.append(message)
            continue
        history.messages = kept
    under_way = [_without_status(message) if _is_suspect(message) else message for message in messages[earlier:]]
    if history.messages is not None or under_way != messages[earlier:]:
        history.messages = kept + under_way
    return history


def _is_control(called: Called | None, text: str, answer: str | None, commands: Commands) -> bool:
    """Whether the proxy itself, or the agent `help`, answered this text."""
    if called is not None and called.action is not None:
        return answer is None or _is_control_reply(answer)
    if called is not None and called.is_help:
        return True
    return answer is not None and bool(answer) and commands.idle(called, text) == answer.strip()


def _is_control_reply(answer: str) -> bool:
    return answer.startswith(UNIDENTIFIED) or answer.strip().rpartition("\n")[2].startswith(RUNNING.rstrip())


def _switch(history: History, called: Called | None, commands: Commands) -> None:
    if called is None or called.switch is None:
        return
    for plugin in commands.plugins(called.commands):
        history.switches.pop(plugin.name, None)
        history.switches[plugin.name] = called.switch


def _with_text(message: Json, place: TextPlace, text: str) -> Json:
    """A copy of `message` with this text; an empty one beside other parts is left out: not every API accepts it."""
    if place.holder is message:
        return {**message, place.key: text}
    parts: list[Json] = message["content"]
    if not text and len(parts) > 1:
        return {**message, "content": [part for part in parts if part is not place.holder]}
    changed = [{**part, place.key: text} if part is place.holder else part for part in parts]
    return {**message, "content": changed}


def _without_end(message: Json) -> Json:
    """`message`, or a copy without the error and the list of sources that end it."""
    if message.get("role") != "assistant":
        return message
    content = message.get("content") or ""
    if isinstance(content, str):
        return message if (text := _clean(content)) == content else {**message, "content": text}
    if not isinstance(content, list):
        return message
    *before, last = content
    given = last.get("text") if isinstance(last, dict) else None
    if not isinstance(given, str) or (clean := _clean(given)) == given:
        return message
    return {**message, "content": [*before, {**last, "text": clean}] if clean or not before else before}


def _clean(text: str) -> str:
    return without_sources(without_error_text(text))


def _has_status(message: Json) -> bool:
    return any(isinstance(text := message.get(name), str) and text.startswith(STATUS_MARK) for name in REASONING)


def _without_status(message: Json) -> Json:
    """`message`, or a copy without the status lines in front of its reasoning."""
    if message.get("role") != "assistant" or not _has_status(message):
        return message
    clean = {name: without_status(text) for name in REASONING if isinstance(text := message.get(name), str)}
    return {name: value for name, value in {**message, **clean}.items() if value or name not in clean}


def _assistant_text(message: Any) -> str | None:
    """The text of an answer; None if `message` is none."""
    if not isinstance(message, dict) or message.get("role") != "assistant":
        return None
    content = message.get("content")
    return content if isinstance(content, str) else "\n".join(_texts(content))


def _texts(content: Any) -> Iterator[str]:
    for part in content if isinstance(content, list) else ():
        text = part.get("text") if isinstance(part, dict) else None
        if isinstance(text, str):
            yield text
