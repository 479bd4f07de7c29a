"""Merges the chunks of a streamed answer into one `chat.completion`. No I/O."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from llama_smart_proxy.proxy.chat.chunk import Chunk
from llama_smart_proxy.proxy.chat.extensions import EXTENSIONS, Json

MAX_TOOL_CALLS = 1024
"""Most tool calls in one answer: a server that sends a huge `index` must not make `Fold` allocate that many."""
CALL_ID_LENGTH = 9
"""Letters of an id that is made for a tool call: the chat templates of Mistral's models accept only ids of nine letters
and digits."""


class Fold:
    """Merges chunks into one `chat.completion`, the answer to a client that did not request a stream."""

    def __init__(self) -> None:
        self._whole: Json = {}
        self._choices: dict[int, Json] = {}

    def add(self, chunk: Json) -> bytes:
        """Merge the next chunk; of fields beside `choices` the last value counts. Returns no bytes, like a writer that
        sends nothing yet."""
        for choice in chunk.get("choices") or ():
            index = choice.get("index", 0)
            whole = self._choices.setdefault(index, {"index": index, "message": {"role": "assistant", "content": ""}})
            _add_delta(whole["message"], choice.get("delta") or {})
            _add_logprobs(whole, choice.get("logprobs"))
            whole.update({k: v for k, v in choice.items() if k not in ("index", "delta", "logprobs") and v is not None})
        fields = {k: v for k, v in chunk.items() if k != "choices" and v is not None}
        if "usage" in fields and not chunk.get("choices"):
            fields["usage"] = self._summed(fields["usage"])
        self._whole.update(fields)
        return b""

    def _summed(self, usage: Any) -> Any:
        """`usage` plus the one before it. With `n` > 1 llama-server sends one `usage` per answer, after all of them;
        the prompt is shared, so it is not added up. Source: llama.cpp tools/server, b11434."""
        before = self._whole.get("usage")
        if len(self._choices) < 2 or not isinstance(before, dict) or not isinstance(usage, dict):
            return usage
        prompt = max(before.get("prompt_tokens", 0), usage.get("prompt_tokens", 0))
        completion = before.get("completion_tokens", 0) + usage.get("completion_tokens", 0)
        counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        return {**usage, **counts}

    def completion(self, *, ended: bool = True) -> Json:
        """The `chat.completion`; `choices` ordered by index, at least one. Unless the answer has `ended`, a choice
        without a finish reason has none."""
        finish = "stop" if ended else None
        choices = [
            {"finish_reason": finish, **choice, "message": _joined(choice["message"])}
            for _, choice in sorted(self._choices.items())
        ]
        message = {"role": "assistant", "content": ""}
        return self._whole | {
            "object": "chat.completion",
            "choices": choices or [{"index": 0, "message": message, "finish_reason": finish}],
        }


class _Text(list[str]):
    """A text as a list of pieces: repeated concatenation would take quadratic time."""


def _add_delta(message: Json, delta: Json) -> None:
    for key, value in delta.items():
        if key == "tool_calls":
            for call in value or ():
                _add_tool_call(message.setdefault("tool_calls", []), call)
        elif isinstance(value, str) and key != "role":
            pieces = message.get(key)
            if not isinstance(pieces, _Text):
                pieces = message[key] = _Text()
            pieces.append(value)
        elif value is not None:
            message[key] = value


def _joined(value: Any) -> Any:
    """`value` with every `_Text` joined to a string."""
    if isinstance(value, _Text):
        return "".join(value)
    if isinstance(value, dict):
        return {key: _joined(item) for key, item in value.items()}
    return [_joined(item) for item in value] if isinstance(value, list) else value


def _add_tool_call(calls: list[Json], delta: Json) -> None:
    """Merge one part of a tool call. The first part has id and name, the others pieces of the arguments; `index`
    identifies the call. Raises: ValueError for an index out of range."""
    index = delta.get("index", len(calls))
    if not 0 <= index < MAX_TOOL_CALLS:
        raise ValueError("a tool call with an impossible index")
    while len(calls) <= index:
        calls.append({"type": "function", "function": {"name": "", "arguments": _Text()}})
    call = calls[index]
    call.update({key: value for key, value in delta.items() if key not in ("index", "function") and value is not None})
    for key, value in (delta.get("function") or {}).items():
        if key == "arguments":
            call["function"][key].append(value or "")
        elif value:  # some servers send the name with every part
            call["function"][key] = value


def _add_logprobs(choice: Json, logprobs: Any) -> None:
    for key, items in logprobs.items() if isinstance(logprobs, dict) else ():
        if isinstance(items, list):
            choice.setdefault("logprobs", {}).setdefault(key, []).extend(items)


@dataclass(slots=True)
class Reply:
    """A whole answer, or what there was of one that was broken off (not `complete`). `data` is OpenAI's
    `chat.completion`; the properties read its first choice."""

    data: Json
    complete: bool = True

    @property
    def message(self) -> Json:
        message: Json = self.data["choices"][0]["message"]
        return message

    @property
    def text(self) -> str:
        return self.message.get("content") or ""

    @property
    def texts(self) -> list[str]:
        """The texts of all choices, several with `n` > 1."""
        return [choice["message"].get("content") or "" for choice in self.data["choices"]]

    @property
    def reasoning(self) -> str:
        return self.message.get("reasoning_content") or ""

    @property
    def tool_calls(self) -> list[Json]:
        return self.message.get("tool_calls") or []

    @property
    def finish_reason(self) -> str:
        """Why it ended; empty if it did not."""
        return self.data["choices"][0].get("finish_reason") or ""

    @property
    def usage(self) -> Json | None:
        return self.data.get("usage")


async def fold(stream: AsyncIterator[Chunk]) -> Reply:
    """Read `stream` to its end and merge it."""
    whole = Fold()
    async for chunk in stream:
        whole.add(chunk.seen)
    return Reply(whole.completion())


async def replay(reply: Reply) -> AsyncIterator[Chunk]:
    """The answer `reply` as a stream, with thoughts, tool calls and token counts; the inverse of `fold`."""
    common = {key: value for key, value in reply.data.items() if key in _COMMON}
    others = {key: value for key, value in reply.data.items() if key not in (*_COMMON, "choices", "object")}
    for choice in reply.data["choices"]:
        index, message = choice.get("index", 0), dict(choice["message"])
        last = {key: value for key, value in choice.items() if key not in ("index", "message", "logprobs")}
        thoughts = {key: message.pop(key) for key in ("reasoning_content", "reasoning") if key in message}
        content, calls = {"content": message.pop("content", None)}, message.pop("tool_calls", None) or []
        parts = {"tool_calls": [{"index": number, **call} for number, call in enumerate(calls)]}
        for delta in ({"role": "assistant", **message}, thoughts, content, parts):
            if any(delta.values()):
                probable = {"logprobs": choice["logprobs"]} if delta is content and "logprobs" in choice else {}
                one = {"index": index, "delta": delta, "finish_reason": None, **probable}
                yield Chunk({**common, "choices": [one]})
        yield Chunk({**common, "choices": [{"finish_reason": "stop", **last, "index": index, "delta": {}}]})
    if others:
        yield Chunk({**common, **others, "choices": []})


_COMMON = ("id", "created", "model", "system_fingerprint", EXTENSIONS)
"""Fields of every chunk."""
