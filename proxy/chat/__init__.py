"""The values of a chat, in one shape for all APIs: OpenAI's JSON, kept as parsed. No I/O.

Agents see these: `ChatRequest`, and an answer as a `ChunkStream` of `Chunk`s. `say` makes such a stream of a text, and
`fold` one `Reply` of a stream.

A request is an OpenAI chat body (`messages`) or text body (`prompt`); an answer is a sequence of chunks, each an OpenAI
`chat.completion.chunk`, and `Fold` makes one `chat.completion` of them. What a client's own API says beyond that stands
in the same object, set aside under `KEPT`: no field is lost on the way back into that API, and none gets into another.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llama_smart_proxy.proxy.chat.fold import Fold as Fold

Json = dict[str, Any]
KEPT = "_kept"


class Kept(Json):
    """Fields of one JSON object that its `dialect` has and OpenAI's has not, under their own names.

    A type of its own, so that a client that sends a field called `_kept` means just that.
    """

    __slots__ = ("dialect",)

    def __init__(self, dialect: str, fields: Mapping[str, Any]) -> None:
        super().__init__(fields)
        self.dialect = dialect


def keep(target: Json, dialect: str, fields: Mapping[str, Any]) -> Json:
    """Set `fields` aside in `target`, which is returned; nothing if there are none."""
    if fields:
        target[KEPT] = Kept(dialect, fields)
    return target


def kept(source: Json, dialect: str) -> Mapping[str, Any]:
    """What was set aside in `source` by that dialect."""
    found = source.get(KEPT)
    return found if isinstance(found, Kept) and found.dialect == dialect else {}


def bare(value: Any) -> Any:
    """A copy of a JSON value without anything that was set aside; texts and numbers are shared."""
    if isinstance(value, dict):
        return {key: bare(item) for key, item in value.items() if not isinstance(item, Kept)}
    return [bare(item) for item in value] if isinstance(value, list) else value


@dataclass(slots=True)
class ChatRequest:
    """One request for a generated answer.

    `body` is OpenAI's: with `messages` (`/v1/chat/completions`), or with `prompt` and perhaps `suffix`
    (`/v1/completions`). `stream` is what the client wants, whether its API says so by a field or by default. The
    properties read and write the body.
    """

    body: Json
    stream: bool = True

    @property
    def model(self) -> str:
        return str(self.body.get("model", ""))

    @model.setter
    def model(self, name: str) -> None:
        self.body["model"] = name

    @property
    def is_text(self) -> bool:
        """Whether a text is to be continued, rather than a chat."""
        return "messages" not in self.body

    @property
    def messages(self) -> list[Json]:
        """The messages of a chat, to be read and changed in place; an empty list, of no effect, for a text."""
        messages: list[Json] = self.body.get("messages", [])
        return messages

    @property
    def tools(self) -> list[Json]:
        """The tools that the model may call, in OpenAI's shape."""
        return self.body.get("tools") or []

    @property
    def system(self) -> str:
        """The text of the first message, if that is a system message, else empty. Setting it makes or replaces that
        message; an empty text removes it."""
        first = self.messages[0] if self.messages else {}
        return text_of(first.get("content")) if first.get("role") in ("system", "developer") else ""

    @system.setter
    def system(self, text: str) -> None:
        if self.is_text:
            return
        if self.messages and self.messages[0].get("role") in ("system", "developer"):
            del self.messages[0]
        if text:
            self.messages.insert(0, {"role": "system", "content": text})

    @property
    def last_user_text(self) -> str:
        """What the user said last: the prompt of a text, or the text of the last user message, of which it is the first
        text part if it has parts; empty if there is none. Setting it leaves all else in that message, such as images,
        as it is: a message of parts gets a text part if it has none, and loses it with an empty text."""
        holder, key = self._last_user_place()
        text = holder.get(key) if isinstance(holder, dict) else holder and holder[key]
        return text if isinstance(text, str) else ""

    @last_user_text.setter
    def last_user_text(self, text: str) -> None:
        message = last_user_message(self.messages)
        if message is not None and isinstance(message.get("content"), list):
            _set_text(message["content"], text)
            return
        holder, key = self._last_user_place()
        if holder is not None:
            holder[key] = text

    def _last_user_place(self) -> tuple[Any, Any]:
        """The object that holds the last user text, and the key under which it does; None without one."""
        if self.is_text:
            prompt = self.body.get("prompt")
            alone = isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str)
            return (prompt, 0) if alone else (self.body, "prompt")
        message = last_user_message(self.body["messages"])
        if message is None:
            return None, None
        if isinstance(parts := message.get("content"), list):
            part = first_text_part(parts)
            return (None, None) if part is None else (part, "text")
        return message, "content"

    def copy(self) -> ChatRequest:
        """One that can be changed without changing this one. Texts and what is set aside are shared."""
        return ChatRequest(_copied(self.body), self.stream)


def last_user_message(messages: Iterable[Any]) -> Json | None:
    """The last message of role `user`, in the body of any API that has messages."""
    for message in reversed(messages if isinstance(messages, list) else []):
        if isinstance(message, dict) and message.get("role") == "user":
            return message
    return None


def first_text_part(parts: Iterable[Any]) -> Json | None:
    """The first part of a message's content that is a text, in OpenAI's and in Anthropic's API."""
    for part in parts:
        if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
            return part
    return None


def _set_text(parts: list[Any], text: str) -> None:
    """Have the first text part be that. An empty one is not kept beside others: not every API takes it."""
    part = first_text_part(parts)
    if part is None:
        parts[:0] = [{"type": "text", "text": text}] if text else []
    elif text or len(parts) == 1:
        part["text"] = text
    else:
        parts.remove(part)


def text_of(content: Any) -> str:
    """The text of a message's content, which is a text, a list of parts, or None."""
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content if first_text_part([part]) is not None)
    return content if isinstance(content, str) else ""


def _copied(value: Any) -> Any:
    if isinstance(value, Kept):
        return value
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


@dataclass(slots=True)
class Timing:
    """When a request arrived and when it was sent to the model's server, in seconds of `time.monotonic()`.

    `extra` is what else an API that tells such things has in its last frame.
    """

    arrived_s: float
    sent_s: float = 0.0
    extra: Json = field(default_factory=dict)


class Chunk:
    """One piece of an answer: OpenAI's `chat.completion.chunk`, and, while nobody has changed it, the very bytes it
    came as, which then leave as they are.

    `text`, `reasoning` and `finish_reason` can be set; whoever reads `data`, the whole JSON, may change that too, so
    from then on the chunk is written anew. A chunk tells of one choice, whose number is `index`: with `n` > 1 several
    answers come interleaved. One without choices (`usage` alone, or nothing at all: a server's sign of life) has an
    empty text and passes like any other.
    """

    __slots__ = ("_data", "_frame", "serial")

    def __init__(self, data: Json, frame: bytes | None = None, serial: int = -1) -> None:
        self._data = data
        self._frame = frame
        self.serial = serial
        """Its number in the answer of the model's server; -1 for one that an agent made."""

    @property
    def frame(self) -> bytes | None:
        """The bytes it came as; None once it was, or may have been, changed."""
        return self._frame

    @property
    def data(self) -> Json:
        """The JSON, to be changed at will; the shape is OpenAI's."""
        self._frame = None
        return self._data

    @property
    def seen(self) -> Json:
        """The JSON, not to be changed."""
        return self._data

    @property
    def choice(self) -> Json:
        """The choice it tells of, not to be changed; empty if it has none."""
        choices = self._data.get("choices")
        found: Json = choices[0] if choices else {}
        return found

    @property
    def index(self) -> int:
        """Which of the answers it belongs to; 0 but for requests with `n` > 1."""
        return self.choice.get("index") or 0

    @property
    def delta(self) -> Json:
        """What it adds to the message, not to be changed."""
        return self.choice.get("delta") or {}

    @property
    def text(self) -> str:
        """What it adds to the text of the answer; perhaps nothing."""
        return self.delta.get("content") or ""

    @text.setter
    def text(self, text: str) -> None:
        self._set("content", text)

    @property
    def reasoning(self) -> str:
        """What it adds to the thoughts before the answer, which some servers call `reasoning`."""
        delta = self.delta
        thought = delta.get("reasoning_content") or delta.get("reasoning") or ""
        return thought if isinstance(thought, str) else ""

    @reasoning.setter
    def reasoning(self, text: str) -> None:
        delta = self.delta
        plain = "reasoning" in delta and "reasoning_content" not in delta
        self._set("reasoning" if plain else "reasoning_content", text)

    @property
    def tool_calls(self) -> list[Json]:
        """Parts of tool calls, in OpenAI's shape, not to be changed."""
        return self.delta.get("tool_calls") or []

    @property
    def finish_reason(self) -> str | None:
        """Why the answer ends here: `stop`, `length`, `tool_calls`; None while it goes on."""
        choices = self._data.get("choices")  # asked of every chunk: not by way of `choice`
        reason: str | None = choices[0].get("finish_reason") if choices else None
        return reason

    @finish_reason.setter
    def finish_reason(self, reason: str | None) -> None:
        self._ensured()["finish_reason"] = reason

    @property
    def usage(self) -> Json | None:
        """The count of tokens, which only a chunk near the end has."""
        return self._data.get("usage")

    @property
    def size(self) -> int:
        """About the bytes that it takes; at most as many as its frame had."""
        calls = self.tool_calls
        return len(self.text) + len(self.reasoning) + 16 + (len(str(calls)) if calls else 0)

    @staticmethod
    def of(text: str = "", *, reasoning: str = "", index: int = 0) -> Chunk:
        """A new chunk that adds this to the answer."""
        delta = {"content": text} if text else {}
        delta |= {"reasoning_content": reasoning} if reasoning else {}
        return Chunk({"choices": [{"index": index, "delta": delta, "finish_reason": None}]})

    @staticmethod
    def ending(finish_reason: str = "stop", *, index: int = 0) -> Chunk:
        """A new chunk that ends the answer."""
        return Chunk({"choices": [{"index": index, "delta": {}, "finish_reason": finish_reason}]})

    def _ensured(self) -> Json:
        """The choice, to be changed; made if there is none."""
        choices = self.data.setdefault("choices", [])
        if not choices:
            choices.append({"index": 0, "delta": {}, "finish_reason": None})
        found: Json = choices[0]
        return found

    def _set(self, key: str, text: str) -> None:
        choice = self._ensured()
        delta = choice["delta"] = choice.get("delta") or {}
        if (delta.get(key) or "") != text:  # what else tells what was said before goes
            choice.pop("logprobs", None)
            for other in () if key == "content" else ("reasoning_content", "reasoning", "reasoning_details"):
                delta.pop(other, None)
        delta[key] = text
        if not text:
            del delta[key]


ChunkStream = AsyncIterator[Chunk]
"""An answer, piece by piece. Whoever reads one to its end need not close it; `layers` closes what an agent leaves."""


async def say(text: str, *, finish_reason: str = "stop") -> AsyncIterator[Chunk]:
    """An answer that was made here."""
    yield Chunk({"choices": [{"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": None}]})
    yield Chunk.ending(finish_reason)


@dataclass(slots=True)
class Reply:
    """A whole answer. `data` is OpenAI's `chat.completion`, of whose first choice the properties tell."""

    data: Json

    @property
    def message(self) -> Json:
        message: Json = self.data["choices"][0]["message"]
        return message

    @property
    def text(self) -> str:
        return self.message.get("content") or ""

    @property
    def texts(self) -> list[str]:
        """The texts of all choices; with `n` > 1 there are several."""
        return [choice["message"].get("content") or "" for choice in self.data["choices"]]

    @property
    def reasoning(self) -> str:
        return self.message.get("reasoning_content") or ""

    @property
    def tool_calls(self) -> list[Json]:
        return self.message.get("tool_calls") or []

    @property
    def finish_reason(self) -> str:
        reason: str = self.data["choices"][0]["finish_reason"]
        return reason

    @property
    def usage(self) -> Json | None:
        return self.data.get("usage")


async def fold(stream: AsyncIterator[Chunk]) -> Reply:
    """The whole of an answer."""
    whole = Fold()
    async for chunk in stream:
        whole.add(chunk.seen)
    return Reply(whole.completion())
