"""The agent `think`: thoughts apart from the answer, in every API, wherever the text is cut into pieces."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.support import raw_client
from tests.support.agent_clients import WAYS
from tests.support.e2e_support import CHAT, Fakes
from tests.support.harness import Proxy, session_proxy


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Proxy, Fakes]]:
    fakes = Fakes(tmp_path_factory.mktemp("think"))
    models = {"m": fakes.model(fields={"parallel": 4}), "text": {"model": "m", "agents": [{"think": {"to": "text"}}]}}
    with session_proxy(fakes.config(models, keep_alive=-1) | {"agents": ["think"]}) as proxy:
        yield proxy, fakes


async def test_thoughts_are_told_as_each_api_tells_them(stage: tuple[Proxy, Fakes]) -> None:
    texts = ["\n<th", "ink>\nit ", "is so</th", "ink>\n", "\nHel", "lo"]
    for way in WAYS:
        said = await way.ask(stage[0], way.steered(texts=texts))
        reasoning = "" if way.path == "/v1/completions" else "it is so"  # which has no place for it
        assert (said.reasoning, said.text, said.error) == (reasoning, "Hello", None), way


async def test_reasoning_is_told_as_text_where_a_model_is_set_so(stage: tuple[Proxy, Fakes]) -> None:
    for way in WAYS:
        if way.path in ("/v1/chat/completions", "/api/chat", "/api/generate") and (way.stream or "/api" in way.path):
            said = await way.ask(stage[0], way.steered(model="text", thoughts="so", texts=["Hello"]))
            assert (said.reasoning, said.text) == ("", "<think>\nso\n</think>\n\nHello"), way


async def test_earlier_thoughts_are_no_prose_to_the_model(stage: tuple[Proxy, Fakes]) -> None:
    proxy, fakes = stage
    history = [
        {"role": "user", "content": "<think>mine</think>"},
        {"role": "assistant", "content": "<think>\nold\n</think>\n\nHello"},
        {"role": "user", "content": "again"},
    ]
    await raw_client.post(proxy.port, CHAT, {"model": "m", "messages": history})
    sent = fakes.generated()[-1]["messages"]
    assert sent[0] == history[0]
    assert sent[1] == {"role": "assistant", "content": "Hello", "reasoning_content": "old"}


async def test_earlier_thoughts_in_blocks_are_set_apart_too(stage: tuple[Proxy, Fakes]) -> None:
    proxy, fakes = stage
    for blocks, left in (
        ([{"type": "text", "text": "<think>old</think>Hello"}], [{"type": "text", "text": "Hello"}]),
        (
            [{"type": "text", "text": "<think>old</think>"}, {"type": "text", "text": "Hi"}],
            [{"type": "text", "text": "Hi"}],
        ),
    ):
        messages = [{"role": "assistant", "content": blocks}, {"role": "user", "content": "again"}]
        await raw_client.post(proxy.port, "/v1/messages", {"model": "m", "max_tokens": 9, "messages": messages})
        sent = json.loads(fakes.events("request")[-1]["body"])["messages"]
        assert sent[0]["content"] == [{"type": "thinking", "thinking": "old", "signature": ""}, *left]


async def test_an_earlier_answer_without_text_is_left_as_it_is(stage: tuple[Proxy, Fakes]) -> None:
    proxy, fakes = stage
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    said = {"role": "assistant", "tool_calls": [call]}
    messages = [said, {"role": "tool", "tool_call_id": "1", "content": "x"}]
    await raw_client.post(proxy.port, CHAT, {"model": "m", "messages": messages})
    assert fakes.generated()[-1]["messages"][0] == said
