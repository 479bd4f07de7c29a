"""The JSON of llama-server's answers, one class for each kind of endpoint: what a stream consists of, and a whole body.

Source: `to_json_*` and `format_*_sse` in llama.cpp tools/server, b11434. It has no place of its own for an error of
`/v1/messages`: what stands behind `event: error` is the bare object.
"""

from __future__ import annotations

import json
import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any


def steering(body: dict[str, Any]) -> dict[str, Any]:
    """What the request says of the answer that it wants."""
    if "fake" in body or not body.get("messages"):
        return dict(body.get("fake", {}))
    text = body["messages"][-1].get("content")
    if isinstance(text, list):
        text = next((part["text"] for part in text if "text" in part), "")
    return dict(json.loads(text)["fake"]) if str(text).startswith('{"fake"') else {}


def data(value: object) -> bytes:
    """An event without a name."""
    return b"data: " + json.dumps(value).encode() + b"\n\n"


class Form:
    """An answer of the tokens `texts`, perhaps with one tool call, `[name, arguments]`, behind them."""

    done = b""
    """What comes behind the last event."""

    def __init__(self, alias: str, body: dict[str, Any], texts: list[str], call: list[Any] | None) -> None:
        self.alias, self.texts, self.call = alias, texts, call
        self.answers = int(body.get("n") or 1)  # told apart by a number behind each token, if that was not asked for
        self.thoughts = ""
        self.reports = bool(body.get("return_progress"))  # of the prompt, up to 40 %, before the first token
        self.usage = bool((body.get("stream_options") or {}).get("include_usage"))
        self.stream = bool(body.get("stream"))
        self.begun = time.monotonic()

    def figures(self) -> dict[str, Any]:
        took_ms = (time.monotonic() - self.begun) * 1000
        count = len(self.texts)
        usage = {"completion_tokens": count, "prompt_tokens": 1, "total_tokens": count + 1}
        timings = {"prompt_n": 1, "prompt_ms": 1.5, "predicted_n": count, "predicted_ms": took_ms}
        return {"usage": usage, "timings": timings}

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def first(self) -> bytes:
        """The event in front of the first token; perhaps none."""
        return b""

    def token(self, index: int) -> bytes:
        raise NotImplementedError

    def called(self) -> Iterator[bytes]:
        """The events of the tool call: its name, then its arguments in two pieces."""
        return iter(())

    def last(self) -> bytes:
        """The event that says why the answer ends."""
        raise NotImplementedError

    def counts(self) -> Iterator[bytes]:
        """The event behind it, if it was asked for."""
        return iter(())

    def error(self, error: dict[str, Any]) -> bytes:
        return data({"error": error})

    def whole(self) -> dict[str, Any]:
        raise NotImplementedError


class Texts(Form):
    """`/v1/completions` and its like."""

    done = b"data: [DONE]\n\n"
    kind = "text_completion"

    def envelope(self, *choices: dict[str, object]) -> dict[str, Any]:
        kind = f"{self.kind}.chunk" if self.stream and self.kind == "chat.completion" else self.kind
        fixed = {"created": 0, "id": f"fake-{os.getpid()}", "model": self.alias, "object": kind}
        return {"choices": list(choices), **fixed}

    def piece(self, delta: dict[str, object], finish: str | None = None, number: int = 0) -> dict[str, Any]:
        return self.envelope({"finish_reason": finish, "index": number, "text": delta.get("content", "")})

    def token(self, index: int) -> bytes:
        text = self.texts[index]
        marked = self.answers > 1 and text.startswith("t")
        told = [f"{text.rstrip()}#{n} " if marked else text for n in range(self.answers)]
        return b"".join(data(self.piece({"content": text}, None, n)) for n, text in enumerate(told))

    def last(self) -> bytes:
        value = self.piece({}, "tool_calls" if self.call else "stop")
        others = [data(self.piece({}, "stop", n)) for n in range(1, self.answers)]
        return b"".join([*others, data(value if self.usage else value | self.figures())])

    def counts(self) -> Iterator[bytes]:
        if self.usage:
            yield data({**self.envelope(), "choices": [], **self.figures()})

    def whole(self) -> dict[str, Any]:
        return self.envelope({"index": 0, "finish_reason": "stop", "text": self.text}) | self.figures()


class Chats(Texts):
    """`/v1/chat/completions`."""

    kind = "chat.completion"

    def piece(self, delta: dict[str, object], finish: str | None = None, number: int = 0) -> dict[str, Any]:
        return self.envelope({"finish_reason": finish, "index": number, "delta": delta})

    def first(self) -> bytes:
        events = [data(self.piece({"role": "assistant", "content": None}, None, n)) for n in range(self.answers)]
        if self.reports:
            reported = [{"total": 50, "cache": 0, "processed": done, "time_ms": 1} for done in (0, 20)]
            role = self.piece({"role": "assistant", "content": None})
            events = [data({**role, "prompt_progress": report}) for report in reported]
        if self.thoughts:
            events.append(data(self.piece({"reasoning_content": self.thoughts})))
        return b"".join(events)

    def called(self) -> Iterator[bytes]:
        if self.call:
            name, arguments = self.call[0], json.dumps(self.call[1])
            half = len(arguments) // 2
            function = {"name": name, "arguments": ""}
            yield self.delta_of_call({"id": "call_fake", "type": "function", "function": function})
            for piece in (arguments[:half], arguments[half:]):
                yield self.delta_of_call({"function": {"arguments": piece}})

    def delta_of_call(self, call: dict[str, object]) -> bytes:
        return data(self.piece({"tool_calls": [{"index": 0, **call}]}))

    def whole(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.call:
            function = {"name": self.call[0], "arguments": json.dumps(self.call[1])}
            message["tool_calls"] = [{"id": "call_fake", "type": "function", "function": function}]
        finish = "tool_calls" if self.call else "stop"
        return self.envelope({"index": 0, "finish_reason": finish, "message": message}) | self.figures()


class Messages(Form):
    """`/v1/messages`."""

    def event(self, kind: str, **fields: object) -> bytes:
        return f"event: {kind}\n".encode() + data({"type": kind, **fields})

    def message(self, content: list[Any], reason: str | None) -> dict[str, Any]:
        usage = {"cache_read_input_tokens": 0, "input_tokens": 1, "output_tokens": len(self.texts) if reason else 0}
        fixed = {"id": f"fake-{os.getpid()}", "type": "message", "role": "assistant", "model": self.alias}
        return {**fixed, "content": content, "stop_reason": reason, "stop_sequence": None, "usage": usage}

    def first(self) -> bytes:
        start = {"content_block": {"type": "text", "text": ""}}
        return self.event("message_start", message=self.message([], None)) + self.block("start", 0, **start)

    def block(self, what: str, index: int, **fields: object) -> bytes:
        return self.event(f"content_block_{what}", index=index, **fields)

    def token(self, index: int) -> bytes:
        return self.block("delta", 0, delta={"type": "text_delta", "text": self.texts[index]})

    def called(self) -> Iterator[bytes]:
        if self.call:
            name, arguments = self.call[0], json.dumps(self.call[1])
            half = len(arguments) // 2
            yield self.block("start", 1, content_block={"type": "tool_use", "id": "call_fake", "name": name})
            for piece in (arguments[:half], arguments[half:]):
                yield self.block("delta", 1, delta={"type": "input_json_delta", "partial_json": piece})

    def last(self) -> bytes:
        stops = b"".join(self.block("stop", index) for index in range(2 if self.call else 1))
        delta = {"stop_reason": self.reason, "stop_sequence": None}
        return stops + self.event("message_delta", delta=delta, usage={"output_tokens": len(self.texts)})

    def counts(self) -> Iterator[bytes]:
        yield self.event("message_stop")

    @property
    def reason(self) -> str:
        return "tool_use" if self.call else "end_turn"

    def error(self, error: dict[str, Any]) -> bytes:
        return b"event: error\n" + data(error)

    def whole(self) -> dict[str, Any]:
        content: list[Any] = [{"type": "text", "text": self.text}]
        if self.call:
            content.append({"type": "tool_use", "id": "call_fake", "name": self.call[0], "input": self.call[1]})
        return self.message(content, self.reason)


FORMS: dict[str, type[Form]] = {"/v1/chat/completions": Chats, "/v1/messages": Messages}
"""By path; every other one answers as `Texts`."""
