"""What takes time in proportion to a request or an answer takes no more than that, however it is made."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from llama_smart_proxy.agents.parallel.merging import normalised
from llama_smart_proxy.agents.think import Think
from llama_smart_proxy.agents.think import _Reasoning as Reasoning
from llama_smart_proxy.proxy.chat import ChatRequest, Chunk, Json
from llama_smart_proxy.proxy.dialects import anthropic, ollama, openai, responses
from llama_smart_proxy.proxy.dialects.embeddings import OLLAMA_EMBED, Embedded
from llama_smart_proxy.proxy.errors import BadRequest
from llama_smart_proxy.proxy.http.body import parse_body
from llama_smart_proxy.proxy.stream import embeddings
from llama_smart_proxy.proxy.stream.decoder import StreamDecoder
from llama_smart_proxy.proxy.stream.tool_calls import CallSequence

LIMIT_S = 5.0 if sys.gettrace() is None else 50.0
"""Of processor time. All of these take a fraction of it, and took from ten seconds to hours in quadratic time. `--cov`
has a price for each line."""


def _response(**fields: object) -> Callable[[], object]:
    body: Json = {"input": "x", **fields}
    return lambda: responses.CODEC.decode(body)


def _ollama(*messages: Json) -> Callable[[], object]:
    return lambda: ollama.CHAT.decode({"model": "m", "messages": list(messages)})


def _anthropic(text: str) -> Callable[[], object]:
    body = {"model": "m", "max_tokens": 1, "system": text, "messages": [{"role": "user", "content": "x"}]}
    return lambda: anthropic.MESSAGES.decode(body)


def _ollama_again(**fields: object) -> Callable[[], object]:
    """A chat that goes on to an Ollama."""
    body: Json = {"model": "m", "messages": [{"role": "user", "content": "x"}], **fields}
    return lambda: ollama.CHAT.encode(ollama.CHAT.decode(body))


def _keep_alive(value: str) -> Callable[[], object]:
    def refused() -> None:
        with pytest.raises(BadRequest):
            ollama.CHAT.keep_alive_s({"keep_alive": value})

    return refused


def _ids(begin: int, end: int) -> Json:
    calls = [{"id": f"call{number:05}", "function": {"name": "f"}} for number in range(begin, end)]
    return {"role": "assistant", "tool_calls": calls}


_UNNAMED: Json = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}] * 20_000}
_RESULT: Json = {"role": "tool", "content": "x", "tool_name": "g"}
_CALL = {"type": "function_call", "name": "f", "call_id": "c", "arguments": "{}"}
_CHOICE = {"type": "function", "name": "f9999"}
REQUESTS = {
    "Ollama: many calls and their results": _ollama(_UNNAMED, *[_RESULT] * 20_000),
    "Ollama: results with lost ids": _ollama(_UNNAMED, *[_RESULT | {"tool_call_id": "lost"}] * 20_000),
    "Ollama: ids that would be made": _ollama(_ids(20_000, 40_000), _UNNAMED),
    "Ollama: unknown options": _ollama_again(options={f"o{number}": 1 for number in range(50_000)}),
    "Ollama: unknown fields": _ollama_again(**{f"F{number}": 1 for number in range(50_000)}),
    "Ollama: an endless duration": _keep_alive("1h" * 20_000_000),
    "Anthropic: an endless billing header": _anthropic("x-anthropic-billing-header: " * 20_000),
    "Responses: texts behind calls": _response(input=[_CALL, *[{"role": "assistant", "content": "a"}] * 100_000]),
    "Responses: many thoughts": _response(
        input=[{"type": "reasoning", "content": [{"type": "reasoning_text", "text": "x" * 100}]}] * 50_000
    ),
    "Responses: many tools to choose from": _response(
        tools=[{"type": "function", "name": f"f{number}"} for number in range(10_000)],
        tool_choice={"type": "allowed_tools", "mode": "auto", "tools": [_CHOICE] * 10_000},
    ),
}


def _answer(*pieces: bytes) -> Callable[[], object]:
    decoder = StreamDecoder(openai.WIRE, ChatRequest({"messages": []}))
    return lambda: [decoder.feed(piece) for piece in pieces]


def _calls() -> object:
    sequence = CallSequence(waits=True)
    sequence.pass_on([{"index": 0, "id": "a", "function": {"name": "f", "arguments": '{"a":"'}}])
    sequence.pass_on([{"index": 1, "id": "b", "function": {"name": "g", "arguments": "{}"}}])
    return [sequence.pass_on([{"index": 0, "function": {"arguments": "some}"}}]) for _ in range(120_000)]


def _thoughts(text: str, count: int) -> Callable[[], object]:
    """A thought that begins with `text`, and goes on with nothing but line ends."""
    thought = Reasoning(Think.Config(), 0)
    chunks = [Chunk.of(text), *(Chunk.of("\n") for _ in range(count))]
    return lambda: [thought.take(chunk) for chunk in chunks]


ANSWERS = {
    "line ends where a thought may begin": _thoughts("\n", 200_000),
    "line ends in a thought": _thoughts("<think>a", 100_000),
    "a vote for an endless row of marks": lambda: normalised("answer" + "!" * 100_000 + "\0"),
    "a vote for marks between letters": lambda: normalised("x" + "!" * 100_000 + "x"),
    "arguments with braces, and a call that waits for their end": _calls,
    "blank lines in front": _answer(*[b"\n\n"] * 150_000),
    "comments behind the end": _answer(b"data: [DONE]\n\n" + b":\n\n" * 150_000),
}


def _spent_s(work: Callable[[], object]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


@pytest.mark.parametrize("work", REQUESTS.values(), ids=REQUESTS)
def test_the_time_for_a_request_is_proportional_to_its_size(work: Callable[[], object]) -> None:
    assert _spent_s(work) < LIMIT_S


@pytest.mark.parametrize("work", ANSWERS.values(), ids=ANSWERS)
def test_the_time_for_an_answer_is_proportional_to_its_size(work: Callable[[], object]) -> None:
    assert _spent_s(work) < LIMIT_S


@pytest.mark.parametrize(("text", "cut"), [("ab cd " * 3_000_000, "ab cd ab"), ("a" * 10_000_000, "a" * 8)])
def test_a_text_is_cut_without_a_look_at_all_of_its_words(text: str, cut: str) -> None:
    """For a server that counts tokens, here one for each character, but cannot be asked for them."""
    tried: list[str] = []

    async def vectors_of(inputs: Sequence[Any]) -> Embedded:
        tried.extend(inputs)
        return Embedded([[float(len(inputs[0]))]], tokens=len(inputs[0]))

    request = OLLAMA_EMBED.decode({"model": "m", "input": text, "options": {"num_ctx": 8}})
    found: list[Embedded] = []
    spent_s = _spent_s(lambda: found.append(_result(embeddings._limited(vectors_of, request, 8))))
    assert found[0].vectors == [[float(len(cut))]] and cut in tried
    assert spent_s < LIMIT_S and len(tried) < 50


def _result(work: Coroutine[Any, Any, Embedded]) -> Embedded:
    """The result of a coroutine that awaits nothing."""
    try:
        work.send(None)
    except StopIteration as done:
        result: Embedded = done.value
        return result
    raise AssertionError("it awaits something")


def test_a_long_text_is_read_in_a_few_times_the_time_of_its_parser() -> None:
    """All of it holds the interpreter's lock: a search by a regular expression took ten times as long as the parser."""
    raw = json.dumps({"model": "hf.co/a/b:" + "a/" * 5_000_000}).encode()

    def least_s(read: Callable[[bytes], object]) -> float:
        took_s = []
        for _ in range(3):
            begun_s = time.thread_time()
            read(raw)
            took_s.append(time.thread_time() - begun_s)
        return min(took_s)

    assert least_s(parse_body) < 7 * least_s(json.loads)
