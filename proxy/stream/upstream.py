"""One request to a model's server: retries, and decoding the answer into chunks.

Every request to a model goes through `Attempts`: the relay, streams, and the proxy's own requests.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, suppress

import orjson

from llama_smart_proxy.backends.base import Management, Model, UpstreamRequest
from llama_smart_proxy.backends.http.exchange import UpstreamResponse
from llama_smart_proxy.proxy.chat import ChatRequest, Chunk, Json
from llama_smart_proxy.proxy.dialects.base import UpstreamCodec
from llama_smart_proxy.proxy.dialects.framing import FrameTooLong
from llama_smart_proxy.proxy.dialects.openai import error_details, error_text
from llama_smart_proxy.proxy.errors import ProxyError, UpstreamFailed, UpstreamRefused
from llama_smart_proxy.proxy.http.body import serialise

logger = logging.getLogger(__name__)

ERROR_LIMIT = 1024 * 1024
"""Largest error body of a server that is read, in bytes."""
MESSAGE_LENGTH = 2000
"""Characters of a server's error message that are passed to the client; some servers send whole web pages."""
ANSWER_LIMIT = 64 * 1024 * 1024
"""Largest answer that is buffered, in bytes; thousands of embeddings are large."""
OFF_LOOP_BYTES = 1024 * 1024
"""Larger answers are parsed in a thread, so that other streams go on."""
JSON_HEADERS = [("Content-Type", "application/json")]
_FINAL = frozenset({"upstream_error", "upstream_frame_too_long", "pull_failed"})
"""Codes of failures that the server's answer reports or causes: a retry would have the same result."""
_KEEP_ALIVES = (b":", b"event: ping")
"""Events without content that do not affect later ones."""

Amend = Callable[[UpstreamRefused], UpstreamRequest | None]
"""Returns a modified request that the server may accept after its refusal; None if there is none."""


def _never() -> bool:
    return False


class Attempts(AbstractAsyncContextManager[UpstreamResponse]):
    """Sends a request, with one retry if the server was unreachable or disconnected before any of its answer was used:
    its instance is gone by then, and the retry gets a new one. A request that the server refuses is retried once as
    modified by `amend`.

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
                if not self._may_retry(exc):
                    raise

    async def __aexit__(self, kind: object, exc: BaseException | None, trace: object) -> bool:
        await self._exchange.__aexit__(kind, exc, trace)  # type: ignore[arg-type]
        self._over = exc is None or not self._may_retry(exc)
        return not self._over

    def _may_retry(self, exc: BaseException) -> bool:
        """Whether to retry after `exc`, which happens at most once."""
        if not self.again or self._begun():
            return False
        if isinstance(exc, UpstreamRefused):
            amended = self._amend(exc) if self._amend is not None else None
            if amended is None:
                return False
            self._request = amended
        elif isinstance(exc, UpstreamFailed) and exc.status == 502 and exc.code not in _FINAL:
            logger.warning("%s before the first byte: %s; retrying", self._request.path.partition("?")[0], exc)
        else:
            return False
        self.again = False
        return True


class StreamDecoder:
    """Decodes a server's bytes into chunks. With `verbatim` each chunk keeps its original bytes, and `tail` has those
    of the frame that ended the answer: all chunks and the tail, joined, are the input.

    `failure` is set when the answer is invalid or exceeds `limit` bytes, after the chunks before it were returned.
    `texts` are the texts of all chunks, with `keep_text`.
    """

    def __init__(
        self,
        codec: UpstreamCodec,
        request: ChatRequest,
        *,
        verbatim: bool = False,
        keep_text: bool = False,
        limit: int | None = None,
    ) -> None:
        self._splitter = codec.splitter()
        self._reader = codec.reader(request)
        self._verbatim = verbatim
        self._grouped = codec.dialect.stateful_frames  # frames that open and close blocks belong to the next chunk
        self._held = b""
        self._serial = 0  # of the next chunk
        self._left = limit
        self.tail = b""
        self.usage: Json | None = None
        """The token counts of the last chunk that had any."""
        self.failure: ProxyError | None = None
        self.texts: list[str] | None = [] if keep_text else None

    @property
    def done(self) -> bool:
        """Whether the answer has ended."""
        return self._reader.done

    @property
    def count(self) -> int:
        """The number of chunks so far."""
        return self._serial

    def connection_failed(self, failure: ProxyError) -> None:
        """Record that the connection failed; ignored after the end of the answer."""
        if not self.done and self.failure is None:
            self.failure = failure

    def feed(self, data: bytes) -> list[Chunk]:
        """The chunks completed by `data`; none after a failure."""
        if self.failure is not None:
            return []
        if self._left is not None:
            self._left -= len(data)
            if self._left < 0:
                self.failure = UpstreamFailed(f"the answer is over {ANSWER_LIMIT // 2**20} MiB", code="upstream_error")
                return []
        try:
            return self._chunks(self._splitter.split(self._splitter.push(data)))
        except FrameTooLong:
            self.failure = frame_too_long()
            return []

    def finish(self) -> list[Chunk]:
        """The chunks of a last frame without a line end. Sets `failure` if the answer has not ended."""
        if self.failure is not None:
            return []
        rest = self._splitter.rest
        last = self._chunks(self._splitter.split(rest)) if rest else []
        if not self.done and self.failure is None:
            self.failure = incomplete()
        return last

    def _chunks(self, frames: list[bytes]) -> list[Chunk]:
        made: list[Chunk] = []
        read = self._reader.read
        try:
            for frame in frames:
                data = read(frame)
                if data is None:
                    self._add_silent(frame, made)
                    continue
                choices = data.get("choices")
                if not choices or len(choices) != 1 or self._held or "usage" in data:
                    self._add(data, frame, made)
                    continue
                delta = choices[0].get("delta")  # as in `_add`: a call for each token would be a tenth of its cost
                if delta is not None and (content := delta.get("content")) is not None and content.__class__ is not str:
                    raise TypeError("content is not text")
                made.append(Chunk(data, frame if self._verbatim else None, self._serial))
                self._serial += 1
        except UpstreamFailed as exc:
            self.failure = exc
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as exc:
            self.failure = unreadable(exc)
        if self.texts is not None:
            self.texts += [chunk.text for chunk in made if not chunk.index]
        return made

    def _add_silent(self, frame: bytes, made: list[Chunk]) -> None:
        """Handle a frame without content."""
        if self.done:
            self.tail += self._held + frame
            self._held = b""
        elif self._grouped and (self._held or not frame.lstrip(b"\r\n").startswith(_KEEP_ALIVES)):
            self._held += frame
        elif self._verbatim:
            made.append(Chunk({}, frame, self._next()))

    def _add(self, data: Json, frame: bytes, made: list[Chunk]) -> None:
        if self._held:
            frame, self._held = self._held + frame, b""
        if "usage" in data:
            self.usage = data["usage"]
        choices = data.get("choices") or ()
        for choice in choices:  # an invalid one would fail in an agent, which is not at fault
            delta = choice.get("delta")
            if delta is not None and (content := delta.get("content")) is not None and content.__class__ is not str:
                raise TypeError("content is not text")
        if len(choices) > 1:  # a chunk has one choice
            made.extend(Chunk({**data, "choices": [choice]}, serial=self._next()) for choice in choices)
        else:
            made.append(Chunk(data, frame if self._verbatim else None, self._serial))
            self._serial += 1

    def _next(self) -> int:
        self._serial += 1
        return self._serial - 1


async def post_json(model: Model, path: str, body: Json, *, slot: bool = False) -> Json:
    """POST a small request to the model's server; returns its JSON answer.

    Raises: UpstreamRefused with the server's own message, UpstreamFailed.
    """
    prepared = model.prepare(body)
    request = UpstreamRequest("POST", path, serialise(body), JSON_HEADERS, slot, prepared=prepared)
    return await fetch_json(model, request)


async def fetch_json(model: Model, request: UpstreamRequest, opened: Callable[[], None] | None = None) -> Json:
    """The JSON answer to `request`; `opened` is called when the server answers. Raises: as `post_json`."""
    async for attempt in Attempts(model, request):
        async with attempt as upstream:
            if opened is not None:
                opened()
            if upstream.status != 200:
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
    """The error for an answer with an error status, with the server's own message."""
    body = await upstream.read(ERROR_LIMIT) or b""
    message, details = body.decode(errors="replace").strip(), Json()
    with suppress(orjson.JSONDecodeError):
        parsed = orjson.loads(body)
        message, details = error_text(parsed), error_details(parsed)
    message = message[:MESSAGE_LENGTH] or f"the model server answered with status {upstream.status}"
    return UpstreamRefused(message, status=upstream.status if upstream.status >= 400 else 502, details=details)


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
