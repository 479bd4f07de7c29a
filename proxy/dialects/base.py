"""What a dialect must know for its clients to be served by a server that speaks another one.

A client's request goes `Face.decode` -> `Wire.encode`, the answer goes `Wire.reader` -> `Face.writer`; between them is
OpenAI's shape (`proxy.chat`). Nothing here does I/O, and every part is used in one direction only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from llama_smart_proxy.proxy.chat import ChatRequest, Json, Timing
from llama_smart_proxy.proxy.dialects import Dialect
from llama_smart_proxy.proxy.dialects.framing import Splitter
from llama_smart_proxy.proxy.errors import ProxyError


class Reader(Protocol):
    """Reads one streamed answer of a server, frame by frame.

    `done` is set by the frame that ends the answer; a stream that ends without it was broken off.
    """

    done: bool

    def read(self, frame: bytes) -> Json | None:
        """The chunk that `frame` means, None if it means none (a comment, `[DONE]`).

        Raises: UpstreamFailed for an error told in-stream, and for a frame that cannot be read.
        """


class Writer(Protocol):
    """Writes one answer to a client: either the bytes of a stream, or those of one whole body.

    Raises: UpstreamFailed, from any method but `error`, for what the client's API has no form for.
    """

    content_type: str
    """Of the stream; a whole body is `application/json`."""

    def chunk(self, chunk: Json) -> bytes:
        """The frames that this chunk becomes now; perhaps none."""

    def adopt(self, chunk: Json) -> None:
        """Take note of an answer's first chunk that leaves by another way, as it came."""

    def end(self) -> bytes:
        """What remains to be said after the last chunk of a good stream."""

    def error(self, exc: ProxyError) -> bytes:
        """What is said in place of `end` when it failed; empty before the first frame is possible, too."""

    def reply(self, completion: Json) -> bytes:
        """The body of the whole answer, from a `chat.completion` made by `Fold`."""


@dataclass(frozen=True, slots=True)
class Face:
    """How clients ask one endpoint for a generated answer.

    `decode` makes an OpenAI-shaped request of a parsed body (which it may take apart; it raises BadRequest for what
    cannot mean anything); `encode` is its inverse, and gives the body back with every field it had. `writer` writes the
    answer to a request.
    """

    dialect: Dialect
    decode: Callable[[Json], ChatRequest]
    encode: Callable[[ChatRequest], Json]
    writer: Callable[[ChatRequest, Timing], Writer]


@dataclass(frozen=True, slots=True)
class Wire:
    """How a server is asked for a streamed answer: `encode` gives path and body, `reader` reads the answer."""

    dialect: Dialect
    splitter: Callable[[], Splitter]
    encode: Callable[[ChatRequest], tuple[str, Json]]
    reader: Callable[[ChatRequest], Reader]
