"""Encodes chunks of an answer into the bytes for the client. No I/O.

An unchanged chunk received in the client's own API is sent as the original bytes; every other one is encoded anew.
Agents cannot make the output an invalid answer: it always has an end, and nothing follows the end.
"""

from __future__ import annotations

from llama_smart_proxy.proxy.chat import Chunk
from llama_smart_proxy.proxy.dialects.base import Dialect, Writer
from llama_smart_proxy.proxy.errors import ProxyError


class StreamEncoder:
    """Encodes one streamed answer; or `several` (an `n` over 1), each of which has an end."""

    def __init__(self, writer: Writer, dialect: Dialect, *, several: bool = False) -> None:
        self._writer = writer
        self._dialect = dialect
        self._held: list[Chunk] = []  # the chunk that ends an answer, and those after it
        self._finished: set[int] = set()
        self._several = several
        self._begun = {0}
        self._begun_message = False
        self._expected = 0  # the serial of the next chunk if none was dropped
        self._pure = True  # no chunk was encoded anew or dropped
        self._called = False  # the writer has received tool calls
        self._ended = False
        self._passed = 0  # chunks sent as their original bytes
        self._simple = False  # caches that a chunk with a frame can be sent as it is: `take` runs for every token

    def take(self, chunk: Chunk) -> bytes:
        """The bytes to send for this chunk; may be empty."""
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
            return self._write(chunk)  # delayed past the end by an agent; the held end follows it
        return self._flush() + self._write(chunk)

    def end(self, tail: bytes, chunks: int = 0) -> bytes:
        """The remaining bytes. `tail` are the server's bytes that ended the answer, empty if it was not read to its
        end; `chunks` is the number of chunks before."""
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
        """The bytes that replace `end` after a failure; held chunks are dropped."""
        return self._writer.error(exc)

    def _hold_end(self, chunk: Chunk) -> bytes:
        if chunk.index in self._finished:  # a second end: its content is sent before the first one
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
        """Whether an Ollama line can be sent as its original bytes. Not while the writer may hold tool calls, which
        must be sent first; the last line only if the writer has nothing to add to it."""
        return self._pure or not (self._called or chunk.finish_reason or chunk.tool_calls)

    def _write_stateful(self, chunk: Chunk, frame: bytes | None) -> bytes:
        """Anthropic's events depend on each other: original bytes are used only as long as all were. The writer
        receives every chunk, so that it can take over at any of them."""
        self._pure = self._pure and frame is not None and chunk.serial == self._expected
        self._expected += 1
        if not chunk.seen:  # a keep-alive; it is dropped while the message has not begun
            return (frame or b"") if self._pure or self._begun_message else b""
        written = self._writer.chunk(chunk.seen)
        self._begun_message = self._begun_message or bool(written)
        return frame if self._pure and frame is not None else written
