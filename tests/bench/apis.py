"""The wire APIs in which the bench asks for streams: how a client asks, what the stub answers, how to read what comes.

The stub answers in two of them. An answer in another API than the stub's has gone through a translation, so it cannot
be compared byte for byte; then each token's text must be there, one to a frame, in order, and the end that clients of
that API wait for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from tests.bench import wire
from tests.bench.agents import CHAINS, MARK

Json = dict[str, Any]


@dataclass(frozen=True)
class Api:
    """One API as a client sees it; `request` makes the body of a streamed chat from a model, a question and a number of
    tokens, `texts` finds what each frame of an answer adds to the text. `texts` raises when the answer has no end."""

    path: str
    request: Callable[[str, str, int], Json]
    texts: Callable[[bytes], list[str]]


def _messages(question: str) -> list[Json]:
    return [{"role": "system", "content": wire.SYSTEM}, {"role": "user", "content": question}]


def _ask_openai(model: str, question: str, tokens: int) -> Json:
    body = {"model": model, "messages": _messages(question), "temperature": 0.7}
    return body | {"stream": True, "max_tokens": tokens}


def _ask_ollama(model: str, question: str, tokens: int) -> Json:
    options = {"temperature": 0.7, "num_predict": tokens}
    return {"model": model, "messages": _messages(question), "options": options}


def _ask_anthropic(model: str, question: str, tokens: int) -> Json:
    messages = [{"role": "user", "content": question}]
    body = {"model": model, "system": wire.SYSTEM, "messages": messages, "temperature": 0.7}
    return body | {"stream": True, "max_tokens": tokens}


def _openai_texts(body: bytes) -> list[str]:
    *events, done, rest = body.split(b"\n\n")
    _must((done, rest) == (b"data: [DONE]", b""), body)
    choices = [choice for event in events for choice in json.loads(event.removeprefix(b"data: "))["choices"]]
    return [choice["delta"].get("content", "") for choice in choices]


def _ollama_texts(body: bytes) -> list[str]:
    *lines, rest = body.split(b"\n")
    told = [json.loads(line) for line in lines]
    _must(rest == b"" and [line["done"] for line in told] == [False] * (len(told) - 1) + [True], body)
    return [line["message"]["content"] for line in told]


def _anthropic_texts(body: bytes) -> list[str]:
    *events, rest = body.split(b"\n\n")
    told = [json.loads(event.partition(b"\ndata: ")[2]) for event in events]
    _must(rest == b"" and told[-1]["type"] == "message_stop", body)
    return [event["delta"]["text"] for event in told if event["type"] == "content_block_delta"]


def _must(ended: bool, body: bytes) -> None:
    if not ended:
        raise wire.BrokenRun(f"the answer does not end as it should: {body[-200:]!r}")


APIS = {
    "openai": Api(wire.CHAT_PATH, _ask_openai, _openai_texts),
    "ollama": Api(wire.OLLAMA_PATH, _ask_ollama, _ollama_texts),
    "anthropic": Api("/v1/messages", _ask_anthropic, _anthropic_texts),
}
SERVED = {
    wire.MODEL: "openai",
    wire.OLLAMA_MODEL: "ollama",
    **{model: "" if "rewriter" in chain else "openai" for model, chain in CHAINS.items()},
}
"""The API in which the stub serves each of its models; none if its bytes are not what a client gets."""
BODIES = {"openai": wire.stream_body, "ollama": wire.lines_body}
"""What it answers there, whole, for a number of tokens."""


@cache
def stream_request(api: str, model: str, tokens: int, interval_ms: float) -> bytes:
    """A request for a streamed answer, head and body."""
    asked = APIS[api]
    return wire.post(asked.path, asked.request(model, wire.question(tokens, interval_ms), tokens))


def check_stream(response: bytes, api: str, model: str, tokens: int) -> None:
    """Raise `BrokenRun` unless `response` is a 200 with all tokens: as the stub sent it, byte for byte, where its API
    is the client's."""
    if SERVED[model] == api:
        wire.check_body(response, BODIES[api](tokens))
        return
    texts = [text for text in APIS[api].texts(wire.body_of(response)) if text]
    mark = MARK if "rewriter" in CHAINS.get(model, ()) else ""
    expected = [wire.text(index) + mark for index in range(tokens)]
    if texts != expected:
        raise wire.BrokenRun(f"{len(texts)} of {tokens} tokens, or in another order: {texts[:3]} ... {texts[-3:]}")
