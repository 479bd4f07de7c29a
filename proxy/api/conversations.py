"""Requests for resumable streams whose model is still being loaded: they outlive their client, too.

Source: llama.cpp tools/server/server-models.cpp, b11434 (`conv_models`).
"""

from __future__ import annotations

import asyncio
import logging

from llama_smart_proxy.backends.base import Model, UpstreamRequest
from llama_smart_proxy.proxy.errors import BadRequest, ProxyError

logger = logging.getLogger(__name__)


class Conversations:
    """The requests that wait for their model, one for each conversation."""

    def __init__(self) -> None:
        self._stops: dict[str, asyncio.Future[None]] = {}
        self._left: set[asyncio.Task[None]] = set()

    def waits(self, chat: str) -> bool:
        """Whether a request of this conversation waits."""
        return chat in self._stops

    def stop(self, chat: str) -> None:
        """End the waiting request of this conversation, if there is one."""
        stop = self._stops.pop(chat, None)
        if stop is not None and not stop.done():
            stop.set_result(None)

    async def load(self, chat: str, model: Model, request: UpstreamRequest) -> None:
        """Load `model` for `request`, and end an earlier request of the conversation that waits. If the client leaves
        meanwhile, the request is sent without it once the model is loaded.

        Raises: BadRequest if the request is ended by `stop`; as `Model.load`.
        """
        loop = asyncio.get_running_loop()
        self.stop(chat)
        stop = self._stops[chat] = loop.create_future()
        loading = loop.create_task(model.load(), name=f"load {model.name}")
        try:
            await self._loaded(chat, loading, stop)
        except asyncio.CancelledError:
            if not loading.cancelled():
                task = loop.create_task(self._send(chat, model, request, loading, stop), name=f"stream of {model.name}")
                self._left.add(task)
                task.add_done_callback(self._left.discard)
            raise

    async def _loaded(self, chat: str, loading: asyncio.Task[None], stop: asyncio.Future[None]) -> None:
        await asyncio.wait({loading, stop}, return_when=asyncio.FIRST_COMPLETED)
        if self._stops.get(chat) is stop:
            del self._stops[chat]
        if stop.done():
            loading.cancel()
            message = "request cancelled by a stop while the model was loading"
            raise BadRequest(message, code="request_cancelled")
        await loading

    async def _send(
        self,
        chat: str,
        model: Model,
        request: UpstreamRequest,
        loading: asyncio.Task[None],
        stop: asyncio.Future[None],
    ) -> None:
        """The server generates to the end, although nothing of its answer is read here."""
        try:
            await self._loaded(chat, loading, stop)
            async with model.open(request):
                pass
        except ProxyError as exc:
            logger.info("%s: no stream for a client that has left: %s", model.name, exc.message.partition("\n")[0])
