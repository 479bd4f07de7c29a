"""The pieces of an answer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable

from llama_smart_proxy.proxy.chat.extensions import Json
from llama_smart_proxy.proxy.chat.sources import sources_list
from llama_smart_proxy.proxy.chat.status import status_line

REASONING = ("reasoning_content", "reasoning", "thinking")
"""The names that servers have for the reasoning in a delta; some send it under several. vLLM, since 0.11, and
OpenRouter use the second one."""


def reasoning_of(delta: Json) -> str:
    """The reasoning in a delta or a message, under any of its names; OpenRouter's `reasoning_details` are a list."""
    if len(delta) == 1 and "content" in delta:  # the usual token
        return ""
    for name in REASONING:
        value = delta.get(name)
        if isinstance(value, dict):
            value = value.get("text") or value.get("content")
        if value and isinstance(value, str):
            return value
    details = delta.get("reasoning_details")
    if not details or not isinstance(details, list):
        return ""
    texts = (item.get("text") or item.get("summary") for item in details if isinstance(item, dict))
    return "".join(text for text in texts if isinstance(text, str))


def has_content(choice: Json) -> bool:
    """Whether this choice of a chunk has more than who speaks: a part of the answer, or its end."""
    delta = choice.get("delta")
    said = isinstance(delta, dict) and any(value for name, value in delta.items() if name != "role")
    return said or bool(choice.get("finish_reason"))


class Chunk:
    """One piece of an answer: OpenAI's `chat.completion.chunk` and, while it is unchanged, the bytes it was received
    as, which are then sent unchanged.

    `text`, `reasoning` and `finish_reason` can be set. Reading `data`, the whole JSON, counts as a change, because the
    caller may modify it. A chunk has at most one choice, numbered `index`: with `n` > 1 several answers are
    interleaved. A chunk without choices (only `usage`, or a server's keep-alive) has an empty text and is passed on
    like any other.
    """

    __slots__ = ("_data", "_frame", "serial")

    def __init__(self, data: Json, frame: bytes | None = None, serial: int = -1) -> None:
        self._data = data
        self._frame = frame
        self.serial = serial
        """Position in the answer of the model's server; -1 for a chunk made by an agent."""

    @property
    def frame(self) -> bytes | None:
        """The bytes it was received as; None once it was, or may have been, changed."""
        return self._frame

    @property
    def data(self) -> Json:
        """The JSON in OpenAI's shape; may be modified."""
        self._frame = None  # the caller may modify what it gets
        return self._data

    @property
    def seen(self) -> Json:
        """The JSON, read-only."""
        return self._data

    @property
    def choice(self) -> Json:
        """Its choice, read-only; empty if it has none."""
        choices = self._data.get("choices")
        found: Json = choices[0] if choices else {}
        return found

    @property
    def index(self) -> int:
        """Number of the answer it belongs to; always 0 unless the request has `n` > 1."""
        return self.choice.get("index") or 0

    @property
    def delta(self) -> Json:
        """What it adds to the message, read-only."""
        return self.choice.get("delta") or {}

    @property
    def text(self) -> str:
        """What it adds to the text of the answer; may be empty."""
        return self.delta.get("content") or ""

    @text.setter
    def text(self, text: str) -> None:
        self._set("content", text)

    @property
    def reasoning(self) -> str:
        """What it adds to the reasoning, under whichever name."""
        return reasoning_of(self.delta)

    @reasoning.setter
    def reasoning(self, text: str) -> None:
        delta = self.delta
        self._set(next((name for name in REASONING if name in delta), "reasoning_content"), text)

    @property
    def tool_calls(self) -> list[Json]:
        """Parts of tool calls, in OpenAI's shape, read-only."""
        return self.delta.get("tool_calls") or []

    @property
    def finish_reason(self) -> str | None:
        """Why the answer ends here: `stop`, `length`, `tool_calls`; None while it continues."""
        choices = self._data.get("choices")  # read for every chunk, so without the cost of `choice`
        reason: str | None = choices[0].get("finish_reason") if choices else None
        return reason

    @finish_reason.setter
    def finish_reason(self, reason: str | None) -> None:
        self._ensured()["finish_reason"] = reason

    @property
    def usage(self) -> Json | None:
        """The token counts; None for all but a chunk near the end."""
        return self._data.get("usage")

    @property
    def size(self) -> int:
        """Approximate size in bytes; at most the length of its frame."""
        calls = self.tool_calls
        return len(self.text) + len(self.reasoning) + 16 + (len(str(calls)) if calls else 0)

    @staticmethod
    def of(text: str = "", *, reasoning: str = "", index: int = 0) -> Chunk:
        """A new chunk that adds `text` and `reasoning` to the answer."""
        delta = {"content": text} if text else {}
        delta |= {"reasoning_content": reasoning} if reasoning else {}
        return Chunk({"choices": [{"index": index, "delta": delta, "finish_reason": None}]})

    @staticmethod
    def progress(text: str) -> Chunk:
        """A new chunk with a line of reasoning about what the user waits for. In front of the answer's own reasoning it
        is removed from the chat when that is sent again, so that no model gets it."""
        return Chunk.of(reasoning=status_line(text))

    @staticmethod
    def sources(lines: Iterable[str]) -> Chunk:
        """A new chunk with a list of sources, to be yielded at the end of an answer; each line begins as `[1] ...`. It
        is removed from the chat when that is sent again, so that no model gets it."""
        return Chunk.of(sources_list(lines))

    @staticmethod
    def ending(finish_reason: str = "stop", *, index: int = 0) -> Chunk:
        """A new chunk that ends the answer."""
        return Chunk({"choices": [{"index": index, "delta": {}, "finish_reason": finish_reason}]})

    def _ensured(self) -> Json:
        """The choice, writable; created if there is none."""
        choices = self.data.setdefault("choices", [])
        if not choices:
            choices.append({"index": 0, "delta": {}, "finish_reason": None})
        found: Json = choices[0]
        return found

    def _set(self, key: str, text: str) -> None:
        choice = self._ensured()
        delta = choice["delta"] = choice.get("delta") or {}
        if (delta.get(key) or "") != text:  # other fields that repeat the old text would contradict the new one
            choice.pop("logprobs", None)
            for other in () if key == "content" else (*REASONING, "reasoning_details"):
                delta.pop(other, None)
        delta[key] = text
        if not text:
            del delta[key]


ChunkStream = AsyncIterator[Chunk]
"""An answer as chunks. A stream read to its end need not be closed; `layers` closes those that an agent abandons."""


async def say(text: str, *, finish_reason: str = "stop") -> AsyncIterator[Chunk]:
    """An answer with `text`, not generated by a model."""
    yield Chunk({"choices": [{"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": None}]})
    yield Chunk.ending(finish_reason)
