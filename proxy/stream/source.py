"""Where a stream of chunks comes from: one call to a model's server, frame by frame."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass

from llama_smart_proxy.backends.base import Model, UpstreamRequest
from llama_smart_proxy.backends.http.exchange import UpstreamResponse
from llama_smart_proxy.proxy.chat import ChatRequest, Chunk, Json
from llama_smart_proxy.proxy.dialects import ANTHROPIC
from llama_smart_proxy.proxy.dialects.base import Wire
from llama_smart_proxy.proxy.dialects.framing import FrameTooLong
from llama_smart_proxy.proxy.errors import ProxyError, UpstreamFailed, UpstreamRefused
from llama_smart_proxy.proxy.stream.relay import frame_too_long, incomplete, may_try_again
from llama_smart_proxy.proxy.stream.translate import refusal

logger = logging.getLogger(__name__)

_SIGNS_OF_LIFE = (b":", b"event: ping")
"""Events that say nothing, and mean nothing for those after them."""


class Frames:
    """Bytes of a server in, chunks out. With `verbatim` each keeps the bytes it came as, and `tail` are those of the
    frame that ended the answer: chunks and tail joined are what went in.

    `failure` is what is wrong with the answer, once the chunks before it were returned; `said` are the texts of all, if
    somebody `keeps_text`.
    """

    def __init__(self, wire: Wire, request: ChatRequest, *, verbatim: bool, keeps_text: bool = False) -> None:
        self._splitter = wire.splitter()
        self._reader = wire.reader(request)
        self._verbatim = verbatim
        self._grouped = wire.dialect is ANTHROPIC  # frames that open and close blocks belong to the next chunk
        self._held = b""
        self._serial = 0  # of the next chunk
        self.tail = b""
        self.failure: ProxyError | None = None
        self.said: list[str] = []
        self._keeps_text = keeps_text

    @property
    def done(self) -> bool:
        """Whether the answer has come to its end."""
        return self._reader.done

    @property
    def count(self) -> int:
        """How many chunks there have been."""
        return self._serial

    def broke_off(self, why: UpstreamFailed) -> None:
        """The connection has; behind the end of the answer that does no harm."""
        if not self.done:
            self.failure = why

    def feed(self, data: bytes) -> list[Chunk]:
        """The chunks that are whole now."""
        try:
            return self._chunks(self._splitter.take(data))
        except FrameTooLong:
            self.failure = frame_too_long()
            return []

    def finish(self) -> list[Chunk]:
        """What a last frame is whose line end was spared."""
        if self.failure is not None:
            return []
        rest = self._splitter.rest
        last = self._chunks(self._splitter.cut(rest)) if rest else []
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
                else:
                    self._add(data, frame, made)
        except UpstreamFailed as exc:
            self.failure = exc
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as exc:
            logger.warning("an answer cannot be understood: %s: %s", type(exc).__name__, exc)
            self.failure = UpstreamFailed("the model server's answer cannot be understood", code="upstream_error")
        if self._keeps_text:
            self.said += [chunk.text for chunk in made]
        return made

    def _add_silent(self, frame: bytes, made: list[Chunk]) -> None:
        """A frame that says nothing of the answer."""
        if self.done:
            self.tail += self._held + frame
            self._held = b""
        elif self._grouped and (self._held or not frame.lstrip(b"\r\n").startswith(_SIGNS_OF_LIFE)):
            self._held += frame
        elif self._verbatim:
            made.append(Chunk({}, frame, self._next()))

    def _add(self, data: Json, frame: bytes, made: list[Chunk]) -> None:
        if self._held:
            frame, self._held = self._held + frame, b""
        choices = data.get("choices") or ()
        for choice in choices:  # of another shape than the API's, it would have an agent fail that is not to blame
            delta = choice.get("delta")
            if delta is not None and (content := delta.get("content")) is not None and content.__class__ is not str:
                raise TypeError("content that is no text")
        if len(choices) > 1:  # a chunk tells of one
            made.extend(Chunk({**data, "choices": [choice]}, serial=self._next()) for choice in choices)
        else:
            made.append(Chunk(data, frame if self._verbatim else None, self._serial))
            self._serial += 1

    def _next(self) -> int:
        self._serial += 1
        return self._serial - 1


@dataclass(slots=True)
class Source:
    """One answer of a model's server, as an async iterator of chunks; to be read once, and closed.

    A server that breaks off before the first chunk is asked once more, and so is one that refuses, with what `amend`
    then gives. `opened` is called when it answers, `closing` with the text it said when that is complete; in both it is
    still held, and not any more in `closed`. `tail`, and the `count` of chunks before it, are there when all was read.
    """

    backend: Model
    call: UpstreamRequest
    wire: Wire
    request: ChatRequest
    verbatim: bool = False
    opened: Callable[[UpstreamResponse], None] | None = None
    closing: Callable[[str, UpstreamResponse], Awaitable[None]] | None = None
    closed: Callable[[], None] | None = None
    amend: Callable[[UpstreamRefused], UpstreamRequest | None] | None = None
    tail: bytes = b""
    count: int = 0

    async def chunks(self) -> AsyncGenerator[Chunk, None]:
        """Raises: UpstreamRefused with the server's own words, UpstreamFailed, and what opening the backend raises."""
        begun = False
        for last_try in (False, True):
            try:
                async with self.backend.open(self.call) as upstream:
                    frames = await self._begin(upstream)
                    data = b"..."
                    while data and frames.failure is None:  # not by a coroutine of its own: this runs for every token
                        try:
                            data = await upstream.piece()
                        except UpstreamFailed as exc:
                            data = b""
                            frames.broke_off(exc)
                        for chunk in frames.feed(data) if data else frames.finish():
                            begun = True
                            yield chunk
                    if frames.failure is not None:
                        raise frames.failure
                    await self._end(upstream, frames)
                return
            except UpstreamFailed as exc:
                if begun or last_try or not may_try_again(exc):
                    raise
                logger.warning("%s before the first chunk; trying once more", exc)
            except UpstreamRefused as exc:
                again = None if begun or last_try or self.amend is None else self.amend(exc)
                if again is None:
                    raise
                self.call = again
            finally:
                if self.closed is not None:
                    self.closed()

    async def _begin(self, upstream: UpstreamResponse) -> Frames:
        if upstream.status != 200:
            raise await refusal(upstream)
        if self.opened is not None:
            self.opened(upstream)
        return Frames(self.wire, self.request, verbatim=self.verbatim, keeps_text=self.closing is not None)

    async def _end(self, upstream: UpstreamResponse, frames: Frames) -> None:
        if self.closing is not None:
            await self.closing("".join(frames.said), upstream)
        self.tail, self.count = frames.tail, frames.count
