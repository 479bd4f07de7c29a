"""What the pool publishes in the feed: how its models are, and how many requests wait for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llama_smart_proxy.backends.feed import Feed, Kind
from llama_smart_proxy.backends.pool.instance import Instance, State
from llama_smart_proxy.backends.pool.load_times import LoadTimes
from llama_smart_proxy.backends.pool.queue import ModelQueue


class News:
    """Publishes for one pool. `is_fetched` is whether the files of a model are being downloaded."""

    def __init__(self, feed: Feed, times: LoadTimes, is_fetched: Callable[[ModelQueue], bool]) -> None:
        self._feed = feed
        self._times = times
        self._is_fetched = is_fetched

    def state(self, queue: ModelQueue) -> str:
        """`loaded`, `loading` (or being fetched), `unloading` (accepts no more requests, and completes its answers) or
        `unloaded`. One that is stopping counts as unloaded."""
        place = queue.place
        if place is None:
            return "loading" if self._is_fetched(queue) else "unloaded"
        if place.state is State.READY:
            return "loaded" if place.open else "unloading"
        return "loading" if place.state is State.STARTING else "unloaded"

    def changed(self, queue: ModelQueue) -> None:
        """The state of a model may have changed."""
        data: dict[str, Any] = {"state": self.state(queue)}
        if queue.error is not None:
            data["error"] = queue.error.message
        if queue.place is not None and data["state"] == "loading":
            data["expected_s"] = self._times.typical_s(queue.name)
        gone = queue.removed and data["state"] == "unloaded"
        self._feed.publish(Kind.MODEL, queue.name, data, over=gone)

    def waiting(self, queue: ModelQueue) -> None:
        """More or fewer requests wait for a model."""
        self._feed.publish(Kind.QUEUE, queue.name, {"waiting": queue.length}, over=not queue.length)

    def starting(self, queue: ModelQueue) -> None:
        """A process of the model begins to load it."""
        self._times.recall()
        self.changed(queue)

    def started(self, instance: Instance) -> None:
        """A model has been loaded."""
        if instance.load_s is not None:
            self._times.learn(instance.name, instance.load_s, instance.size_bytes)

    def share(self, instance: Instance) -> None:
        """The server of a model has reported how much of it is loaded."""
        loading = instance.state is State.STARTING and instance.share is not None
        self._feed.publish(Kind.LOAD, instance.name, {"share": instance.share}, over=not loading)
