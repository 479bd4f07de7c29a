"""Lines of servers that imitate Ollama, and answers that Ollama's API has no field for."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest

from llama_smart_proxy.proxy.chat import ChatRequest, Fold, Json, Timing
from llama_smart_proxy.proxy.dialects import openai
from llama_smart_proxy.proxy.dialects.ollama import CHAT, WIRE, OllamaReader

TIMES = Timing(arrived_s=10.0, sent_s=10.5)


@pytest.mark.parametrize("odd", ["x", "7ms", -1, None, [], "7"])
def test_odd_counts_do_not_fail_an_answer(odd: Any) -> None:
    names = ("prompt_eval_count", "eval_count", "load_duration", "total_duration", "eval_duration")
    chunk = OllamaReader().read(orjson.dumps({"response": "Hi", "done": True} | dict.fromkeys(names, odd)))
    assert chunk is not None and chunk["choices"][0]["delta"] == {"content": "Hi"}
    count = 7 if odd == "7" else 0
    assert chunk["usage"] == {"prompt_tokens": count, "completion_tokens": count, "total_tokens": 2 * count}


@pytest.mark.parametrize(
    "calls",
    [
        b'[null,{"function":{"name":"a","arguments":{"x":1}}}]',
        b'[{"name":"a","arguments":{"x":1}}]',
        b'{"function":{"name":"a","arguments":{"x":1}}}',
        b'[{"function":{"name":"a","arguments":{"x":1}},"score":NaN}]',
    ],
)
def test_odd_calls_are_calls(calls: bytes) -> None:
    chunk = OllamaReader().read(b'{"message":{"tool_calls":' + calls + b"}}")
    assert chunk is not None
    functions = [call["function"] for call in chunk["choices"][0]["delta"]["tool_calls"]]
    assert functions == [{"name": "a", "arguments": '{"x":1}'}]


def test_a_refusal_is_the_text_of_the_answer() -> None:
    writer = CHAT.writer(ChatRequest({"model": "m"}, True), TIMES)
    parts = [{"choices": [{"index": 0, "delta": {"content": None, "refusal": text}}]} for text in ("I can", "not.")]
    lines = b"".join(writer.chunk(part) for part in parts) + writer.end()
    assert "".join(json.loads(line)["message"]["content"] for line in lines.splitlines()) == "I cannot."
    whole = Fold()
    for part in parts:
        whole.add(part)
    assert json.loads(writer.reply(whole.completion()))["message"]["content"] == "I cannot."


@pytest.mark.parametrize(
    "parts",
    [
        ["Hi"],
        [{"text": "Hi"}],
        [{"type": "text", "text": None}, {"type": "text", "text": "Hi"}],
        [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}, {"type": "text", "text": "Hi"}],
        [{"type": "reasoning", "text": "Hm."}, "Hi"],
    ],
)
def test_odd_parts_in_the_history_do_not_end_a_chat(parts: list[Any]) -> None:
    messages: list[Json] = [{"role": "assistant", "content": parts}]
    sent = WIRE.encode(ChatRequest({"model": "m", "messages": messages}, True))[1]["messages"]
    assert [message["content"] for message in sent] == ["Hi"]


def test_a_custom_tools_call_in_the_history_is_a_call() -> None:
    call = {"id": "a", "type": "custom", "custom": {"name": "patch", "input": "x"}}
    messages: list[Json] = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    sent = WIRE.encode(ChatRequest({"model": "m", "messages": messages}, True))[1]["messages"][0]["tool_calls"]
    assert [found["function"] for found in sent] == [{"name": "patch", "arguments": {"input": "x"}}]
    assert "custom" in call


@pytest.mark.parametrize("options", ["x", 5, [], None, {}])
def test_odd_stream_options_do_not_fail_a_request(options: Any) -> None:
    body = openai.WIRE.encode(ChatRequest({"model": "m", "messages": [], "stream_options": options}, True))[1]
    assert body["stream_options"] == {"include_usage": True}
