"""Identifies the chat of a request, and keeps the agents that the user has switched on or off in it."""

from __future__ import annotations

import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

CHAT_ID_HEADERS = ("X-OpenWebUI-Chat-Id", "X-Conversation-Id", "X-Chat-Id", "X-Session-Id")
"""Headers in which chat UIs send the id of the chat; the first one present is used."""
HASHED_CHARS = 10_000
"""Characters of each message that enter the hash identifying a chat without such a header."""
MAX_CHATS = 10_000
CHAT_TTL_S = 7 * 24 * 3600.0
"""Seconds after its last request at which a chat expires. Over `MAX_CHATS`, the least recently used one is evicted."""


@dataclass(slots=True)
class Switches:
    """The switches of one chat: True for on, False for off, by the agent's name, in the order of switching."""

    agents: dict[str, bool] = field(default_factory=dict)
    used_at: float = 0.0


class Chats:
    """The switches of all chats, in memory only: a restart loses them. Times are seconds of `clock`."""

    def __init__(
        self, *, max_chats: int = MAX_CHATS, ttl_s: float = CHAT_TTL_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._chats: OrderedDict[str, Switches] = OrderedDict()
        self._max_chats = max_chats
        self._ttl_s = ttl_s
        self._clock = clock

    def __len__(self) -> int:
        return len(self._chats)

    def switched(self, chat_id: str) -> Mapping[str, bool]:
        """The switches of this chat: on or off, by the agent's name."""
        self._evict()
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
        self._evict()

    def _evict(self) -> None:
        oldest = self._clock() - self._ttl_s
        while self._chats:
            first = next(iter(self._chats.values()))
            if len(self._chats) <= self._max_chats and first.used_at >= oldest:
                return
            self._chats.popitem(last=False)


def chat_id(headers: Mapping[str, str], beginning: Iterable[tuple[Any, str]]) -> str:
    """A hash that identifies the chat of a request: of the client's chat id, or else of the role and text of its first
    messages. It includes the API key, so that no client can switch agents in the chats of another."""
    key = headers.get("Authorization") or headers.get("X-Api-Key") or ""
    named = next((headers[name] for name in CHAT_ID_HEADERS if headers.get(name)), None)
    first = [[role, text[:HASHED_CHARS]] for role, text in beginning]
    start = named if named is not None else first
    return hashlib.blake2b(json.dumps([key, start]).encode(), digest_size=16).hexdigest()


def is_named(headers: Mapping[str, str]) -> bool:
    """Whether the client sent the id of the chat."""
    return any(headers.get(name) for name in CHAT_ID_HEADERS)
