"""The agent `think`: thoughts apart from the answer, wherever the text is cut into pieces."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_smart_proxy.agents.base import Context
from llama_smart_proxy.agents.think import Think
from llama_smart_proxy.proxy.chat import ChatRequest, Chunk
from tests.support.laws import law


class Facts:
    """All of a context that the agent looks at."""

    def __init__(self, config: Think.Config) -> None:
        self.config = config


END = Chunk({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})


def passed(chunks: list[Chunk], **options: Any) -> list[Chunk]:
    """What becomes of these chunks."""
    config = Think.Config(**options)

    async def source() -> AsyncIterator[Chunk]:
        for chunk in chunks:
            yield chunk

    async def run() -> list[Chunk]:
        agent = Think(config)
        return [chunk async for chunk in agent.on_response(source(), cast(Context, Facts(config)))]

    return asyncio.run(run())


def told(pieces: list[str], **options: Any) -> tuple[str, str]:
    """Reasoning and text of an answer that came in these pieces."""
    made = passed([*map(Chunk.of, pieces)], **options)
    return "".join(chunk.reasoning for chunk in made), "".join(chunk.text for chunk in made)


def cuts(text: str) -> st.SearchStrategy[list[str]]:
    places = st.lists(st.integers(0, len(text)), max_size=8).map(sorted)
    return places.map(lambda at: [text[a:b] for a, b in zip([0, *at], [*at, len(text)], strict=True) if a < b])


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("<think>so it is</think>Hello", "so it is", "Hello"),
        ("\n <think>\nso\n\nit is \n</think>\n\nHello\n", "so\n\nit is", "Hello\n"),
        ("<think>\n\n</think>\n\nHello", "", "Hello"),
        ("<thinking>a</think>b</thinking>c", "a</think>b", "c"),
        ("Hello <think>no</think>", "", "Hello <think>no</think>"),
        ("```\n<think>x</think>\n```", "", "```\n<think>x</think>\n```"),
        ("<thin ice", "", "<thin ice"),
        ("<think>for ever </thi", "for ever </thi", ""),
        ("<think>a</think><think>b</think>", "a", "<think>b</think>"),
        ("  plain", "", "  plain"),
        ("<", "", "<"),
    ],
)
def test_a_leading_thought_is_reasoning_however_it_is_cut(text: str, reasoning: str, answer: str) -> None:
    @law(1000)
    @given(cuts(text))
    def check(pieces: list[str]) -> None:
        assert told(pieces) == (reasoning, answer)

    check()


def test_an_answer_may_begin_within_a_thought() -> None:
    for pieces in (
        ["so ", "it is</th", "ink>\n", "Hello"],
        ["\n", "so it is\n</thinking>", "Hello"],
        ["<thi", "nk>so it is</think>", "Hello"],
    ):
        assert told(pieces, starts_inside=True) == ("so it is", "Hello")
    assert told(["so", " it is"], starts_inside=True) == ("so it is", "")
    assert told(["<thi"], starts_inside=True) == ("<thi", "")


def test_a_server_that_tells_thoughts_apart_is_believed() -> None:
    made = passed([Chunk.of(reasoning="so"), Chunk.of("Hello")], starts_inside=True)
    assert [(chunk.reasoning, chunk.text) for chunk in made] == [("so", ""), ("", "Hello")]


def test_only_what_may_be_a_tag_is_held_back() -> None:
    made = passed([Chunk.of(text) for text in ("<thi", "nk>", "one ", "two", "</thi", "ef", "</think>", "x", "y")])
    assert [(chunk.reasoning, chunk.text) for chunk in made] == [
        ("one", ""),
        (" two", ""),
        ("</thief", ""),
        ("", "x"),
        ("", "y"),
    ]


def test_chunks_behind_the_thought_are_the_same_objects() -> None:
    chunks = [Chunk.of("<think>a</think>b"), Chunk({"choices": []}, b"frame"), Chunk.of("c")]
    made = passed(chunks)
    assert made[-2:] == chunks[-2:] and made[-2].frame == b"frame"
    plain = [Chunk.of("a"), Chunk.of("b")]
    assert passed(plain) == plain
    for texts in (["<th", "in ice"], ["\n", " ", "a"], ["<think"], [" ", "<"]):
        held = [*map(Chunk.of, texts), END]
        assert passed(held) == held


@pytest.mark.parametrize(
    ("texts", "reasoning", "answer"),
    [
        (["<think>a", "</thi"], "a</thi", ""),
        (["<think>a", "</think> b"], "a", "b"),
        (["<think>a"], "a", ""),
        (["<thi"], "", "<thi"),
        (["<th", "ink"], "", "<think"),
    ],
)
def test_the_end_comes_last_though_it_brings_text(texts: list[str], reasoning: str, answer: str) -> None:
    last = Chunk({"choices": [{"index": 0, "delta": {"content": texts[-1]}, "finish_reason": "stop"}]})
    for chunks in ([*map(Chunk.of, texts[:-1]), last], [*map(Chunk.of, texts), END]):
        made = passed(chunks)
        assert ("".join(chunk.reasoning for chunk in made), "".join(chunk.text for chunk in made)) == (
            reasoning,
            answer,
        )
        assert [chunk.finish_reason for chunk in made] == [None] * (len(made) - 1) + ["stop"]


def test_what_is_held_leaves_before_a_tool_call() -> None:
    call = Chunk({"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0}]}, "finish_reason": None}]})
    for text, reasoning, answer in (("<thi", "", "<thi"), ("<think>a</", "a</", "")):
        made = passed([Chunk.of(text), call, END])
        assert made[-2:] == [call, END]
        told = made[:-2]
        assert ("".join(chunk.reasoning for chunk in told), "".join(chunk.text for chunk in told)) == (
            reasoning,
            answer,
        )


def test_several_answers_are_kept_apart() -> None:
    pieces = [("<think>a", 0), ("<think>b", 1), ("</think>A", 0), ("c</think>B", 1)]
    made = passed([Chunk.of(text, index=index) for text, index in pieces])
    for index, expected in ((0, ("a", "A")), (1, ("bc", "B"))):
        own = [chunk for chunk in made if chunk.index == index]
        assert ("".join(c.reasoning for c in own), "".join(c.text for c in own)) == expected


def test_reasoning_becomes_text_between_tags() -> None:
    chunks = [Chunk.of(reasoning="so "), Chunk.of(reasoning="it is"), Chunk.of("Hello"), Chunk.of("!")]
    text = "".join(chunk.text for chunk in passed(chunks, to="text"))
    assert text == "<think>\nso it is\n</think>\n\nHello!"
    assert "".join(chunk.text for chunk in passed([Chunk.of(reasoning="x")], to="text")) == "<think>\nx\n</think>\n\n"


def test_a_request_may_keep_its_history() -> None:
    config = Think.Config(keep_history=True)
    request = ChatRequest({"messages": [{"role": "assistant", "content": "<think>a</think>b"}]})
    before = json.dumps(request.body)
    asyncio.run(Think(config).on_request(request, cast(Context, Facts(config))))
    assert json.dumps(request.body) == before
