"""What takes time in proportion to a request or an answer takes no more than that, however it is made."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from llama_smart_proxy.agents.parallel.merging import normalised
from llama_smart_proxy.agents.think import Think
from llama_smart_proxy.agents.think import _Reasoning as Reasoning
from llama_smart_proxy.proxy.chat import ChatRequest, Chunk, Json
from llama_smart_proxy.proxy.dialects import OPENAI, anthropic, ollama, openai, responses
from llama_smart_proxy.proxy.dialects.embeddings import OLLAMA_EMBED, Embedded
from llama_smart_proxy.proxy.dialects.framing import EventSplitter
from llama_smart_proxy.proxy.errors import BadRequest
from llama_smart_proxy.proxy.http.body import parse_body
from llama_smart_proxy.proxy.log.redaction import redacted
from llama_smart_proxy.proxy.stream import embeddings
from llama_smart_proxy.proxy.stream.decoder import StreamDecoder
from llama_smart_proxy.proxy.stream.relay import _FrameSink
from llama_smart_proxy.proxy.stream.tool_calls import CallSequence

Work = Callable[[], object]
TIMES = 32
"""How many times as large the input of a second run is: in quadratic time it takes some thousand times as long."""


def _response(**fields: object) -> Work:
    body: Json = {"input": "x", **fields}
    return lambda: responses.CODEC.decode(body)


def _ollama(*messages: Json) -> Work:
    return lambda: ollama.CHAT.decode({"model": "m", "messages": list(messages)})


def _anthropic(text: str) -> Work:
    body = {"model": "m", "max_tokens": 1, "system": text, "messages": [{"role": "user", "content": "x"}]}
    return lambda: anthropic.MESSAGES.decode(body)


def _ollama_again(**fields: object) -> Work:
    """A chat that goes on to an Ollama."""
    body: Json = {"model": "m", "messages": [{"role": "user", "content": "x"}], **fields}
    return lambda: ollama.CHAT.encode(ollama.CHAT.decode(body))


def _keep_alive(value: str) -> Work:
    def refused() -> None:
        with pytest.raises(BadRequest):
            ollama.CHAT.keep_alive_s({"keep_alive": value})

    return refused


def _ids(begin: int, end: int) -> Json:
    calls = [{"id": f"call{number:05}", "function": {"name": "f"}} for number in range(begin, end)]
    return {"role": "assistant", "tool_calls": calls}


def _unnamed(count: int) -> Json:
    return {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}] * count}


_RESULT: Json = {"role": "tool", "content": "x", "tool_name": "g"}
_CALL = {"type": "function_call", "name": "f", "call_id": "c", "arguments": "{}"}
_TEXT = {"role": "assistant", "content": "a"}
_THOUGHT = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "x" * 100}]}


def _tools(count: int) -> Work:
    """Many tools, and as many choices of the last one."""
    choice = {"type": "function", "name": f"f{count - 1}"}
    return _response(
        tools=[{"type": "function", "name": f"f{number}"} for number in range(count)],
        tool_choice={"type": "allowed_tools", "mode": "auto", "tools": [choice] * count},
    )


REQUESTS: dict[str, tuple[int, Callable[[int], Work]]] = {
    "Ollama: many calls and their results": (15_000, lambda n: _ollama(_unnamed(n), *[_RESULT] * n)),
    "Ollama: results with lost ids": (
        15_000,
        lambda n: _ollama(_unnamed(n), *[_RESULT | {"tool_call_id": "lost"}] * n),
    ),
    "Ollama: ids that would be made": (10_000, lambda n: _ollama(_ids(n, 2 * n), _unnamed(n))),
    "Ollama: unknown options": (50_000, lambda n: _ollama_again(options={f"o{number}": 1 for number in range(n)})),
    "Ollama: unknown fields": (50_000, lambda n: _ollama_again(**{f"F{number}": 1 for number in range(n)})),
    "Ollama: an endless duration": (2_000_000, lambda n: _keep_alive("1h" * n)),
    "Anthropic: an endless billing header": (20_000, lambda n: _anthropic("x-anthropic-billing-header: " * n)),
    "Responses: texts behind calls": (100_000, lambda n: _response(input=[_CALL, *[_TEXT] * n])),
    "Responses: many thoughts": (50_000, lambda n: _response(input=[_THOUGHT] * n)),
    "Responses: many tools to choose from": (10_000, _tools),
    "Log: the beginning of names": (100_000, lambda n: partial(redacted, "a-x_" * n)),
    "Log: the beginning of values": (100_000, lambda n: partial(redacted, "bearer " * n)),
    "Log: the beginning of addresses": (100_000, lambda n: partial(redacted, "://a" * n)),
}
"""How large the larger input is, and what makes the work of an input of a size."""


def _answer(first: bytes, piece: bytes, count: int) -> Work:
    decoder = StreamDecoder(openai.WIRE, ChatRequest({"messages": []}))
    return lambda: [decoder.feed(first), *(decoder.feed(piece) for _ in range(count))]


def _relayed(piece: bytes, count: int) -> Work:
    """The beginning of a relayed answer, in pieces none of which completes a frame."""
    response: Any = SimpleNamespace(begun=False, begin=lambda: None)
    sink = _FrameSink(response, EventSplitter(), OPENAI, lambda: None)
    return lambda: [sink.start(piece, None) for _ in range(count)]


def _calls(count: int) -> Work:
    sequence = CallSequence(waits=True)
    sequence.pass_on([{"index": 0, "id": "a", "function": {"name": "f", "arguments": '{"a":"'}}])
    sequence.pass_on([{"index": 1, "id": "b", "function": {"name": "g", "arguments": "{}"}}])
    return lambda: [sequence.pass_on([{"index": 0, "function": {"arguments": "some}"}}]) for _ in range(count)]


def _thoughts(text: str, count: int) -> Work:
    """A thought that begins with `text`, and goes on with nothing but line ends."""
    thought = Reasoning(Think.Config(), 0)
    chunks = [Chunk.of(text), *(Chunk.of("\n") for _ in range(count))]
    return lambda: [thought.take(chunk) for chunk in chunks]


ANSWERS: dict[str, tuple[int, Callable[[int], Work]]] = {
    "line ends where a thought may begin": (40_000, lambda n: _thoughts("\n", n)),
    "line ends in a thought": (40_000, lambda n: _thoughts("<think>a", n)),
    "a vote for an endless row of marks": (100_000, lambda n: lambda: normalised("answer" + "!" * n + "\0")),
    "a vote for marks between letters": (100_000, lambda n: lambda: normalised("x" + "!" * n + "x")),
    "arguments with braces, and a call that waits for their end": (20_000, _calls),
    "blank lines in front": (40_000, lambda n: _answer(b"\n" * 65_535, b"\n\n", n)),
    "a first frame without an end": (3_200, lambda n: _relayed(b"\0" * 4_096, n)),
    "comments behind the end": (150_000, lambda n: _answer(b"data: [DONE]\n\n" + b":\n\n" * n, b"", 0)),
}


def _spent_s(make: Callable[[int], Work], size: int, runs: int) -> float:
    """The least processor time of some runs."""
    spent_s = []
    for _ in range(runs):
        work = make(size)
        gc.disable()  # its own time is no matter of the work
        begun = time.process_time()
        work()
        spent_s.append(time.process_time() - begun)
        gc.enable()
    return min(spent_s)


@pytest.mark.parametrize(("size", "make"), [*REQUESTS.values(), *ANSWERS.values()], ids=[*REQUESTS, *ANSWERS])
def test_the_time_for_a_request_or_an_answer_is_proportional_to_its_size(
    size: int, make: Callable[[int], Work]
) -> None:
    limit_s = 5 * TIMES * _spent_s(make, size // TIMES, 3)
    assert _spent_s(make, size, 1) < limit_s or _spent_s(make, size, 3) < limit_s


@pytest.mark.parametrize(("text", "cut"), [("ab cd " * 3_000_000, "ab cd ab"), ("a" * 10_000_000, "a" * 8)])
def test_a_text_is_cut_without_a_look_at_all_of_its_words(text: str, cut: str) -> None:
    """For a server that counts tokens, here one for each character, but cannot be asked for them."""
    tried: list[str] = []

    async def vectors_of(inputs: Sequence[Any]) -> Embedded:
        tried.extend(inputs)
        return Embedded([[float(len(inputs[0]))]], tokens=len(inputs[0]))

    request = OLLAMA_EMBED.decode({"model": "m", "input": text, "options": {"num_ctx": 8}})
    found = _result(embeddings._limited(vectors_of, request, 8))
    assert found.vectors == [[float(len(cut))]] and cut in tried
    assert len(tried) < 50


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

    def spent_s(read: Callable[[bytes], object]) -> float:
        begun_s = time.thread_time()
        read(raw)
        return time.thread_time() - begun_s

    runs = [(spent_s(parse_body), spent_s(json.loads)) for _ in range(5)]
    ours_s, parsers_s = map(min, zip(*runs, strict=True))
    assert ours_s < 7 * parsers_s
