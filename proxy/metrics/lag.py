"""How late the event loop is: how long callbacks wait for their turn, which every stream feels."""

from __future__ import annotations

import asyncio

from llama_smart_proxy.proxy.metrics.histogram import SECONDS, Histogram

PERIOD_S = 1.0


class Lag:
    """Looks once a second, from `watch` to `stop`. A loop that is blocked for less is seen by chance."""

    def __init__(self) -> None:
        self.seconds = Histogram(SECONDS)
        self._timer: asyncio.TimerHandle | None = None

    def watch(self) -> None:
        """Begin, in the running loop."""
        if self._timer is None:
            self._again(asyncio.get_running_loop())

    def stop(self) -> None:
        """End."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _again(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = loop.call_later(PERIOD_S, self._look, loop, loop.time() + PERIOD_S)

    def _look(self, loop: asyncio.AbstractEventLoop, due_s: float) -> None:
        self.seconds.add(max(0.0, loop.time() - due_s))
        self._again(loop)
