"""Folding a stream into one answer: no slower than the answer is long."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from llama_smart_proxy.proxy.chat import Fold, Json

PIECE = "x" * 60


def piece_of(kind: str, index: int) -> Json:
    """A chunk with a little more of the answer."""
    choice: Json = {"index": 0, "delta": {}, "finish_reason": None}
    if kind == "logprobs":
        choice["logprobs"] = {"content": [{"token": "ab", "logprob": -index}]}
    elif kind == "arguments":
        choice["delta"] = {"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": PIECE}}]}
    else:
        choice["delta"] = {kind: PIECE}
    return {"choices": [choice]}


def cpu_s(work: Callable[[], object]) -> float:
    """The least processor time that it takes, of a few runs."""
    spent = []
    for _ in range(4):
        started = time.process_time()
        work()
        spent.append(time.process_time() - started)
    return min(spent)


@pytest.mark.parametrize("kind", ["content", "reasoning_content", "logprobs", "arguments"])
def test_folding_sixteen_times_as_much_takes_about_sixteen_times_as_long(kind: str) -> None:
    pieces = [piece_of(kind, index) for index in range(16_000)]

    def fold(count: int) -> Json:
        whole = Fold()
        for piece in pieces[:count]:
            whole.add(piece)
        return whole.completion()

    (choice,) = fold(len(pieces))["choices"]
    if kind == "logprobs":
        assert len(choice["logprobs"]["content"]) == len(pieces)
    else:
        (call,) = choice["message"].get("tool_calls", [{"function": choice["message"]}])
        assert call["function"][kind] == PIECE * len(pieces)
    # Were each piece added to a copy of the whole, it would be 256 times.
    assert cpu_s(lambda: fold(len(pieces))) < 64 * cpu_s(lambda: fold(len(pieces) // 16))
