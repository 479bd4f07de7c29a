"""The values of a chat, in one shape for all APIs: OpenAI's JSON, kept as parsed. No I/O.

A request is an OpenAI chat body (`messages`) or text body (`prompt`); an answer is a sequence of chunks, each an OpenAI
`chat.completion.chunk`, and `Fold` makes one `chat.completion` of them. What a client's own API says beyond that stands
in the same object, set aside under `KEPT`: no field is lost on the way back into that API, and none gets into another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]
KEPT = "_kept"
MAX_TOOL_CALLS = 1024
"""Most calls in one answer; a server that numbers them higher would have us make room for all between."""


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
    (`/v1/completions`). `stream` is what the client wants, whether its API says so by a field or by default.
    """

    body: Json
    stream: bool

    @property
    def model(self) -> str:
        return str(self.body.get("model", ""))

    @property
    def is_text(self) -> bool:
        """Whether a text is to be continued, rather than a chat."""
        return "messages" not in self.body


@dataclass(slots=True)
class Timing:
    """When a request arrived and when it was sent to the model's server, in seconds of `time.monotonic()`.

    `extra` is what else an API that tells such things has in its last frame.
    """

    arrived_s: float
    sent_s: float = 0.0
    extra: Json = field(default_factory=dict)


def text_chunk(text: str, *, field: str = "content") -> Json:
    """A chunk that adds `text` to the answer (or to its `reasoning_content`)."""
    return {"choices": [{"index": 0, "delta": {field: text}, "finish_reason": None}]}


def answer_text(chunk: Json) -> str:
    """What the chunk adds to the first answer's text."""
    for choice in chunk.get("choices") or ():
        if choice.get("index", 0) == 0:
            return choice.get("delta", {}).get("content") or ""
    return ""


class Fold:
    """Chunks in, one `chat.completion` out: the answer to a client that did not ask for a stream."""

    def __init__(self) -> None:
        self._whole: Json = {}
        self._choices: dict[int, Json] = {}

    def add(self, chunk: Json) -> bytes:
        """Take in the next chunk. Fields beside `choices` stay as they were said last. Nothing is sent for it."""
        for choice in chunk.get("choices") or ():
            index = choice.get("index", 0)
            whole = self._choices.setdefault(index, {"index": index, "message": {"role": "assistant", "content": ""}})
            _add_delta(whole["message"], choice.get("delta") or {})
            _add_logprobs(whole, choice.get("logprobs"))
            whole.update({k: v for k, v in choice.items() if k not in ("index", "delta", "logprobs") and v is not None})
        self._whole.update({k: v for k, v in chunk.items() if k != "choices" and v is not None})
        return b""

    def completion(self) -> Json:
        """The whole answer; `choices` in the order of their indices, at least one."""
        choices = [
            {"finish_reason": "stop", **choice, "message": _joined(choice["message"])}
            for _, choice in sorted(self._choices.items())
        ]
        message = {"role": "assistant", "content": ""}
        return self._whole | {
            "object": "chat.completion",
            "choices": choices or [{"index": 0, "message": message, "finish_reason": "stop"}],
        }


class _Text(list[str]):
    """A text in pieces: adding each to a whole one would take time in the square of its length."""


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
    """`value` with its texts in one piece."""
    if isinstance(value, _Text):
        return "".join(value)
    if isinstance(value, dict):
        return {key: _joined(item) for key, item in value.items()}
    return [_joined(item) for item in value] if isinstance(value, list) else value


def _add_tool_call(calls: list[Json], delta: Json) -> None:
    """A call comes in parts: first its id and name, then its arguments piece by piece, told apart by `index`."""
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


def _add_logprobs(choice: Json, logprobs: Json | None) -> None:
    for key, items in (logprobs or {}).items():
        if isinstance(items, list):
            choice.setdefault("logprobs", {}).setdefault(key, []).extend(items)
