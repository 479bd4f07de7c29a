"""Chunks of an answer, as the bytes its client gets. No I/O.

A chunk that nobody has changed leaves as the bytes it came as, if it came in the client's own API; every other one is
written anew. Whatever agents did to the chunks, what leaves is a proper answer: nothing stands behind its end, and the
end is always there.
"""

from __future__ import annotations

from llama_smart_proxy.proxy.chat import Chunk
from llama_smart_proxy.proxy.dialects.base import Dialect, Writer
from llama_smart_proxy.proxy.errors import ProxyError


class StreamEncoder:
    """Writes one streamed answer; or `several` (an `n` over 1), each of which has its end."""

    def __init__(self, writer: Writer, dialect: Dialect, *, several: bool = False) -> None:
        self._writer = writer
        self._dialect = dialect
        self._held: list[Chunk] = []  # from the first one that ends an answer
        self._finished: set[int] = set()
        self._several = several
        self._begun = {0}
        self._begun_message = False
        self._expected = 0  # the serial of the next chunk, if none was dropped
        self._pure = True  # nothing was written anew, and nothing dropped
        self._called = False  # the writer was given tool calls
        self._ended = False
        self._passed = 0  # chunks that left as they came
        self._simple = False  # the next chunk leaves as it came, if it can; what `take` would find out for each token

    def take(self, chunk: Chunk) -> bytes:
        """What leaves because of this chunk; perhaps nothing yet."""
        frame = chunk.frame
        if frame is not None and self._simple and not chunk.finish_reason:
            self._passed += 1
            return frame
        if self._several and chunk.choice:
            self._begun.add(chunk.index)
        if not self._held and not chunk.finish_reason:
            return self._write(chunk)
        if chunk.finish_reason:
            return self._hold_end(chunk)
        if not chunk.choice or (not chunk.delta and chunk.frame is not None):
            self._held.append(chunk)  # usage, and the like
            return b""
        if chunk.index in self._finished:
            return self._write(chunk)  # somebody held this back for too long: before the end, then
        return self._flush() + self._write(chunk)

    def end(self, tail: bytes, chunks: int = 0) -> bytes:
        """What is left to be written. `tail` is how the server ended its answer, if it was read to there, and `chunks`
        how many there were before."""
        written = self._flush()
        if tail and self._passed == chunks:  # nothing was changed, dropped or added
            return written + tail
        for index in sorted(self._begun - self._finished):  # an agent stopped early, or dropped the end
            written += self._write(Chunk.ending(index=index))
        if self._ended or (self._dialect.stateful_frames and self._pure and tail):
            return written + tail
        ending = self._writer.end()
        return written + (tail if tail and ending == self._dialect.ending else ending)

    def error(self, exc: ProxyError) -> bytes:
        """What is written in place of `end`. What a failed answer would have ended with is not said any more."""
        return self._writer.error(exc)

    def _hold_end(self, chunk: Chunk) -> bytes:
        if chunk.index in self._finished:  # there is an end already; what else this one says comes before it
            if not chunk.delta:
                return b""
            chunk.finish_reason = None
            return self._write(chunk)
        self._finished.add(chunk.index)
        self._held.append(chunk)
        self._simple = False
        return b""

    def _flush(self) -> bytes:
        held, self._held = self._held, []
        return b"".join(map(self._write, held))

    def _write(self, chunk: Chunk) -> bytes:
        frame = chunk.frame
        if self._dialect.stateful_frames:
            return self._write_stateful(chunk, frame)
        if frame is not None and (not self._dialect.last_frame_sums or self._may_pass(chunk)):
            if chunk.finish_reason:
                self._ended = self._dialect.is_end(frame)
            if self._expected == 0:
                self._expected = 1
                self._writer.adopt(chunk.seen)
                self._simple = not (self._several or self._finished or self._dialect.last_frame_sums)
            self._passed += 1
            return frame
        self._pure = False
        self._called = self._called or bool(chunk.tool_calls)
        return self._writer.chunk(chunk.seen)

    def _may_pass(self, chunk: Chunk) -> bool:
        """Whether an Ollama line can leave as it came. Not when the writer may hold tool calls, which have to leave
        before; and the last one only if there is nothing that the writer would have to tell there."""
        return self._pure or not (self._called or chunk.finish_reason or chunk.tool_calls)

    def _write_stateful(self, chunk: Chunk, frame: bytes | None) -> bytes:
        """Anthropic's events build on one another: they pass as long as all have passed. The writer is told of each, so
        that it can go on from any of them."""
        self._pure = self._pure and frame is not None and chunk.serial == self._expected
        self._expected += 1
        if not chunk.seen:  # a server's sign of life; no message begins with one that has lost its beginning
            return (frame or b"") if self._pure or self._begun_message else b""
        written = self._writer.chunk(chunk.seen)
        self._begun_message = self._begun_message or bool(written)
        return frame if self._pure and frame is not None else written
