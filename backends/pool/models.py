"""Which definition of a model applies: that of the last configuration, also for requests that began before it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from llama_smart_proxy.backends.pool.backoff import Backoff
from llama_smart_proxy.backends.pool.instance import State
from llama_smart_proxy.backends.pool.launcher import PoolModel, latest_born
from llama_smart_proxy.backends.pool.placement import Area, surplus
from llama_smart_proxy.backends.pool.queue import ModelQueue, Place

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Models:
    """The models of the last configuration, by name. What was made `since` is a file that has come later; what was made
    before, and is not here, is of a request that began with the configuration before."""

    by_name: Mapping[str, PoolModel] = field(default_factory=dict)
    since: int = 0

    @classmethod
    def of(cls, models: Iterable[PoolModel]) -> Models:
        """Those that apply from now on."""
        return cls({model.name: model for model in models}, latest_born())

    def apply(self, queue: ModelQueue, model: PoolModel) -> None:
        """Let `model`, of a request, apply to the next process, unless it has been replaced."""
        if model.born > self.since:
            queue.model, queue.removed = model, False
        else:
            latest = self.by_name.get(model.name)
            queue.model, queue.removed = latest or model, latest is None

    def redefine(self, queue: ModelQueue) -> bool:
        """Let the models apply to what a queue has. Returns whether its process is replaced for that: it accepts no
        more requests, and those that wait get the next one. The process of a model that is not there any more serves
        those that have come before."""
        before, model = queue.model, self.by_name.get(queue.name)
        if model is None:
            queue.removed, queue.error = True, None
            queue.changed(queue)
            return False
        queue.model, queue.removed = model, False
        if (model.keep_alive_s, model.pinned) != (before.keep_alive_s, before.pinned):
            queue.keep_alive_s = None
        if not model.same(before):  # what made it fail may have been mended
            queue.error, queue.backoff = None, Backoff()
            queue.changed(queue)
        return _replaces(queue, model)


def retire_surplus(places: Sequence[Place], area: Area) -> None:
    """Let the processes above the size of an area accept no more requests."""
    now = asyncio.get_running_loop().time()
    for place in surplus(area.of(places), area.size):
        logger.info("%s: accepts no more requests: server_pool.%s is %d", place.queue.name, area.setting, area.size)
        place.retire(now)


def _replaces(queue: ModelQueue, model: PoolModel) -> bool:
    place = queue.place
    if place is None or place.unloading or place.state not in (State.STARTING, State.READY):
        return False
    if model.same(place.instance.model):
        return False
    if place.state is State.STARTING:
        place.stop("its configuration has changed")
    else:
        logger.info("%s: accepts no more requests: its configuration has changed", queue.name)
        place.retire(asyncio.get_running_loop().time())
    return True
