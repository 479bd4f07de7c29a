"""Decodes a server's answer into chunks. No I/O."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson

from llama_smart_proxy.proxy.chat import ChatRequest, Chunk, Json
from llama_smart_proxy.proxy.dialects.base import UpstreamCodec
from llama_smart_proxy.proxy.dialects.framing import BOM, FrameTooLong, opening
from llama_smart_proxy.proxy.dialects.loose_json import loose_json
from llama_smart_proxy.proxy.dialects.upstream_errors import bare_error_in
from llama_smart_proxy.proxy.errors import ProxyError, UpstreamFailed, UpstreamRefused
from llama_smart_proxy.proxy.stream.normaliser import Normaliser
from llama_smart_proxy.proxy.stream.upstream import ANSWER_LIMIT, frame_too_long, incomplete, not_a_stream, unreadable

_KEEP_ALIVES = (b":", b"event: ping")
"""Events without content that do not affect later ones."""
Progressed = Callable[[Json], None]
"""Called with llama-server's `prompt_progress`: `total`, `cache` and `processed` tokens. Source: llama.cpp
tools/server/README.md, b11434."""
_BLANK_LIMIT = 64 * 1024
"""Most blank bytes in front of an answer that are kept until it shows what it is."""


def _nothing() -> None:
    """Does nothing."""


class StreamDecoder:
    """Decodes a server's bytes into chunks, in OpenAI's form however the server deviates from it. With `verbatim` each
    chunk keeps its original bytes, and `tail` has those of the frame that ended the answer: all chunks and the tail,
    joined, are the input up to its end, but for a byte order mark and for chunks whose bytes deviate too far.

    A server that ignores the request for a stream, and sends one JSON object, is understood too. `ended` is called when
    the answer has ended, although its server may keep the connection open.

    `progressed`, if there is one, gets the server's reports of how much of the prompt it has processed, which are no
    chunks then. `failure` is set when the answer is invalid or exceeds `limit` bytes, after the chunks before it were
    returned. `texts` are the texts of all chunks, with `keep_text`.
    """

    def __init__(
        self,
        codec: UpstreamCodec,
        request: ChatRequest,
        *,
        verbatim: bool = False,
        keep_text: bool = False,
        limit: int | None = None,
        ended: Callable[[], None] = _nothing,
        progressed: Progressed | None = None,
    ) -> None:
        self._splitter = codec.splitter()
        self._reader = codec.reader(request)
        self._normaliser = Normaliser(_choices(request), renames=codec.renames, verbatim=verbatim)
        self._verbatim = verbatim
        self._grouped = codec.dialect.stateful_frames  # frames that open and close blocks belong to the next chunk
        self._start: bytes | None = b""  # the first bytes; None once they show that this is a stream
        self._whole: list[bytes] | None = None  # the bytes of an answer that is none
        self._held = b""
        self._serial = 0  # of the next chunk
        self._left = limit
        self._ended = ended
        self._progressed = progressed
        self.done = False
        """Whether the answer has ended."""
        self.tail = b""
        self.usage: Json | None = None
        """The token counts of the last chunk that had any."""
        self.failure: ProxyError | None = None
        self.texts: list[str] | None = [] if keep_text else None

    @property
    def count(self) -> int:
        """The number of chunks so far."""
        return self._serial

    def connection_failed(self, failure: ProxyError) -> None:
        """Record that the connection failed; ignored after the end of the answer."""
        if not self.done and self.failure is None:
            self.failure = failure

    def feed(self, data: bytes) -> list[Chunk]:
        """The chunks completed by `data`; none after a failure, and after the end."""
        if self.failure is not None or self.done:
            return []
        if self._left is not None:
            self._left -= len(data)
            if self._left < 0:
                self.failure = UpstreamFailed(f"the answer is over {ANSWER_LIMIT // 2**20} MiB", code="upstream_error")
                return []
        if self._start is not None:
            data = self._begin(data)
        if not data:
            return []
        if self._whole is not None:
            self._keep(data)
            return []
        try:
            return self._chunks(self._splitter.split(self._splitter.push(data)))
        except FrameTooLong:
            self.failure = frame_too_long()
            return []

    def finish(self) -> list[Chunk]:
        """The chunks of a last frame without a line end. Sets `failure` if the answer has not ended: a stream that
        ended properly after its finish reasons is complete."""
        if self.failure is not None or self.done:  # what follows the end is not part of the answer
            return []
        rest = self._splitter.rest or self._start
        last = self._chunks(self._splitter.split(rest)) if rest else []
        if self._whole is not None:
            last = self._unstreamed(b"".join(self._whole))
        if self.failure is None and not self.done:
            if self._normaliser.finished:
                last = [Chunk(chunk.seen, None, chunk.serial) for chunk in last]  # its bytes lack a line end
                self._end(last)
            else:
                self.failure = incomplete()
        return last

    # -- an answer that is not a stream ------------------------------------------------------------------------------

    def _begin(self, data: bytes) -> bytes:
        """The bytes to decode, once the first of them show what they are."""
        data = (self._start or b"") + data
        first = opening(data)
        if first is None and len(data) < _BLANK_LIMIT:
            self._start = data
            return b""
        self._start = None
        if first == b"<":
            self.failure = not_a_stream("a web page")
        elif first is not None and first not in self._splitter.openings:
            self._whole = []
        return data.removeprefix(BOM)

    def _keep(self, data: bytes) -> None:
        assert self._whole is not None
        self._whole.append(data)
        if self._left is None:
            self._left = ANSWER_LIMIT - len(data)

    def _unstreamed(self, body: bytes) -> list[Chunk]:
        """The chunks of a whole answer, or of lines of JSON."""
        self._verbatim = False
        made: list[Chunk] = []
        try:
            objects = _objects(body)
        except ValueError:
            self.failure = incomplete()
            return made
        for value in objects:
            if self.failure is None:
                self.failure = bare_error_in(value) if isinstance(value, dict) else not_a_stream("JSON")
            if self.failure is None:
                made += self._chunks([b"data: " + orjson.dumps(value) + b"\n\n"])
        if self.failure is None and not any(chunk.choice for chunk in made):
            self.failure = not_a_stream("JSON")
        elif self.failure is None and not self.done:
            self._end(made)
        return made

    # -- a stream ----------------------------------------------------------------------------------------------------

    def _chunks(self, frames: list[bytes]) -> list[Chunk]:
        made: list[Chunk] = []
        read = self._reader.read
        try:
            remaining = iter(frames)
            for frame in remaining:
                data = read(frame)
                if data is None:
                    if self._reader.done:
                        self.tail = b"".join((self._held, frame, *remaining)) if self._verbatim else b""
                        self._held = b""
                        break
                    self._add_silent(frame, made)
                    continue
                choices = data.get("choices")
                if choices and len(choices) == 1 and "usage" not in data and not self._held:
                    choice = choices[0]  # the usual token, without a call: that would be a tenth of its cost
                    delta = choice.get("delta") if choice else None
                    is_text = delta and len(delta) == 1 and delta.get("content").__class__ is str
                    if is_text and choice.get("finish_reason") is None and choice.get("index") == 0:
                        made.append(Chunk(data, frame if self._verbatim else None, self._serial))
                        self._serial += 1
                        continue
                self._add(data, frame, made)
                if self._reader.done:
                    break
        except (UpstreamFailed, UpstreamRefused) as exc:
            self.failure = exc if not self._reader.done else None
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as exc:
            self.failure = unreadable(exc) if not self._reader.done else None
        if self._reader.done and not self.done and self.failure is None:
            self._end(made)
        if self.texts is not None:
            self.texts += [chunk.text for chunk in made if not chunk.index]
        return made

    def _add_silent(self, frame: bytes, made: list[Chunk]) -> None:
        """Handle a frame without content."""
        if self._grouped and (self._held or not frame.lstrip(b"\r\n").startswith(_KEEP_ALIVES)):
            self._held += frame
        elif self._verbatim:
            made.append(Chunk({}, frame, self._next()))

    def _add(self, data: Json, frame: bytes, made: list[Chunk]) -> None:
        if self._progressed is not None and isinstance(report := data.get("prompt_progress"), dict):
            self._progressed(report)
            return
        if self._held:
            frame, self._held = self._held + frame, b""
        changed = self._normaliser.normalise(data)
        if "usage" in data:
            self.usage = data["usage"]
        choices = data["choices"]
        if len(choices) > 1:  # a chunk has one choice
            made.extend(Chunk({**data, "choices": [choice]}, serial=self._next()) for choice in choices)
        else:
            made.append(Chunk(data, frame if self._verbatim and not changed else None, self._next()))

    def _end(self, made: list[Chunk]) -> None:
        """Complete the answer; `made` are its last chunks."""
        self.done = True
        rest = self._normaliser.rest()
        if rest is not None:
            made.extend(Chunk({"choices": [choice]}, serial=self._next()) for choice in rest["choices"])
        self._ended()

    def _next(self) -> int:
        self._serial += 1
        return self._serial - 1


def _choices(request: ChatRequest) -> int:
    n = request.body.get("n")
    return n if isinstance(n, int) and n > 1 else 1


def _objects(body: bytes) -> list[Any]:
    """The JSON value of `body`, or those of its lines."""
    try:
        value = loose_json(body)
        return value if isinstance(value, list) and len(value) == 1 else [value]
    except ValueError:
        return [loose_json(line) for line in body.splitlines() if line.strip()]
