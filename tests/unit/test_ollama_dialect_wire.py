"""Requests that came through other APIs, as an Ollama server is asked."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from llama_smart_proxy.proxy.chat import ChatRequest, Json, attach
from llama_smart_proxy.proxy.dialects import OLLAMA
from llama_smart_proxy.proxy.dialects.ollama import WIRE
from llama_smart_proxy.proxy.errors import BadRequest

ASK = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1}}, "additionalProperties": False}
LOOK: Json = {"name": "look", "parameters": SCHEMA, "strict": True}
TOOL = {"type": "function", "function": LOOK}
OTHER = {"type": "function", "function": {**LOOK, "name": "other"}}


def sent(**body: Any) -> Json:
    """What an Ollama server is asked on behalf of an OpenAI chat, but for the model."""
    path, asked = WIRE.encode(ChatRequest({"model": "m", "messages": ASK, **body}, stream=False))
    assert (path, asked.pop("model"), asked.pop("stream")) == ("/api/chat", "m", True)
    return asked


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"max_completion_tokens": 10}, {"options": {"num_predict": 10}}),
        ({"max_tokens": 10, "max_completion_tokens": 9}, {"options": {"num_predict": 9}}),
        ({"n_predict": 8, "max_tokens": None}, {"options": {"num_predict": 8}}),
        ({"temperature": 0, "top_p": None, "seed": 1}, {"options": {"temperature": 0, "seed": 1}}),
        ({"stop": "x"}, {"options": {"stop": ["x"]}}),
        ({"stop": ["x", "y"]}, {"options": {"stop": ["x", "y"]}}),
        ({"n_keep": 4, "repeat_penalty": 1.1}, {"options": {"num_keep": 4, "repeat_penalty": 1.1}}),
        (
            {"temperature": 1, "options": {"num_ctx": 9, "temperature": 2}},
            {"options": {"num_ctx": 9, "temperature": 2}},
        ),
        (
            {"keep_alive": "1h", "truncate": False, "shift": True},
            {"keep_alive": "1h", "truncate": False, "shift": True},
        ),
        ({"response_format": {"type": "text"}}, {}),
        ({"response_format": {"type": "json_object"}}, {"format": "json"}),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, {"format": SCHEMA}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
            {"format": SCHEMA},
        ),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}, {"format": "json"}),
        ({"json_schema": SCHEMA}, {"format": SCHEMA}),
        ({"format": "json", "response_format": {"type": "text"}}, {"format": "json"}),
        ({"tools": [TOOL], "tool_choice": "auto"}, {"tools": [TOOL]}),
        ({"tools": [TOOL], "tool_choice": "none"}, {}),
        (
            {"tools": [TOOL, OTHER], "tool_choice": {"type": "function", "function": {"name": "other"}}},
            {"tools": [OTHER]},
        ),
        ({"tools": []}, {}),
        ({"chat_template_kwargs": {"enable_thinking": False}}, {"think": False}),
        ({"chat_template_kwargs": {"enable_thinking": True, "x": 1}}, {"think": True}),
        ({"chat_template_kwargs": {"x": 1}}, {}),
        ({"reasoning_effort": "none"}, {"think": False}),
        ({"reasoning_effort": "minimal"}, {"think": "low"}),
        ({"reasoning_effort": "high"}, {"think": "high"}),
        ({"reasoning_effort": "xhigh"}, {"think": "max"}),
        ({"reasoning_effort": "of the future"}, {"think": True}),
        ({"reasoning_effort": "high", "think": False}, {"think": False}),
        ({"logprobs": True, "top_logprobs": 4}, {"logprobs": True, "top_logprobs": 4}),
        ({"logprobs": True}, {"logprobs": True}),
        ({"n": 1, "logit_bias": {"1": 2}, "user": "u", "parallel_tool_calls": True, "stream_options": {}, "x": 1}, {}),
    ],
)
def test_an_openai_request_becomes_an_ollama_one(ours: Json, theirs: Json) -> None:
    assert sent(**ours) == {"messages": ASK, **theirs}


CONVERSATION: list[Json] = [
    {"role": "developer", "content": "Be brief."},
    {
        "role": "user",
        "name": "ann",
        "content": [
            {"type": "text", "text": "what"},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD", "detail": "low"}},
            {"type": "text", "text": "is it?"},
            {"type": "input_audio", "input_audio": {"data": "REVG", "format": "wav"}},
        ],
    },
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "Hm.",
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "here"}'}},
            {"id": "c2", "type": "function", "function": {"name": "rest", "arguments": ""}},
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "fog"}]},
    {"role": "tool", "tool_call_id": "unknown", "content": "?"},
]


def test_openai_messages_become_ollama_messages_one_each() -> None:
    assert sent(messages=CONVERSATION)["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "what\nis it?", "images": ["QUJD", "REVG"]},
        {
            "role": "assistant",
            "content": "",
            "thinking": "Hm.",
            "tool_calls": [
                {"id": "c1", "function": {"name": "look", "arguments": {"at": "here"}}},
                {"id": "c2", "function": {"name": "rest", "arguments": {}}},
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "tool_name": "look", "content": "fog"},
        {"role": "tool", "tool_call_id": "unknown", "content": "?"},
    ]


@pytest.mark.parametrize(
    ("body", "theirs"),
    [
        ({"prompt": "a"}, {"prompt": "a", "raw": True}),
        ({"prompt": ["a"], "max_tokens": 3}, {"prompt": "a", "raw": True, "options": {"num_predict": 3}}),
        ({"prompt": "a", "suffix": "b"}, {"prompt": "a", "suffix": "b"}),
        ({"prompt": "a", "logprobs": 2}, {"prompt": "a", "raw": True, "logprobs": True, "top_logprobs": 2}),
    ],
)
def test_an_openai_text_request_becomes_generate(body: Json, theirs: Json) -> None:
    assert WIRE.encode(ChatRequest(body, stream=False)) == ("/api/generate", {**theirs, "stream": True})


def test_what_another_api_set_aside_does_not_get_into_ollama() -> None:
    message = attach({"role": "user", "content": "hi"}, "anthropic", {"cache_control": {}})
    tool = attach(
        {"type": "function", "function": attach(copy.copy(LOOK), "anthropic", {"x": 1})}, "anthropic", {"y": 1}
    )
    body = attach({"messages": [message], "tools": [tool]}, "anthropic", {"metadata": {}})
    assert WIRE.encode(ChatRequest(body, stream=False))[1] == {"messages": ASK, "tools": [TOOL], "stream": True}


@pytest.mark.parametrize(
    "body",
    [
        {"n": 2},
        {"prompt": "a", "n": 3},
        {"prompt": ["a", "b"]},
        {"prompt": [1, 2]},
        {"prompt": None},
        {"messages": None},
        {"messages": ["hi"]},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"role": "user", "content": [{"type": "file", "file": {}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x/y.png"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"custom": {}}]}]},
        {"messages": [{"role": "assistant", "tool_calls": 5}]},
    ],
)
def test_what_ollama_cannot_be_asked_is_refused(body: Json) -> None:
    asked = body if "prompt" in body else {"messages": ASK, **body}
    with pytest.raises(BadRequest) as refused:
        WIRE.encode(ChatRequest(asked, stream=True))
    assert refused.value.status == 400


# -- where an answer ends ----------------------------------------------------------------------------------------------


def line(message: str, rest: str = '"done":false') -> bytes:
    """A line of Ollama's `/api/chat`."""
    return f'{{"model":"m","created_at":"x","message":{{"role":"assistant",{message}}},{rest}}}\n'.encode()


def calling(arguments: str) -> bytes:
    """One with a tool call."""
    return line(f'"content":"","tool_calls":[{{"function":{{"name":"set_todo","arguments":{arguments}}}}}]')


NOT_LAST = {
    "an argument called done": calling('{"done":true}'),
    "an argument called done, spaced": calling('{"done": true}'),
    "an argument called status": calling('{"status":"success"}'),
    "arguments within arguments": calling('{"list":[{"done":true,"status":"success"}]}'),
    "a text about it": line(r'"content":"{\"done\":true}"'),
    "a pull that goes on": b'{"status":"verifying success"}\n',
    "a list": b'[{"done":true}]\n',
    "no JSON": b'"done":true\n',
}
LAST = {
    "an answer's end": line('"content":""', '"done_reason":"stop","done":true'),
    "an answer's end, spaced": line('"content":""', '"done": true'),
    "with a call": line('"content":"","tool_calls":[{"function":{"name":"f","arguments":{}}}]', '"done":true'),
    "a pull's end": b'{"status":"success"}\n',
    "behind another line": calling('{"done":false}') + line('"content":""', '"done":true'),
}


@pytest.mark.parametrize("name", NOT_LAST)
def test_what_stands_within_a_line_does_not_make_it_the_last(name: str) -> None:
    assert not OLLAMA.is_end(NOT_LAST[name])


@pytest.mark.parametrize("name", LAST)
def test_the_last_line_is_known(name: str) -> None:
    assert OLLAMA.is_end(LAST[name])
