"""The one feed of what happens inside: states of models, percentages, queues, downloads, learned load times."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

MOST_PENDING = 256
"""Most events that are kept for a subscriber who does not read them."""


class Kind(StrEnum):
    """What an event is about; its name is that of a model, or of a download."""

    MODEL = "model"  # `state`, as of `ModelState`; `error` of the last start; when loading, `expected_s` or None
    LOAD = "load"  # `share`: how much of the model is loaded, from 0 to 1, as its server reports it
    QUEUE = "queue"  # `waiting`: how many requests wait for it
    LOAD_TIME = "load_time"  # `seconds` that a start takes, learned from the last ones
    DOWNLOAD = "download"  # the progress, as of `weights.downloads`; `ended` once it is over


@dataclass(frozen=True, slots=True)
class Event:
    """Something has changed; `data` is all that is known of it from now on."""

    kind: Kind
    name: str
    data: Mapping[str, Any]


class Subscription:
    """The events for one subscriber, in their order, beginning with a snapshot. One that does not read them loses the
    oldest, and gets a new snapshot in their place."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._pending: deque[Event] = deque(feed.latest)
        self._some = asyncio.Event()
        if self._pending:
            self._some.set()

    async def events(self) -> list[Event]:
        """All events since the last call, at least one; none once the feed is closed. May be cancelled without loss."""
        if not self._feed.closed:
            await self._some.wait()
        found = list(self._pending)
        self._pending.clear()
        self._some.clear()
        return found

    def _end(self) -> None:
        self._some.set()

    def _put(self, event: Event) -> None:
        if len(self._pending) >= max(MOST_PENDING, 2 * len(self._feed.latest)):
            self._pending = deque(latest for latest in self._feed.latest if latest is not event)
        self._pending.append(event)
        self._some.set()


class Feed:
    """Publishers never wait, and subscribers never miss how things are in the end. For one event loop."""

    def __init__(self) -> None:
        self._latest: dict[tuple[Kind, str], Event] = {}
        self._subscriptions: set[Subscription] = set()
        self.closed = False

    @property
    def latest(self) -> list[Event]:
        """The last event of each kind and name, except for what is over."""
        return list(self._latest.values())

    def publish(self, kind: Kind, name: str, data: Mapping[str, Any], *, over: bool = False) -> None:
        """Hand on an event, unless nothing has changed. What is `over` is no part of later snapshots."""
        event, key = Event(kind, name, data), (kind, name)
        if over:
            self._latest.pop(key, None)
        elif self._latest.get(key) == event:
            return
        else:
            self._latest.pop(key, None)  # so that a snapshot is in the order of the changes
            self._latest[key] = event
        for subscription in self._subscriptions:
            subscription._put(event)

    def close(self) -> None:
        """Let all subscribers go, as the proxy is shutting down."""
        self.closed = True
        for subscription in self._subscriptions:
            subscription._end()

    @contextmanager
    def subscribe(self) -> Iterator[Subscription]:
        """A subscription, which ends with the context."""
        subscription = Subscription(self)
        self._subscriptions.add(subscription)
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)
