"""Requests of the Anthropic API: what they mean in OpenAI's shape, what others may change, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from llama_smart_proxy.proxy.chat import ChatRequest, Json, without_extensions
from llama_smart_proxy.proxy.dialects.anthropic import MESSAGES, count_tokens
from llama_smart_proxy.proxy.errors import BadRequest

CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
PDF = {"type": "base64", "media_type": "application/pdf", "data": "JVBE"}


def decoded(body: Json) -> ChatRequest:
    return MESSAGES.decode(copy.deepcopy(body))


# -- what it means -----------------------------------------------------------------------------------------------------


def one(content: Any, role: str = "user") -> list[Json]:
    """The OpenAI messages, bare, that one message becomes."""
    body = {"model": "m", "max_tokens": 5, "messages": [{"role": role, "content": content}]}
    messages: list[Json] = without_extensions(decoded(body).body["messages"])
    return messages


def test_system_is_the_first_message() -> None:
    question = {"role": "user", "content": "hi"}
    body = {"max_tokens": 5, "system": "Be kind.", "messages": [question]}
    assert decoded(body).body["messages"] == [{"role": "system", "content": "Be kind."}, question]
    blocks = [{"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}}]
    assert without_extensions(decoded({**body, "system": blocks}).body["messages"][0]) == {
        "role": "system",
        "content": [{"type": "text", "text": "Be kind."}],
    }


def test_order_of_tool_results_and_what_the_user_says_is_kept() -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "QUJD"}}
    content = [
        {"type": "tool_result", "tool_use_id": "a", "content": "21 C", "is_error": True},
        {"type": "tool_result", "tool_use_id": "b", "content": [{"type": "text", "text": "rain"}, image]},
        {"type": "text", "text": "and now?"},
        {"type": "tool_result", "tool_use_id": "c"},
    ]
    shown = {"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}}
    assert one(content) == [
        {"role": "tool", "tool_call_id": "a", "content": "21 C"},
        {"role": "tool", "tool_call_id": "b", "content": [{"type": "text", "text": "rain"}, shown]},
        {"role": "user", "content": [{"type": "text", "text": "and now?"}]},
        {"role": "tool", "tool_call_id": "c", "content": ""},
    ]


def test_thinking_text_and_tool_use_are_one_message_of_the_assistant() -> None:
    content = [
        {"type": "thinking", "thinking": "Hm. ", "signature": "s1"},
        {"type": "redacted_thinking", "data": "x"},
        {"type": "text", "text": "Let me look."},
        {"type": "tool_use", "id": "t1", "name": "look", "input": {"at": "Łódź"}},
        {"type": "thinking", "thinking": "So.", "signature": "s2"},
    ]
    function = {"name": "look", "arguments": '{"at":"Łódź"}'}
    assert one(content, "assistant") == [
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "Let me look."}],
            "reasoning_content": "Hm. So.",
            "tool_calls": [{"id": "t1", "type": "function", "function": function}],
        }
    ]


def test_content_of_an_assistant_that_only_calls_is_empty() -> None:
    message = one([{"type": "tool_use", "id": "t1", "name": "f", "input": {}}], "assistant")[0]
    assert message["content"] == "" and len(message["tool_calls"]) == 1


def test_images_by_address_and_documents_of_plain_text_are_parts() -> None:
    content = [
        {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}},
        {"type": "document", "title": "t", "source": {"type": "text", "media_type": "text/plain", "data": "Dear"}},
    ]
    assert one(content)[0]["content"] == [
        {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
        {"type": "text", "text": "Dear"},
    ]


SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "minLength": 1}}}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"stop_sequences": ["END"]}, {"stop": ["END"]}),
        ({"temperature": 0.5, "top_p": 0.9, "top_k": 20}, {"temperature": 0.5, "top_p": 0.9, "top_k": 20}),
        (
            {"tools": [{"name": "f", "description": "d", "input_schema": SCHEMA, "cache_control": {}}]},
            {"tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}}]},
        ),
        ({"tool_choice": {"type": "auto"}}, {"tool_choice": "auto"}),
        ({"tool_choice": {"type": "none"}}, {"tool_choice": "none"}),
        (
            {"tool_choice": {"type": "any", "disable_parallel_tool_use": True}},
            {"tool_choice": "required", "parallel_tool_calls": False},
        ),
        (
            {"tool_choice": {"type": "tool", "name": "f"}},
            {"tool_choice": {"type": "function", "function": {"name": "f"}}},
        ),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 2048}},
            {"chat_template_kwargs": {"enable_thinking": True}, "thinking_budget_tokens": 2048},
        ),
        ({"thinking": {"type": "disabled"}}, {"chat_template_kwargs": {"enable_thinking": False}}),
        ({"thinking": {"type": "adaptive"}}, {}),
        (
            {"thinking": {"type": "disabled"}, "chat_template_kwargs": {"enable_thinking": True}},
            {"chat_template_kwargs": {"enable_thinking": True}},
        ),
        (
            {"output_config": {"effort": "low", "format": {"type": "json_schema", "schema": SCHEMA}}},
            {"response_format": {"type": "json_schema", "json_schema": {"name": "response", "schema": SCHEMA}}},
        ),
        ({"metadata": {"user_id": "u1", "team": 3}}, {"user": "u1"}),
        ({"service_tier": "auto", "stop": "x", "tools": [], "system": "", "tool_choice": None}, {}),
    ],
)
def test_fields_of_the_table_move_and_no_others(given: Json, expected: Json) -> None:
    base = {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}
    assert without_extensions(decoded({**base, **given}).body) == {**base, **expected}


def test_stamp_of_claude_code_does_not_spoil_the_prompt_cache_and_comes_back() -> None:
    def stamped(stamp: str) -> str:
        return f"x-anthropic-billing-header: cc_version=2.1; cch={stamp};You are Claude Code."

    for shape in (lambda text: text, lambda text: [{"type": "text", "text": text}]):
        bodies = [
            {"max_tokens": 5, "system": shape(stamped(stamp)), "messages": [{"role": "user", "content": "hi"}]}
            for stamp in ("a5145", "0b2c3")
        ]
        first, second = (without_extensions(decoded(body).body) for body in bodies)
        assert first == second
        assert [MESSAGES.encode(decoded(body)) for body in bodies] == bodies
    request = decoded(bodies[0])
    request.body["messages"][0]["content"][0]["text"] += " Be brief."
    assert MESSAGES.encode(request)["system"][0]["text"].endswith("cch=fffff;You are Claude Code. Be brief.")


# -- edits by others ---------------------------------------------------------------------------------------------------

TALK: Json = {
    "model": "m",
    "max_tokens": 5,
    "system": "Be kind.",
    "messages": [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "mark": 1, "content": [{"type": "thinking", "thinking": "Hm.", "signature": "s"}]},
        {"role": "user", "mark": 2, "content": [{"type": "tool_result", "tool_use_id": "a", "is_error": True}]},
    ],
}


def test_message_put_in_front_joins_the_system_prompt_and_others_stay_where_they_are_put() -> None:
    request = decoded(TALK)
    request.body["messages"].insert(0, {"role": "system", "content": "Facts."})
    added = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "go on"}]
    request.body["messages"] += added
    body = MESSAGES.encode(request)
    assert body["system"] == [{"type": "text", "text": "Facts."}, {"type": "text", "text": "Be kind."}]
    assert body["messages"] == [*TALK["messages"], *added]


def test_text_that_is_added_stands_before_the_calls_and_new_reasoning_takes_the_place_of_all_thinking() -> None:
    use = {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}}
    thinking = [{"type": "thinking", "thinking": text, "signature": text} for text in ("A", "B")]
    content = [thinking[0], {"type": "text", "text": "1"}, use]
    request = decoded({"max_tokens": 5, "messages": [{"role": "assistant", "content": content}]})
    request.body["messages"][0]["content"].append({"type": "text", "text": "2"})
    (message,) = MESSAGES.encode(request)["messages"]
    assert message["content"] == [*content[:2], {"type": "text", "text": "2"}, use]
    request = decoded({"max_tokens": 5, "messages": [{"role": "assistant", "content": [*content, thinking[1]]}]})
    request.body["messages"][0]["reasoning_content"] = "C"
    (message,) = MESSAGES.encode(request)["messages"]
    assert message["content"] == [{**thinking[0], "thinking": "C"}, *content[1:]]


def test_changed_reasoning_and_tool_result_keep_what_is_beside_them() -> None:
    request = decoded(TALK)
    _, _, assistant, tool = request.body["messages"]
    assistant["reasoning_content"] = "Well."
    assistant["content"] = "Yes."
    tool["content"] = "done"
    thinking = {"type": "thinking", "thinking": "Well.", "signature": "s"}
    result = {"type": "tool_result", "tool_use_id": "a", "is_error": True, "content": "done"}
    assert MESSAGES.encode(request)["messages"][1:] == [
        {"role": "assistant", "mark": 1, "content": [thinking, {"type": "text", "text": "Yes."}]},
        {"role": "user", "mark": 2, "content": [result]},
    ]


def test_fields_that_others_add_or_take_away_are_added_and_taken_away() -> None:
    request = decoded({**TALK, "thinking": {"type": "enabled", "budget_tokens": 9}, "tool_choice": {"type": "any"}})
    body = request.body
    del body["tool_choice"]
    body["chat_template_kwargs"]["enable_thinking"] = False
    del body["thinking_budget_tokens"]
    body["tools"] = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]
    body["messages"].append({"role": "assistant", "content": None, "tool_calls": [CALL]})
    request.stream = True
    made = MESSAGES.encode(request)
    use = {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}}
    assert made["messages"].pop() == {"role": "assistant", "content": [use]}
    added = {"thinking": {"type": "disabled"}, "tools": [{"name": "f", "input_schema": SCHEMA}], "stream": True}
    assert made == {**TALK, **added}


# -- what is refused ---------------------------------------------------------------------------------------------------


def user(*blocks: Any) -> Json:
    return {"messages": [{"role": "user", "content": list(blocks)}]}


REFUSED: list[tuple[Json, str]] = [
    ({"max_tokens": ...}, "max_tokens: Field required"),
    ({"max_tokens": True}, "max_tokens: Input should be a valid integer"),
    ({"max_tokens": -1}, "max_tokens: Input should be greater than or equal to 0"),
    ({"stream": "yes"}, "stream: Input should be a valid boolean"),
    ({"messages": ...}, "messages: Field required"),
    ({"messages": "hi"}, "messages: Input should be a valid list"),
    ({"messages": []}, "messages: at least one message is required"),
    ({"messages": ["hi"]}, "messages.0: Input should be a valid dictionary"),
    ({"messages": [{"content": "hi"}]}, "messages.0.role: Field required"),
    ({"messages": [{"role": "user"}]}, "messages.0.content: Field required"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content: Input should be a valid list"),
    (
        {"messages": [{"role": "bot", "content": ""}]},
        "messages.0.role: Input should be 'user', 'assistant' or 'system'",
    ),
    (user("hi"), "messages.0.content.0: Input should be a valid dictionary"),
    (user({"text": "hi"}), "messages.0.content.0.type: Field required"),
    (user({"type": "text"}), "messages.0.content.0.text: Field required"),
    (user({"type": "sound"}), "messages.0.content.0: content blocks of type 'sound' are not supported here"),
    (
        user({"type": "text", "text": ""}, {"type": "tool_use", "id": "", "name": "", "input": {}}),
        "messages.0.content.1: content blocks of type 'tool_use' are not supported here",
    ),
    (
        user({"type": "document", "source": PDF}),
        "messages.0.content.0.source: documents with a source of type 'base64' are not supported here, only plain text",
    ),
    (
        user({"type": "image", "source": {"type": "file", "file_id": "f"}}),
        "messages.0.content.0.source: images with a source of type 'file' are not supported here",
    ),
    (
        user({"type": "tool_result", "tool_use_id": "a", "content": [{"type": "search_result"}]}),
        "messages.0.content.0.content.0: content blocks of type 'search_result' are not supported here",
    ),
    (
        {"messages": [{"role": "assistant", "content": [{"type": "server_tool_use"}]}]},
        "messages.0.content.0: content blocks of type 'server_tool_use' are not supported here",
    ),
    (
        {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "", "name": "", "input": "{}"}]}]},
        "messages.0.content.0.input: Input should be a valid dictionary",
    ),
    (
        {"system": [{"type": "image"}]},
        "system.0: Input tag 'image' does not match any of the expected tags: 'text'",
    ),
    ({"system": 7}, "system: Input should be a valid list"),
    ({"stop_sequences": "END"}, "stop_sequences: Input should be a valid list"),
    ({"tools": [{"name": "f"}]}, "tools.0.custom.input_schema: Field required"),
    (
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        "tools.0: tools of type 'web_search_20250305' are not available here, only those with an input_schema",
    ),
    (
        {"tool_choice": {"type": "some"}},
        "tool_choice: Input tag 'some' does not match any of the expected tags: 'auto', 'any', 'tool', 'none'",
    ),
    ({"tool_choice": "auto"}, "tool_choice: Input should be a valid dictionary"),
    ({"tool_choice": {"type": "tool"}}, "tool_choice.name: Field required"),
    ({"thinking": True}, "thinking: Input should be a valid dictionary"),
    ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type: Input should be 'json_schema'"),
    ({"metadata": "me"}, "metadata: Input should be a valid dictionary"),
]
"""What differs in a request, and why it cannot be translated."""


def changed(change: Json) -> Json:
    body = {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}], **change}
    return {key: value for key, value in body.items() if value is not ...}


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_cannot_mean_anything_is_refused_with_its_place(change: Json, message: str) -> None:
    with pytest.raises(BadRequest) as raised:
        MESSAGES.decode(changed(change))
    assert (raised.value.status, raised.value.message) == (400, message)


@pytest.mark.parametrize("value", ["\ud800", 2**64])
def test_tool_input_that_json_cannot_carry_is_refused(value: Any) -> None:
    block = {"type": "tool_use", "id": "", "name": "f", "input": {"a": value}}
    with pytest.raises(BadRequest, match=r"^messages\.0\.content\.0\.input: "):
        MESSAGES.decode({"max_tokens": 5, "messages": [{"role": "assistant", "content": [block]}]})


def test_part_that_anthropic_has_not_is_refused_on_the_way_back() -> None:
    request = decoded(TALK)
    request.body["messages"].append({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]})
    with pytest.raises(BadRequest, match="'input_audio'"):
        MESSAGES.encode(request)


# -- counting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"messages": [{"role": "user", "content": ""}]}, 1),
        ({"messages": [{"role": "user", "content": "12345678"}]}, 2),
        ({"messages": [{"role": "user", "content": "123456789"}]}, 3),
        ({"messages": [{"role": "user", "content": "ééé"}]}, 2),
        ({"messages": [{"role": "user", "content": "\ud800!"}]}, 1),
        ({"system": "1234", "messages": [{"role": "user", "content": [{"type": "text", "text": "1234"}]}]}, 2),
        (user({"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}), 1600),
        (user({"type": "tool_result", "tool_use_id": "abc", "content": [{"type": "text", "text": "12345678"}]}), 2),
        ({"messages": [{"role": "user", "content": "1"}], "tools": [{"name": "f", "input_schema": {"a": "é"}}]}, 10),
        ({"messages": [{"role": "user", "content": "1"}], "max_tokens": "many"}, 1),
    ],
)
def test_tokens_are_a_quarter_of_the_bytes_rounded_up_and_a_fixed_number_for_an_image(body: Json, tokens: int) -> None:
    assert count_tokens(body) == tokens


def test_tool_calls_and_thinking_count_too() -> None:
    call = {"type": "tool_use", "id": "i" * 99, "name": "four", "input": {"a": 1, "b": 2}}
    thinking = {"type": "thinking", "thinking": "1234", "signature": "s" * 99}
    assert count_tokens({"messages": [{"role": "assistant", "content": [thinking, call]}]}) == 2 + 4


def test_counting_refuses_what_a_request_would_be_refused_for() -> None:
    with pytest.raises(BadRequest, match=r"^messages: Field required$"):
        count_tokens({"model": "m"})
