"""One model of the Ollama hosts: asked from whichever of them is best placed, and pulled first if none has it."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import orjson

from llama_smart_proxy.backends.base import Feature, Json, ModelInfo, ModelState, Residence, UpstreamRequest
from llama_smart_proxy.backends.http.connection import UNREACHABLE
from llama_smart_proxy.backends.http.exchange import UpstreamResponse
from llama_smart_proxy.backends.names import key_of
from llama_smart_proxy.backends.ollama.host import JSON_HEADERS, MAX_CONTEXT, PULL_FAILED
from llama_smart_proxy.proxy.errors import BadRequest, UpstreamFailed, UpstreamRefused

if TYPE_CHECKING:
    from llama_smart_proxy.backends.ollama.hosts import Hosts

logger = logging.getLogger(__name__)

KIND = "ollama"
LOOK_S = 0.5
"""Longest wait for hosts that are asked what they have loaded."""
ANSWER_LIMIT = 1024 * 1024
"""Most bytes that are read of an answer to a request of our own."""


class OllamaModel:
    """`Model` for one that a host has, or, with `pull`, one that is pulled for the first request to it."""

    kind: ClassVar[str] = KIND
    owner: ClassVar[str] = KIND
    codec: ClassVar[str] = KIND
    speaks: ClassVar[frozenset[str]] = frozenset({"ollama", "responses"})
    features: ClassVar[frozenset[Feature]] = frozenset({Feature.LOADING})
    aliases: ClassVar[Sequence[str]] = ()

    def __init__(self, hosts: Hosts, name: str, *, pull: bool) -> None:
        self.name = name
        self._hosts = hosts
        self._key = key_of(name)
        self._pull = pull

    @property
    def state(self) -> ModelState:
        return ModelState("loaded" if self._hosts.has_loaded(self.name) else "unloaded")

    # -- requests --------------------------------------------------------------------------------------------------

    def prepare(self, body: Json) -> int | None:
        """Have `num_ctx` follow the one policy of the model (`Hosts.num_ctx`), or clients that differ would have it
        loaded in turns. `options` is Ollama's; clients of other APIs may send it, too.

        Returns the size that is sent, None for none. Raises: BadRequest.
        """
        options = body.get("options")
        if options is not None and not isinstance(options, dict):
            raise BadRequest("options must be an object", param="options")
        asked = options.get("num_ctx") if options else None
        if isinstance(asked, int) and asked > MAX_CONTEXT:
            raise BadRequest(f"num_ctx must not be over {MAX_CONTEXT}", param="num_ctx")
        whole = isinstance(asked, int) and not isinstance(asked, bool)
        num_ctx = self._hosts.num_ctx(self.name, asked if whole else None)
        if num_ctx is not None and num_ctx != asked:
            body["options"] = {**(options or {}), "num_ctx": num_ctx}
        return num_ctx

    @asynccontextmanager
    async def open(self, request: UpstreamRequest) -> AsyncIterator[UpstreamResponse]:
        """Raises: BadRequest, ModelNotFound, UpstreamFailed."""
        num_ctx = request.prepared if isinstance(request.prepared, int) else None
        async with AsyncExitStack() as stack:
            try:
                yield await self._hosts.tried(self.name, num_ctx, self._begin(request, stack))
            finally:
                self._hosts.used(self.name)

    async def _begin(self, request: UpstreamRequest, stack: AsyncExitStack) -> UpstreamResponse:
        response = await self._try_holders(request, stack)
        if response is None:
            if not self._pull or not self._hosts.may_pull(self.name):
                raise self._hosts.missing(self.name)
            await self._hosts.pulled(self.name, request.headers)
            response = await self._try_holders(request, stack)
        if response is None:  # it may go by another name there: an alias, of a proxy like us
            response = await stack.enter_async_context(self._hosts.likeliest(self._key).open(request, self._key))
        return response

    async def _try_holders(self, request: UpstreamRequest, stack: AsyncExitStack) -> UpstreamResponse | None:
        """The answer of the first host that gives one; None if none has the model.

        A host that cannot be reached is passed over, not one that failed with the request: it may have been at work on
        it for long. Passed over is also one that says it has no such model and no longer lists it: somebody has deleted
        it there.
        """
        failure: UpstreamFailed | None = None
        for host in await self._hosts.holders(self.name):
            try:
                response = await stack.enter_async_context(host.open(request, self._key))
            except UpstreamFailed as exc:
                if exc.code != UNREACHABLE:
                    raise
                logger.warning("%s did not answer for %s: %s", host.url, self.name, exc)
                failure = exc
                continue
            if response.status == 404:
                await host.listed(0)
            if self._key in host.tags:
                return response
            await stack.aclose()
        if failure is not None:
            raise failure
        return None

    # -- loading and deleting --------------------------------------------------------------------------------------

    async def load(self, *, wait: bool = True) -> None:
        """Returns when it is loaded, in any case."""
        body: Json = {"model": self.name}
        await self._generate(body, self.prepare(body))

    async def unload(self) -> None:
        await self._generate({"model": self.name, "keep_alive": 0})

    def keep_loaded(self, seconds: float) -> None:
        """Nothing: its host reads `keep_alive` in the requests themselves."""

    async def delete(self, headers: Sequence[tuple[str, str]]) -> None:
        """Remove it from every host that has it. Raises: ModelNotFound, UpstreamFailed, UpstreamRefused."""
        request = UpstreamRequest("DELETE", "/api/delete", orjson.dumps({"model": self.name}), headers, slot=False)
        holders = await self._hosts.holders(self.name)
        if not holders:
            raise self._hosts.missing(self.name)
        refused = None
        for host in reversed(holders):  # what the best one answers counts
            try:
                refused = await _refused(partial(host.open, request))
            finally:
                host.changed()
        if refused is not None:
            raise refused

    async def _generate(self, body: Json, num_ctx: int | None = None) -> None:
        """Send a request that generates nothing. Raises: as `open`, UpstreamRefused."""
        data = orjson.dumps(body)
        request = UpstreamRequest("POST", "/api/generate", data, JSON_HEADERS, slot=False, prepared=num_ctx)
        refused = await _refused(partial(self.open, request))
        if refused is not None:
            raise refused

    # -- what is known ---------------------------------------------------------------------------------------------

    async def info(self) -> ModelInfo:
        item = self._hosts.item(self.name)
        return ModelInfo(self.name, native={KIND: item} if item is not None else {})

    async def residence(self) -> Residence | None:
        with suppress(TimeoutError):
            async with asyncio.timeout(LOOK_S):
                await self._hosts.looked_up()
        item = self._hosts.loaded_item(self.name)
        if item is None:
            return None
        vram, context = (_count(item.get(key)) for key in ("size_vram", "context_length"))
        return Residence(_seconds(item.get("expires_at")), vram, context, {KIND: item})


async def _refused(opening: Callable[[], AbstractAsyncContextManager[UpstreamResponse]]) -> UpstreamRefused | None:
    """Open a request of which only the success matters, once more if the host broke off. Returns the error that it was
    answered with, None for success. Raises: what `opening` raises."""
    try:
        return await _error(opening())
    except UpstreamFailed as exc:
        if exc.status != 502 or exc.code == PULL_FAILED:
            raise
    return await _error(opening())


async def _error(opened: AbstractAsyncContextManager[UpstreamResponse]) -> UpstreamRefused | None:
    async with opened as response:
        body = await response.read(ANSWER_LIMIT) or b""
    if response.status == 200:
        return None
    message = body.decode(errors="replace")
    with suppress(ValueError, TypeError, KeyError):
        message = str(orjson.loads(body)["error"])
    return UpstreamRefused(message, status=response.status if response.status >= 400 else 502)


def _count(value: object) -> int:
    return value if isinstance(value, int) else 0


def _seconds(when: object) -> float:
    """A time of Ollama's, in seconds since 1970; infinity for what is none."""
    with suppress(ValueError, OverflowError, OSError):
        return datetime.fromisoformat(str(when)).timestamp()
    return math.inf
