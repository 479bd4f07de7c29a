"""One model of the Ollama hosts: used on the best host that has it, and pulled first if none has it."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import orjson

from llama_smart_proxy.backends.base import Feature, Json, ModelInfo, ModelState, Residence, UpstreamRequest
from llama_smart_proxy.backends.http.connection import UNREACHABLE, Endpoint
from llama_smart_proxy.backends.http.exchange import UpstreamResponse
from llama_smart_proxy.backends.journal import StepKind
from llama_smart_proxy.backends.names import key_of
from llama_smart_proxy.backends.ollama.context import LOOK_S
from llama_smart_proxy.backends.ollama.host import JSON_HEADERS, MAX_CONTEXT, PULL_FAILED, seconds_of
from llama_smart_proxy.backends.pool.load_times import SHORT_S
from llama_smart_proxy.backends.progress import described, waiting
from llama_smart_proxy.proxy.errors import BadRequest, UpstreamFailed, UpstreamRefused

if TYPE_CHECKING:
    from llama_smart_proxy.backends.ollama.host import OllamaHost
    from llama_smart_proxy.backends.ollama.hosts import Hosts

logger = logging.getLogger(__name__)

KIND = "ollama"
ANSWER_LIMIT = 1024 * 1024
"""Maximum bytes read of an answer to one of the proxy's own requests."""


class OllamaModel:
    """`Model` on an Ollama host; with `pull`, it is pulled by the first request if no host has it."""

    kind: ClassVar[str] = KIND
    owner: ClassVar[str] = KIND
    codec: ClassVar[str] = KIND
    speaks: ClassVar[frozenset[str]] = frozenset({"ollama"})
    features: ClassVar[frozenset[Feature]] = frozenset({Feature.LOADING, Feature.ECHO})
    tags: ClassVar[Sequence[str]] = ()
    forwards: ClassVar[tuple[str, ...]] = ()
    output: ClassVar[None] = None

    def __init__(self, hosts: Hosts, name: str, *, pull: bool, asked: str = "") -> None:
        self.name = name
        self.filters = hosts.filters(name)
        self._hosts = hosts
        self._key = key_of(name)
        self._pull = pull
        self._asked = asked or name
        self._keep_alive: float | None = None
        self._unloads = False

    @property
    def aliases(self) -> Sequence[str]:
        return self._hosts.aliases(self.name)

    @property
    def state(self) -> ModelState:
        return ModelState(self._hosts.state(self.name))

    # -- requests --------------------------------------------------------------------------------------------------

    def prepare(self, body: Json) -> int | None:
        """Set `num_ctx` by the model's policy (`Hosts.num_ctx`), or clients with different sizes would cause
        alternating reloads. Clients of other APIs may send Ollama's `options`, too.

        Returns the size that is sent, None for none. Raises: BadRequest.
        """
        self._unloads = _unloads(body)
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
        self._hosts.begin_use(self.name)
        async with AsyncExitStack() as stack:
            try:
                response = await self._hosts.track_context(self.name, num_ctx, self._begin(request, stack))
                if self._unloads and response.status == 200:
                    self._hosts.begin_unload(self.name)
                yield response
            finally:
                self._hosts.mark_used(self.name)

    async def _begin(self, request: UpstreamRequest, stack: AsyncExitStack) -> UpstreamResponse:
        response = await self._open_at_holder(request, stack)
        if response is None:
            if not self._pull or not self._hosts.may_pull(self.name):
                raise self._hosts.missing(self._asked)
            await self._hosts.ensure_pulled(self.name, request)
            response = await self._open_at_holder(request, stack)
        if response is None:  # a host may accept names that it does not list: aliases of another proxy
            response = await stack.enter_async_context(self._hosts.best_host(self._key).open(request, self._key))
        return response

    async def _open_at_holder(self, request: UpstreamRequest, stack: AsyncExitStack) -> UpstreamResponse | None:
        """The answer of the first holder that gives one; None if no host has the model.

        An unreachable host is skipped, but not one that failed during the request, which may have run for long. A host
        is also skipped if it returns 404 and no longer lists the model, which was deleted there.
        """
        failure: UpstreamFailed | None = None
        for host in await self._hosts.holders(self.name):
            try:
                response = await stack.enter_async_context(self._loaded(host, request))
            except UpstreamFailed as exc:
                if exc.code != UNREACHABLE:
                    raise
                logger.warning("%s did not answer for %s: %s", host.url, self.name, exc)
                failure = exc
                continue
            if response.status != 404:
                return response
            await host.refresh_tags(0)
            if self._key in host.tags:
                return response
            await stack.aclose()
        if failure is not None:
            raise failure
        return None

    def _loaded(self, host: OllamaHost, request: UpstreamRequest) -> AbstractAsyncContextManager[UpstreamResponse]:
        """The answer of a host, which loads the model first if it is not loaded, before the head of its answer."""
        answering = host.open(request, self._key)
        return answering if self._key in host.loaded else self._after_load(answering, request)

    @asynccontextmanager
    async def _after_load(
        self, answering: AbstractAsyncContextManager[UpstreamResponse], request: UpstreamRequest
    ) -> AsyncIterator[UpstreamResponse]:
        times, now, name = self._hosts.times, asyncio.get_running_loop().time, f"{KIND} {self._key}"
        begun, began_s = now(), time.monotonic()
        times.recall()

        def loading() -> Callable[[], str]:
            return waiting(f"Loading {self.card.title or self.name}", now, times.typical_s(name))

        async with AsyncExitStack() as stack:
            with described(request.progress, loading):
                response = await stack.enter_async_context(answering)
            if response.status == 200 and now() - begun >= SHORT_S:
                times.learn(name, now() - begun)
                if request.journal is not None:
                    request.journal.note(StepKind.LOAD, began_s, time.monotonic(), model=self.name)
            yield response

    # -- loading and deleting --------------------------------------------------------------------------------------

    async def load(self, *, wait: bool = True) -> None:
        """Returns when it is loaded, also without `wait`."""
        body: Json = {"model": self.name}
        if self._keep_alive is not None:
            body["keep_alive"] = self._keep_alive if math.isfinite(self._keep_alive) else -1
        await self._generate(body, self.prepare(body))

    async def unload(self) -> None:
        self._unloads = True
        await self._generate({"model": self.name, "keep_alive": 0})

    def keep_loaded(self, seconds: float) -> None:
        """Affects only `load`: otherwise its host reads `keep_alive` in the requests themselves."""
        self._keep_alive = seconds

    async def delete(self, headers: Sequence[tuple[str, str]]) -> None:
        """Remove it from every host that has it. Raises: ModelNotFound, UpstreamFailed, UpstreamRefused."""
        request = UpstreamRequest("DELETE", "/api/delete", orjson.dumps({"model": self.name}), headers, slot=False)
        holders = await self._hosts.holders(self.name)
        if not holders:
            raise self._hosts.missing(self._asked)
        refused = None
        for host in reversed(holders):  # the answer of the best host is returned
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

    # -- information -----------------------------------------------------------------------------------------------

    async def info(self) -> ModelInfo:
        return self.card

    @property
    def card(self) -> ModelInfo:
        return self._hosts.card(self.name)

    async def slots(self) -> None:
        """None: Ollama does not report it."""

    async def residence(self) -> Residence | None:
        with suppress(TimeoutError):
            async with asyncio.timeout(LOOK_S):
                await self._hosts.refresh_loaded()
        item = self._hosts.loaded_item(self.name)
        if item is None:
            return None
        vram, context = (_count(item.get(key)) for key in ("size_vram", "context_length"))
        return Residence(seconds_of(item.get("expires_at")), vram, context, {KIND: item})

    def command_line(self, listen: Endpoint) -> Sequence[str]:
        """None: the server is another's."""
        return ()


async def _refused(opening: Callable[[], AbstractAsyncContextManager[UpstreamResponse]]) -> UpstreamRefused | None:
    """Send a request of which only the status matters, with one retry if the host disconnected. Returns the host's
    error, None for success. Raises: as `opening`."""
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


def _unloads(body: Json) -> bool:
    """Whether the request, in Ollama's API, generates nothing and unloads the model."""
    given = any(body.get(key) for key in ("prompt", "messages", "input"))
    return not given and str(body.get("keep_alive")) in ("0", "0.0", "0s", "0m", "0h")


def _count(value: object) -> int:
    return value if isinstance(value, int) else 0
