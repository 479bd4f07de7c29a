"""The interface of a wire API. Code outside this package does not depend on which API it handles.

A request goes through `ClientCodec.decode` and `UpstreamCodec.encode`, its answer through `UpstreamCodec.reader` and
`ClientCodec.writer`; in between both have OpenAI's shape (`proxy.chat`). No I/O.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, NamedTuple, Protocol

import orjson

from llama_smart_proxy.proxy.chat import (
    ChatRequest,
    Json,
    Timing,
    first_text_part,
    text_of,
    without_extensions,
)
from llama_smart_proxy.proxy.dialects.framing import Splitter
from llama_smart_proxy.proxy.dialects.limits import Allowance, openai_headers
from llama_smart_proxy.proxy.errors import BadRequest, ModelNotFound, ProxyError


def _unchanged(body: Json, params: Mapping[str, str]) -> Json:
    return body


def _always(_: object) -> bool:
    return True


def _never(_: object) -> bool:
    return False


def _no_usage(frames: bytes) -> Json | None:
    return None


def _not_found(name: object, exc: ModelNotFound) -> ProxyError:
    return exc


@dataclass(frozen=True, slots=True)
class Dialect:
    """One wire API, as far as relayed answers and errors require it.

    `error_body` returns the JSON of a failed request, `error_event` the same as a frame of a stream. `is_end` and
    `is_error` return whether the newest whole frames contain the last one of a successful or a failed stream. `ending`
    is what clients expect after either; may be empty. `usage` reads the token counts, in OpenAI's shape, from the last
    frames of a stream or from a whole body; None if there are none.
    """

    name: str
    error_body: Callable[[ProxyError], bytes]
    error_event: Callable[[ProxyError], bytes]
    is_end: Callable[[bytes], bool]
    is_error: Callable[[bytes], bool]
    ending: bytes = b""
    is_finished: Callable[[bytes], bool] = _never
    """Whether these frames, the last ones of a stream that ended properly, complete the answer although `is_end` is
    false of them: some servers leave out the last frame."""
    stream_type: str = "text/event-stream"
    """Content type of a stream."""
    end_mark: bytes = b""
    """Bytes that are in every last frame and in hardly another one, so that looking for them costs little."""
    matched_context_error: bool = True
    """Clients match the message or the code of the error for a prompt over the model's context."""
    is_error_body: Callable[[bytes], bool] = _always
    """Whether clients can read this body of a failed request, unlike that of a web server in front of the model's."""
    usage: Callable[[bytes], Json | None] = _no_usage
    not_found: Callable[[object, ModelNotFound], ProxyError] = _not_found
    """The error for a name that no model has, which may be an invalid name."""
    bind: Callable[[Json, Mapping[str, str]], Json] = _unchanged
    """Normalizes a parsed body: adds the values from its path (`params`: the named parts of the endpoint's pattern) and
    normalizes field names. Afterwards `model` is the model's name and `stream` whether to stream."""
    binds_slowly: Callable[[Json], bool] = _never
    """Whether `bind` of this body takes time in proportion to it."""
    cuts: bool = False
    """The connection is aborted after an error in a stream: clients take a proper end for a complete answer."""
    stateful_frames: bool = False
    """A frame depends on those before it, so frames are passed on unchanged only as long as all have been."""
    id_headers: tuple[str, ...] = ()
    """The response headers in which clients look for a request's id, besides `X-Request-Id`."""
    is_announcement: Callable[[bytes], bool] = _never
    """Whether these frames, the first ones of a stream, have nothing of the answer in them: servers may send such long
    before its first token."""
    sign_of_life: bytes = b""
    """A frame of a stream that adds nothing, for clients that wait; empty if there is none."""
    limit_headers: Callable[[Sequence[Allowance]], list[tuple[str, str]]] = openai_headers
    """The headers that report what is left of a client's limits."""
    last_frame_sums: bool = False
    """The last frame summarizes those before it, so it is passed on unchanged only if all of them were."""


def has_line(events: bytes, *starts: bytes) -> bool:
    """Whether a line begins with one of `starts`. Generated text cannot match: JSON escapes its line ends."""
    return events.startswith(starts) or any(end + start in events for start in starts for end in (b"\n", b"\r"))


def has_only(*names: bytes) -> Callable[[bytes], bool]:
    """Returns whether events have names, and no others than these."""
    return lambda events: bool(found := _EVENT_NAME.findall(events)) and set(found) <= set(names)


_EVENT_NAME = re.compile(rb"^event: ?([^\r\n]*)", re.MULTILINE)


def last_objects(frames: bytes) -> Iterator[Json]:
    """The JSON objects of events, of lines, or of a whole body, last one first; anything unparsable is skipped."""
    rest = frames.replace(b"\r", b"\n") if b"\r" in frames else frames
    while rest:  # line by line from the end, as the last one is nearly always it
        rest, _, line = rest.rpartition(b"\n")
        data = line.removeprefix(b"data:").strip()
        if data.startswith(b"{"):
            try:
                yield orjson.loads(data)
            except orjson.JSONDecodeError:
                continue
    if b"\n" in frames:
        with suppress(orjson.JSONDecodeError):
            yield orjson.loads(frames)  # a whole body in several lines


def counts(prompt: object, completion: object, cached: object = None) -> Json | None:
    """OpenAI's `usage` of these token counts; None if they are not numbers."""
    if not isinstance(prompt, int) or not isinstance(completion, int):
        return None
    usage: Json = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return usage | ({"prompt_tokens_details": {"cached_tokens": cached}} if isinstance(cached, int) else {})


class Reader(Protocol):
    """Parses one streamed answer of a server, frame by frame.

    `done` is set by the frame that ends the answer; a stream that ends before is incomplete.
    """

    done: bool

    def read(self, frame: bytes) -> Json | None:
        """The chunk of `frame`; None if it has none (a comment, `[DONE]`).

        Raises: UpstreamRefused for an error in the stream, UpstreamFailed for an invalid frame.
        """


class Writer(Protocol):
    """Encodes one answer for a client, either as the frames of a stream or as one whole body.

    Raises: UpstreamFailed, from any method but `error`, for content that the client's API cannot express.
    """

    content_type: str
    """Of the stream; a whole body is `application/json`."""

    def chunk(self, chunk: Json) -> bytes:
        """The frames for this chunk; may be empty, as frames can be delayed."""

    def adopt(self, chunk: Json) -> None:
        """Record the first chunk of an answer whose frame is sent unchanged, so that later frames are consistent."""

    def end(self) -> bytes:
        """The frames that follow the last chunk of a successful stream."""

    def error(self, exc: ProxyError) -> bytes:
        """The frames that replace `end` when the answer failed; may be called before any chunk."""

    def reply(self, completion: Json) -> bytes:
        """The body of a whole answer, from a `chat.completion` made by `Fold`."""


@dataclass(frozen=True, slots=True)
class UpstreamCodec:
    """The API of a server: `encode` returns path and body of a request for a stream, `reader` parses its answer.
    `renames`: the reasoning of its answers gets OpenAI's usual name for it, whichever the server uses."""

    dialect: Dialect
    splitter: Callable[[], Splitter]
    encode: Callable[[ChatRequest], tuple[str, Json]]
    reader: Callable[[ChatRequest], Reader]
    renames: bool = True


class Loading(StrEnum):
    """What a request does that generates no answer."""

    LOAD = "load"
    UNLOAD = "unload"


def limited(fields: Json, names: Sequence[str], most: int, *, always: bool) -> Json:
    """What to replace in `fields` so that those of these names are `most` at most; negative values are no limit. With
    `always`, the first one is added if there is none."""
    given = {name: fields[name] for name in names if fields.get(name) is not None}
    if not given:
        return {names[0]: most} if always else {}
    numbers = {name: limit for name, limit in given.items() if isinstance(limit, int | float)}
    return {name: most for name, limit in numbers.items() if not 0 <= limit <= most}


class TextPlace(NamedTuple):
    """Where a user's text is in an undecoded message: `holder[key]`; `holder` is None if the message has no text."""

    holder: Json | None
    key: str

    @property
    def text(self) -> str:
        text = self.holder.get(self.key) if self.holder is not None else None
        return text if isinstance(text, str) else ""


class ClientCodec:
    """Requests and answers of one endpoint that generates text. The defaults suit most APIs.

    `same_api` is used with agents for a server that implements this API itself: frames that no agent changes are then
    passed on unchanged. If it is None, such a server is used by its model's `codec`, like any other.
    """

    dialect: ClassVar[Dialect]
    same_api: ClassVar[UpstreamCodec | None] = None
    resends_chat: ClassVar[bool] = True
    """Each request repeats the chat from its beginning."""
    messages_field: ClassVar[str] = "messages"
    """The field that holds it."""
    system_field: ClassVar[str] = "system"
    """The field for a system prompt beside the messages."""
    limit_fields: ClassVar[tuple[str, ...]] = ("max_tokens",)
    """The fields that limit the tokens of an answer; a limit is added in the first one."""
    thinking_is_optional: ClassVar[bool] = True
    """A request for thinking is answered without it by a model that does not support it, instead of refused."""

    def decode(self, body: Json) -> ChatRequest:
        """Convert a parsed body to OpenAI's shape; may modify the body.

        Raises: BadRequest for an invalid body.
        """
        raise NotImplementedError

    def decode_same_api(self, body: Json) -> ChatRequest:
        """`decode` for a server that implements this API itself: what OpenAI's shape cannot express is kept
        (`proxy.chat.extensions`), and `encode` writes it back."""
        return self.decode(body)

    def encode(self, request: ChatRequest) -> Json:
        """The inverse of `decode`: the body, with every field it had."""
        raise NotImplementedError

    def writer(self, request: ChatRequest, timing: Timing) -> Writer:
        """A writer for the answer to `request`."""
        raise NotImplementedError

    def streams(self, body: Json) -> bool:
        """Whether an undecoded body requests a stream."""
        return body.get("stream") is True

    def user_text(self, body: Json) -> str:
        """`ChatRequest.last_user_text` of an undecoded and unchecked body."""
        messages = self.messages(body)
        if messages is None:
            prompt = body.get("prompt")
            prompt = prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt
            return prompt if isinstance(prompt, str) else ""
        places = (self.text_place(message) for message in reversed(messages))
        return next((place.text for place in places if place is not None), "")

    def system_text(self, body: Json) -> str:
        """The system prompt of an undecoded and unchecked body, its first text part if it has parts; empty if there is
        none."""
        messages = self.messages(body)
        first = messages[0] if messages else None
        in_front = isinstance(first, dict) and first.get("role") in ("system", "developer")
        content = first.get("content") if in_front and first is not None else body.get(self.system_field)
        if isinstance(content, list):
            content = (first_text_part(content) or {}).get("text")
        return content if isinstance(content, str) else ""

    def limit_tokens(self, body: Json, most: int, *, always: bool) -> None:
        """Let an undecoded and unchecked body limit its answer to `most` tokens; with `always`, also if it has no limit
        so far."""
        body |= limited(body, self.limit_fields, most, always=always)

    def messages(self, body: Json) -> list[Any] | None:
        """The messages of the chat in an undecoded and unchecked body; None if the API does not resend it."""
        messages = body.get(self.messages_field) if self.resends_chat else None
        return messages if isinstance(messages, list) else None

    def text_place(self, message: Any) -> TextPlace | None:
        """Where the user's text is in an undecoded and unchecked message; None if the message is not the user's."""
        if not isinstance(message, dict) or message.get("role") != "user":
            return None
        content = message.get("content")
        return (
            TextPlace(first_text_part(content), "text") if isinstance(content, list) else TextPlace(message, "content")
        )

    def beginning(self, body: Json) -> list[tuple[Any, str]]:
        """Role and text of the messages up to the user's first one, of an undecoded and unchecked body: all later
        requests of the chat begin with the same ones."""
        messages = body.get("messages") if self.resends_chat else None
        if not isinstance(messages, list):
            return [("user", self.user_text(body))]
        result: list[tuple[Any, str]] = [("system", system)] if (system := text_of(body.get("system"))) else []
        for message in messages:
            if isinstance(message, dict):
                result.append((message.get("role"), text_of(message.get("content"))))
                if message.get("role") == "user":
                    break
        return result

    def sign_of_life(self, model: str) -> bytes:
        """A frame that adds nothing to the answer of `model`, and may come before it; empty if there is none."""
        return self.dialect.sign_of_life

    has_events: ClassVar[bool] = False
    """Whether `event` returns frames."""

    def event(self, kind: str, data: Json) -> bytes:
        """A frame that chat UIs with events beside the answer show (kinds: `status`, `notification`, `source`,
        `citation`), and that may be anywhere in a stream; empty if this API has none. Raises: TypeError for data that
        JSON cannot express."""
        return b""

    def thought(self, model: str, text: str) -> bytes:
        """A frame that adds `text` to the reasoning in the answer of `model`, and may come before it; empty if there is
        none that does not depend on the rest of the answer."""
        return b""

    def fits(self, request: ChatRequest) -> bool:
        """Whether a body of this endpoint can express all of `request`: an agent may have set fields that only some
        servers support, such as `id_slot`."""
        # texts do not matter for that and may be large, so they are replaced
        content: Json = {"prompt": "x"} if request.is_text else {"messages": [{"role": "user", "content": "x"}]}
        probe = ChatRequest({**request.body, **content}, request.stream).copy()
        try:
            return set(without_extensions(probe.body)) <= set(self.decode(self.encode(probe)).body)
        except (AttributeError, KeyError, TypeError, ValueError, BadRequest):
            return True  # invalid for every API: encoding it will report the error

    def loading(self, body: Json) -> Loading | None:
        """Whether the body loads or unloads the model instead of generating; None if it generates."""
        return None

    def load_reply(self, model: str, loading: Loading) -> Json:
        """The answer to a body that loads or unloads `model`."""
        raise NotImplementedError

    def keep_alive_s(self, body: Json) -> float | None:
        """Seconds that the model stays loaded when idle, if the body sets them. Raises: BadRequest."""
        return None

    def needs(self, body: Json) -> Sequence[str]:
        """The capabilities that the body requires of a model, by the names of `ModelInfo.capabilities`."""
        return ()

    def lacks(self, model: str, capability: str) -> str:
        """The error message for a model without it."""
        return f'"{model}" does not support {capability}'
