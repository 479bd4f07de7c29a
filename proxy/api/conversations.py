"""Requests for resumable streams whose model is still being loaded: they outlive their client, too.

Source: llama.cpp tools/server/server-models.cpp, b11434 (`conv_models`).
"""

from __future__ import annotations

import asyncio
import logging

from llama_smart_proxy.backends.base import Model, UpstreamRequest
from llama_smart_proxy.proxy.errors import BadRequest, Overloaded, ProxyError

logger = logging.getLogger(__name__)


class _Wait:
    """A request that waits for its model, by `limit` once that has begun. `stopped`: it is to be ended."""

    def __init__(self) -> None:
        self.stopped = False
        self.limit: asyncio.Timeout | None = None


class Conversations:
    """The requests that wait for their model, one for each conversation."""

    def __init__(self) -> None:
        self._waits: dict[str, _Wait] = {}
        self._left: set[asyncio.Task[None]] = set()

    def waits(self, chat: str) -> bool:
        """Whether a request of this conversation waits."""
        return chat in self._waits

    def stop(self, chat: str) -> None:
        """End the waiting request of this conversation, if there is one, also in the moment after its client left."""
        wait = self._waits.pop(chat, None)
        if wait is not None:
            wait.stopped = True
            if wait.limit is not None:
                wait.limit.reschedule(asyncio.get_running_loop().time())

    async def load(self, chat: str, model: Model, request: UpstreamRequest, *, limit: int) -> None:
        """Load `model` for `request`, and end an earlier request of the conversation that waits. If the client leaves
        meanwhile, the request is sent without it once the model is loaded.

        Raises: BadRequest if the request is ended by `stop`; Overloaded if `limit` conversations wait; as `Model.load`.
        """
        self.stop(chat)
        if len(self._waits) >= limit:
            raise Overloaded("Too many requests are waiting for a model; try again later.")
        wait = self._waits[chat] = _Wait()
        left = False
        try:
            await self._loaded(wait, model)
        except asyncio.CancelledError:
            left = not wait.stopped
            if left:
                task = asyncio.get_running_loop().create_task(self._send(chat, wait, model, request))
                self._left.add(task)
                task.add_done_callback(self._left.discard)
            raise
        finally:
            if not left:
                self._forget(chat, wait)

    def _forget(self, chat: str, wait: _Wait) -> None:
        if self._waits.get(chat) is wait:
            del self._waits[chat]

    async def close(self) -> None:
        """End the requests whose clients have left."""
        for task in self._left:
            task.cancel()
        await asyncio.gather(*self._left, return_exceptions=True)

    async def _loaded(self, wait: _Wait, model: Model) -> None:
        try:
            async with asyncio.timeout(None) as wait.limit:
                try:
                    await model.load()
                finally:
                    wait.limit = None
        except TimeoutError:
            message = "request cancelled by a stop while the model was loading"
            raise BadRequest(message, code="request_cancelled") from None

    async def _send(self, chat: str, wait: _Wait, model: Model, request: UpstreamRequest) -> None:
        """The server generates to the end, although nothing of its answer is read here."""
        if wait.stopped:
            return
        try:
            try:
                await self._loaded(wait, model)
            finally:
                self._forget(chat, wait)
            async with model.open(request):
                pass
        except ProxyError as exc:
            logger.info("%s: no stream for a client that has left: %s", model.name, exc)
