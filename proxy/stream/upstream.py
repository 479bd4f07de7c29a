"""One request to a model's server: retries, answers in JSON, and errors.

Every request to a model goes through `Attempts`: the relay, streams, and the proxy's own requests.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, suppress

import orjson

from llama_smart_proxy.backends.base import Management, Model, UpstreamRequest
from llama_smart_proxy.backends.http.connection import REDIRECTED
from llama_smart_proxy.backends.http.exchange import UpstreamResponse
from llama_smart_proxy.backends.journal import StepKind, note_now
from llama_smart_proxy.backends.tasks import BROKEN_OFF
from llama_smart_proxy.proxy.chat import Json, RequestRecord, Timing
from llama_smart_proxy.proxy.dialects.upstream_errors import refused
from llama_smart_proxy.proxy.errors import ProxyError, UpstreamFailed, UpstreamRefused
from llama_smart_proxy.proxy.http.body import serialise

logger = logging.getLogger(__name__)

ERROR_LIMIT = 1024 * 1024
"""Largest error body of a server that is read, in bytes."""
ANSWER_LIMIT = 64 * 1024 * 1024
"""Largest answer that is buffered, in bytes; thousands of embeddings are large."""
OFF_LOOP_BYTES = 1024 * 1024
"""Larger answers are parsed in a thread, so that other streams go on."""
JSON_HEADERS = [("Content-Type", "application/json")]
_FINAL = frozenset({"upstream_error", "upstream_frame_too_long", "pull_failed", REDIRECTED})
"""Codes of failures that the server's answer reports or causes: a retry would have the same result."""

Amend = Callable[[UpstreamRefused], Awaitable[UpstreamRequest | None]]
"""Returns a modified request that the server may accept after its refusal; None if there is none."""
MOST_AMENDS = 3
"""Most modified requests that are sent for one."""


def _never() -> bool:
    return False


class Attempts(AbstractAsyncContextManager[UpstreamResponse]):
    """Sends a request, with one retry if the server was unreachable or disconnected before any of its answer was used:
    its instance is gone by then, and the retry gets a new one. A request that the server refuses is retried as modified
    by `amend`.

        async for attempt in Attempts(model, request, begun):
            async with attempt as upstream: ...

    `begun` returns whether any of the answer has been used. Raises: the failure of the last attempt.
    """

    def __init__(
        self,
        model: Model | Management,
        request: UpstreamRequest,
        begun: Callable[[], bool] = _never,
        *,
        amend: Amend | None = None,
    ) -> None:
        self._model = model
        self._request = request
        self._begun = begun
        self._amend = amend
        self.again = True
        """Whether a retry is still allowed; a caller that has used the answer sets it to False."""
        self._over = False
        self._amends = 0

    def __aiter__(self) -> Attempts:
        return self

    async def __anext__(self) -> Attempts:
        if self._over:
            raise StopAsyncIteration
        self._over = True
        return self

    async def __aenter__(self) -> UpstreamResponse:
        while True:
            self._exchange = self._model.open(self._request)
            try:
                return await self._exchange.__aenter__()
            except UpstreamFailed as exc:
                if not await self._may_retry(exc):
                    raise

    async def __aexit__(self, kind: object, exc: BaseException | None, trace: object) -> bool:
        await self._exchange.__aexit__(kind, exc, trace)  # type: ignore[arg-type]
        self._over = exc is None or not await self._may_retry(exc)
        return not self._over

    async def _may_retry(self, exc: BaseException) -> bool:
        """Whether to retry after `exc`: at most once after a failure, at most three times after a refusal, and always
        when the pool has broken off a background prompt."""
        if isinstance(exc, UpstreamFailed) and exc.code == BROKEN_OFF:  # only while that is possible
            logger.info("%s; it is sent again", exc)
            note_now(self._request.journal, StepKind.RETRY, why=str(exc))
            return True
        if not self.again or self._begun():
            return False
        if isinstance(exc, UpstreamRefused):
            self._amends += 1
            amended = await self._amend(exc) if self._amend is not None and self._amends <= MOST_AMENDS else None
            self._request = amended or self._request
            if amended is not None:
                note_now(amended.journal, StepKind.RETRY, why=f"its server refused it: {exc}")
            return amended is not None
        if isinstance(exc, UpstreamFailed) and exc.status == 502 and exc.code not in _FINAL:
            logger.warning("%s before the first byte: %s; retrying", self._request.path.partition("?")[0], exc)
        else:
            return False
        note_now(self._request.journal, StepKind.RETRY, why=str(exc))
        self.again = False
        return True


async def post_json(model: Model, path: str, body: Json, *, slot: bool = False, timing: Timing | None = None) -> Json:
    """POST a small request to the model's server; returns its JSON answer. Sets `sent_s` of `timing` if it is 0; a
    record gets what the request waited for.

    Raises: UpstreamRefused with the server's own message, UpstreamFailed.
    """
    prepared = model.prepare(body)
    request = UpstreamRequest("POST", path, serialise(body), JSON_HEADERS, slot, prepared=prepared)
    request.journal = timing if isinstance(timing, RequestRecord) else None
    return await fetch_json(model, request, timing=timing)


async def fetch_json(
    model: Model,
    request: UpstreamRequest,
    opened: Callable[[], None] | None = None,
    *,
    timing: Timing | None = None,
) -> Json:
    """The JSON answer to `request`; `opened` is called when the server answers. Raises: as `post_json`."""
    async for attempt in Attempts(model, request):
        async with attempt as upstream:
            if opened is not None:
                opened()
            if timing is not None:
                timing.sent_s = timing.sent_s or upstream.sent_s
            if not succeeded(upstream.status):
                raise await refusal(upstream)
            answer = await upstream.read(ANSWER_LIMIT)
    if answer is not None and len(answer) > OFF_LOOP_BYTES:
        return await asyncio.get_running_loop().run_in_executor(None, parsed_answer, answer)
    return parsed_answer(answer)


def parsed_answer(body: bytes | None) -> Json:
    """The JSON object in a server's answer. Raises: UpstreamFailed if it is anything else."""
    with suppress(orjson.JSONDecodeError):
        answer = orjson.loads(body or b"")
        if isinstance(answer, dict):
            return answer
    raise UpstreamFailed("the model server's answer cannot be understood", code="upstream_error")


async def refusal(upstream: UpstreamResponse) -> ProxyError:
    """The error for an answer with another status than that of success, with the server's own message."""
    return refused(upstream.status, await upstream.read(ERROR_LIMIT) or b"")


def succeeded(status: int) -> bool:
    """Whether an answer with this status has a body that is the result; some frameworks answer every POST with 201."""
    return 200 <= status < 300 and status != 204


def unreadable(exc: Exception) -> UpstreamFailed:
    """The error for an answer that does not have the API's shape; `exc` is its cause."""
    logger.warning("an answer cannot be understood: %s: %s", type(exc).__name__, exc)
    return UpstreamFailed("the model server's answer cannot be understood", code="upstream_error")


def frame_too_long() -> UpstreamFailed:
    """The error for a frame over the size limit."""
    return UpstreamFailed("the model server sent an event over 8 MiB", code="upstream_frame_too_long")


def incomplete() -> UpstreamFailed:
    """The error for a stream that ended without its end mark."""
    return UpstreamFailed("the model server ended its answer before it was complete", code="upstream_incomplete")


def not_a_stream(what: str) -> UpstreamFailed:
    """The error for `what` in the place of an answer."""
    return UpstreamFailed(f"the model server answered with {what} instead of a completion", code="upstream_error")
