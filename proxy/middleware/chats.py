"""Which agents a user has switched on or off in a chat, and which chat a request belongs to."""

from __future__ import annotations

import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from llama_smart_proxy.proxy.chat import ChatRequest, text_of

CHAT_ID_HEADERS = ("X-OpenWebUI-Chat-Id", "X-Conversation-Id", "X-Chat-Id", "X-Session-Id")
"""Headers by which chat UIs tell which chat a request is of; the first one that is there counts."""
LOOKED_AT = 10_000
"""Characters of each text that tell a chat from others."""
MOST_CHATS = 10_000
KEPT_S = 7 * 24 * 3600.0
"""A chat is forgotten so many seconds after its last request; and the one longest without first, if there are too
many."""


@dataclass(slots=True)
class Switches:
    """What was switched in one chat: True on, False off, by the agent's name, in the order of switching."""

    agents: dict[str, bool] = field(default_factory=dict)
    used_at: float = 0.0


class Chats:
    """The switches of every chat, from memory: a restart forgets them. Times are seconds of `clock`."""

    def __init__(self, *, most: int = MOST_CHATS, kept_s: float = KEPT_S, clock: Callable[[], float] = time.monotonic):
        self._chats: OrderedDict[str, Switches] = OrderedDict()
        self._most = most
        self._kept_s = kept_s
        self._clock = clock

    def __len__(self) -> int:
        return len(self._chats)

    def switched(self, chat_id: str) -> Mapping[str, bool]:
        """What was switched in this chat."""
        self._forget_old()
        found = self._chats.get(chat_id)
        if found is None:
            return {}
        found.used_at = self._clock()
        self._chats.move_to_end(chat_id)
        return found.agents

    def switch(self, chat_id: str, agents: Iterable[str], on: bool) -> None:
        """Switch these agents on or off in this chat."""
        chat = self._chats.setdefault(chat_id, Switches())
        for name in agents:
            chat.agents.pop(name, None)
            chat.agents[name] = on
        chat.used_at = self._clock()
        self._chats.move_to_end(chat_id)
        self._forget_old()

    def _forget_old(self) -> None:
        oldest = self._clock() - self._kept_s
        while self._chats:
            first = next(iter(self._chats.values()))
            if len(self._chats) <= self._most and first.used_at >= oldest:
                return
            self._chats.popitem(last=False)


def chat_id(headers: Mapping[str, str], request: ChatRequest) -> str:
    """What tells the chat of a request from others: the client's word for it, else what the chat began with; and in
    either case its API key, so that nobody switches agents in the chats of others. A hash: neither can be read."""
    key = headers.get("Authorization") or headers.get("X-Api-Key") or ""
    named = next((headers[name] for name in CHAT_ID_HEADERS if headers.get(name)), None)
    begun = named if named is not None else _beginning(request)
    return hashlib.blake2b(json.dumps([key, begun]).encode(), digest_size=16).hexdigest()


def is_named(headers: Mapping[str, str]) -> bool:
    """Whether the client tells which chat the request is of."""
    return any(headers.get(name) for name in CHAT_ID_HEADERS)


def _beginning(request: ChatRequest) -> object:
    """The texts up to the first of the user's: every later request of a chat begins with them, too."""
    if request.is_text:
        return str(request.body.get("prompt"))[:LOOKED_AT]
    beginning = []
    for message in request.messages:
        beginning.append([message.get("role"), text_of(message.get("content"))[:LOOKED_AT]])
        if message.get("role") == "user":
            break
    return beginning
