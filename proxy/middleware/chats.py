"""Identifies the chat of a request, and remembers the agents that were switched on or off in chats with an id.

A client that resends the whole chat resends its switches with it (`history`). What is remembered here serves clients
that resend a part of it, or nothing."""

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
    """The switches of one chat: True for on, False for off, by the agent's name, in the order of switching. `start` is
    the `Identity.start` of the chat at the last one."""

    agents: dict[str, bool] = field(default_factory=dict)
    start: str | None = None
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

    def switched(self, chat: Identity) -> dict[str, bool]:
        """The switches of this chat that its request need not show: on or off, by the agent's name."""
        if not chat.named or not self._chats:
            return {}
        self._evict()
        found = self._chats.get(chat.id)
        if found is None:
            return {}
        found.used_at = self._clock()
        self._chats.move_to_end(chat.id)
        if chat.start is not None and chat.start == found.start:
            return {}  # the request begins where the chat does, so what it does not show was edited away
        return found.agents

    def switch(self, chat: Identity, agent: str, on: bool) -> None:
        """Switch this agent on or off in this chat, if it has an id."""
        if not chat.named:
            return
        found = self._chats.setdefault(chat.id, Switches())
        found.agents.pop(agent, None)
        found.agents[agent] = on
        found.start = chat.start
        found.used_at = self._clock()
        self._chats.move_to_end(chat.id)
        self._evict()

    def _evict(self) -> None:
        oldest = self._clock() - self._ttl_s
        while self._chats:
            first = next(iter(self._chats.values()))
            if len(self._chats) <= self._max_chats and first.used_at >= oldest:
                return
            self._chats.popitem(last=False)


@dataclass(frozen=True, slots=True)
class Identity:
    """The chat of a request. `id` is a hash of the client's chat id if it sent one (`named`), or else of the chat's
    beginning. `start` is a hash of the beginning; None if the client does not resend the chat."""

    id: str
    named: bool = False
    start: str | None = None

    @classmethod
    def of(cls, headers: Mapping[str, str], beginning: Iterable[tuple[Any, str]], *, resent: bool) -> Identity:
        """`beginning`: role and text of the chat's first messages, which `resent` says are the same in each request.
        The hashes include the API key, so that no client can switch agents in the chats of another."""
        key = headers.get("Authorization") or headers.get("X-Api-Key") or ""
        named = next((headers[name] for name in CHAT_ID_HEADERS if headers.get(name)), None)
        start = _hash(key, [[role, text[:HASHED_CHARS]] for role, text in beginning])
        if named is None:
            return cls(start, start=start if resent else None)
        return cls(_hash(key, named), named=True, start=start if resent else None)

    @property
    def known(self) -> bool:
        """Whether a later request of the same chat can be recognised as such."""
        return self.named or self.start is not None


def _hash(key: str, value: Any) -> str:
    return hashlib.blake2b(json.dumps([key, value]).encode(), digest_size=16).hexdigest()


def is_named(headers: Mapping[str, str]) -> bool:
    """Whether the client sent the id of the chat."""
    return any(headers.get(name) for name in CHAT_ID_HEADERS)
