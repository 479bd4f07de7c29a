"""The pieces of an answer."""

from __future__ import annotations

from collections.abc import AsyncIterator

from llama_smart_proxy.proxy.chat.extensions import Json


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
