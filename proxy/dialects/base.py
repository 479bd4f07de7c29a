"""What a wire API has to answer for: everything in which it differs from others is said here, and asked nowhere else.

A client's request goes `ClientCodec.decode` -> `UpstreamCodec.encode`, the answer goes `UpstreamCodec.reader` ->
`ClientCodec.writer`; between them is OpenAI's shape (`proxy.chat`). Nothing here does I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Protocol

import orjson

from llama_smart_proxy.proxy.chat import ChatRequest, Json, Timing, bare, first_text_part
from llama_smart_proxy.proxy.dialects.framing import Splitter
from llama_smart_proxy.proxy.errors import BadRequest, ProxyError


def _as_it_came(body: Json, params: Mapping[str, str]) -> Json:
    return body


def _no_usage(frames: bytes) -> Json | None:
    return None


@dataclass(frozen=True, slots=True)
class Dialect:
    """One wire API, as far as it concerns answers that pass as bytes.

    `error_body` is the JSON of a failed request, `error_event` the same within a stream. `is_end` and `is_error`
    recognise the last event of a good and of a failed stream in the newest whole events. `ending` is what a client
    waits for after either (empty: nothing). `usage` reads the count of tokens, in OpenAI's shape, out of the last
    frames of a stream or a whole body.
    """

    name: str
    error_body: Callable[[ProxyError], bytes]
    error_event: Callable[[ProxyError], bytes]
    is_end: Callable[[bytes], bool]
    is_error: Callable[[bytes], bool]
    ending: bytes = b""
    usage: Callable[[bytes], Json | None] = _no_usage
    bind: Callable[[Json, Mapping[str, str]], Json] = _as_it_came
    """The body as it is understood: with what its path says (`params`: the named parts of the endpoint's pattern), and
    with field names in one spelling. The model's name is then in `model`, whether to stream in `stream`."""
    cuts: bool = False
    """A failed stream is cut off behind the error, as clients take a stream that ends properly for a whole answer."""
    json_errors: bool = False
    """Clients can read no error that is not JSON, such as the page of a web server in front of the model's."""
    stateful_frames: bool = False
    """A frame builds on those before it, so frames pass as they came only as long as all have."""
    last_frame_sums: bool = False
    """The last frame repeats what frames before it contained, so it passes as it came only if these did."""


def has_line(events: bytes, *starts: bytes) -> bool:
    """Whether a line begins with one of `starts`. Text of an answer cannot: its line ends are escaped in the JSON."""
    return events.startswith(starts) or any(end + start in events for start in starts for end in (b"\n", b"\r"))


def last_objects(frames: bytes) -> Iterator[Json]:
    """The JSON objects of events, of lines, or of a whole body, the last one first; what cannot be read is left out."""
    for line in (*reversed(frames.strip().split(b"\n")), frames):
        data = line.removeprefix(b"data:").strip()
        if data.startswith(b"{"):
            with suppress(orjson.JSONDecodeError):
                yield orjson.loads(data)


def counts(prompt: object, completion: object, cached: object = None) -> Json | None:
    """The count of tokens in OpenAI's shape; None if a server has sent no numbers."""
    if not isinstance(prompt, int) or not isinstance(completion, int):
        return None
    usage: Json = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return usage | ({"prompt_tokens_details": {"cached_tokens": cached}} if isinstance(cached, int) else {})


class Reader(Protocol):
    """Reads one streamed answer of a server, frame by frame.

    `done` is set by the frame that ends the answer; a stream that ends without it was broken off.
    """

    done: bool

    def read(self, frame: bytes) -> Json | None:
        """The chunk that `frame` means, None if it means none (a comment, `[DONE]`).

        Raises: UpstreamFailed for an error in the stream, and for a frame that cannot be read.
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
        """What remains to be sent after the last chunk of a good stream."""

    def error(self, exc: ProxyError) -> bytes:
        """What is sent in place of `end` when it failed; empty before the first frame is possible, too."""

    def reply(self, completion: Json) -> bytes:
        """The body of the whole answer, from a `chat.completion` made by `Fold`."""


@dataclass(frozen=True, slots=True)
class UpstreamCodec:
    """How a server is asked for a streamed answer: `encode` gives path and body, `reader` reads the answer."""

    dialect: Dialect
    splitter: Callable[[], Splitter]
    encode: Callable[[ChatRequest], tuple[str, Json]]
    reader: Callable[[ChatRequest], Reader]


class Loading(StrEnum):
    """What a request is for that asks for no answer."""

    LOAD = "load"
    UNLOAD = "unload"


class ClientCodec:
    """How clients ask one endpoint for a generated answer, and how they get it. The defaults are what most APIs do.

    `same_api` is how a server that speaks this API itself is asked when agents see the answer: what no agent changes
    leaves as it came. Without it such a server is asked as any other.
    """

    dialect: ClassVar[Dialect]
    same_api: ClassVar[UpstreamCodec | None] = None
    resends_chat: ClassVar[bool] = True
    """Each request repeats the chat from its beginning, which tells one chat from others."""
    thinking_is_optional: ClassVar[bool] = True
    """A request that asks a model for thoughts is answered without them by one that cannot think, not refused."""

    def decode(self, body: Json) -> ChatRequest:
        """The OpenAI-shaped request that a parsed body means; may take the body apart.

        Raises: BadRequest for what cannot mean anything.
        """
        raise NotImplementedError

    def encode(self, request: ChatRequest) -> Json:
        """The inverse: the body, with every field it had."""
        raise NotImplementedError

    def writer(self, request: ChatRequest, timing: Timing) -> Writer:
        """Writes the answer to `request`."""
        raise NotImplementedError

    def user_text(self, body: Json) -> str:
        """The user's last text in an undecoded body, found by a cheap look; empty if there is none."""
        messages = body.get("messages")
        if not isinstance(messages, list):
            prompt = body.get("prompt")
            prompt = prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt
            return prompt if isinstance(prompt, str) else ""
        for message in reversed(messages):
            if isinstance(message, dict) and message.get("role") == "user":
                content = message.get("content")
                part = first_text_part(content) if isinstance(content, list) else None
                if part is not None or isinstance(content, str):
                    return str(part["text"]) if part is not None else str(content)
        return ""

    def fits(self, request: ChatRequest) -> bool:
        """Whether a body of this endpoint can express all of `request`: an agent may have set fields that only a server
        knows, such as `id_slot`. Texts do not matter for that, and may be large, so they are left out."""
        content: Json = {"prompt": "x"} if request.is_text else {"messages": [{"role": "user", "content": "x"}]}
        probe = ChatRequest({**request.body, **content}, request.stream).copy()
        try:
            return set(bare(probe.body)) <= set(self.decode(self.encode(probe)).body)
        except (AttributeError, KeyError, TypeError, ValueError, BadRequest):
            return True  # it cannot be expressed in any API, as will turn out

    def loading(self, body: Json) -> Loading | None:
        """What the body is for if not for an answer."""
        return None

    def load_reply(self, model: str, loading: Loading) -> Json:
        """The answer to such a body."""
        raise NotImplementedError

    def keep_alive_s(self, body: Json) -> float | None:
        """Seconds that the model is to stay loaded when idle, if the body says so. Raises: BadRequest."""
        return None

    def needs(self, body: Json) -> str | None:
        """The capability without which a model cannot answer the body, if it asks for a special one."""
        return None
