"""Requests to the Responses API as OpenAI chats: what becomes of each item, tool and field, and what is refused."""

from __future__ import annotations

import base64
import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_smart_proxy.proxy.chat import ChatRequest, Extensions, Json, extensions_of, without_extensions
from llama_smart_proxy.proxy.dialects.responses import CODEC
from llama_smart_proxy.proxy.errors import BadRequest
from tests.support.laws import JSON_VALUES, TEXT, law, objects_in

URL = "data:image/png;base64,QUJD"
FUNCTION = {"name": "look", "description": "Looks", "parameters": {"type": "object"}, "strict": True}
FLAT = {"type": "function", **FUNCTION}
NESTED = {"type": "function", "function": FUNCTION}
OTHER = {"type": "function", "name": "other"}
HOSTED: list[Json] = [{"type": "web_search"}, {"type": "local_shell"}, {"type": "mcp", "server_label": "s"}]


def decoded(given: Any, **fields: Any) -> ChatRequest:
    return CODEC.decode({"model": "m", "input": copy.deepcopy(given), **copy.deepcopy(fields)})


def messages(given: Any, **fields: Any) -> list[Json]:
    found: list[Json] = without_extensions(decoded(given, **fields).body)["messages"]
    return found


def user(content: Any) -> Json:
    return {"role": "user", "content": content}


def assistant(content: Any = "", **fields: Any) -> Json:
    return {"role": "assistant", "content": content, **fields}


def call(known: str, name: str, arguments: str) -> Json:
    return {"id": known, "type": "function", "function": {"name": name, "arguments": arguments}}


def file(text: str, kind: str = "text/plain") -> str:
    return f"data:{kind};base64,{base64.b64encode(text.encode()).decode()}"


CALL = {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "look", "arguments": '{"a":1}'}
CALL_2 = {**CALL, "id": "fc_2", "call_id": "c2", "status": "completed"}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "seen"}
THOUGHT = {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "Hm"}]}
SAID: Json = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed"}
SAID["content"] = [{"type": "output_text", "text": "Hi", "annotations": [], "logprobs": []}]
LOOK = call("c1", "look", '{"a":1}')
LOOK_2 = {**LOOK, "id": "c2"}
CONVERSATIONS: dict[str, tuple[Any, list[Json]]] = {
    "a string": ("hi", [user("hi")]),
    "plain messages": (
        [user("hi"), assistant("Hello"), user("again")],
        [user("hi"), assistant("Hello"), user("again")],
    ),
    "one text part": ([user([{"type": "input_text", "text": "hi"}])], [user("hi")]),
    "parts": (
        [
            user(
                [
                    {"type": "input_text", "text": "what?"},
                    {"type": "input_image", "image_url": URL, "detail": "low"},
                    {"type": "input_image", "image_url": URL, "detail": None, "file_id": None},
                    {"type": "input_audio", "input_audio": {"data": "QUJD", "format": "wav"}},
                ]
            )
        ],
        [
            user(
                [
                    {"type": "text", "text": "what?"},
                    {"type": "image_url", "image_url": {"url": URL, "detail": "low"}},
                    {"type": "image_url", "image_url": {"url": URL}},
                    {"type": "input_audio", "input_audio": {"data": "QUJD", "format": "wav"}},
                ]
            )
        ],
    ),
    "a text file": ([user([{"type": "input_file", "filename": "a", "file_data": file("zażółć")}])], [user("zażółć")]),
    "another file": (
        [user([{"type": "input_file", "filename": "a.pdf", "file_data": file("x", "application/pdf")}])],
        [user([{"type": "file", "file": {"filename": "a.pdf", "file_data": file("x", "application/pdf")}}])],
    ),
    "developer and system": (
        [{"role": "developer", "content": "a"}, {"role": "system", "content": "b"}, user("hi")],
        [{"role": "system", "content": "a\n\nb"}, user("hi")],
    ),
    "a turn of the assistant": (
        [user("hi"), THOUGHT, SAID, CALL, CALL_2, RESULT, {**RESULT, "call_id": "c2"}],
        [
            user("hi"),
            assistant("Hi", reasoning_content="Hm", tool_calls=[LOOK, LOOK_2]),
            {"role": "tool", "tool_call_id": "c1", "content": "seen"},
            {"role": "tool", "tool_call_id": "c2", "content": "seen"},
        ],
    ),
    "two turns of the assistant": (
        [user("hi"), CALL, RESULT, THOUGHT, SAID, THOUGHT, CALL_2],
        [
            user("hi"),
            assistant(tool_calls=[LOOK]),
            {"role": "tool", "tool_call_id": "c1", "content": "seen"},
            assistant("Hi", reasoning_content="Hm"),
            assistant(reasoning_content="Hm", tool_calls=[LOOK_2]),
        ],
    ),
    "a text behind a call": (
        [user("hi"), SAID, CALL, SAID, RESULT],
        [
            user("hi"),
            assistant([{"type": "text", "text": "Hi"}, {"type": "text", "text": "Hi"}], tool_calls=[LOOK]),
            {"role": "tool", "tool_call_id": "c1", "content": "seen"},
        ],
    ),
    "reasoning in full": (
        [user("hi"), {**THOUGHT, "content": [{"type": "reasoning_text", "text": "Hm, well"}]}, SAID],
        [user("hi"), assistant("Hi", reasoning_content="Hm, well")],
    ),
    "reasoning that is hidden": (
        [user("hi"), {"type": "reasoning", "id": "rs", "summary": [], "encrypted_content": "x"}, SAID],
        [user("hi"), assistant("Hi")],
    ),
    "a result in parts": (
        [user("hi"), CALL, {**RESULT, "output": [{"type": "input_text", "text": text} for text in "ab"]}],
        [
            user("hi"),
            assistant(tool_calls=[LOOK]),
            {"role": "tool", "tool_call_id": "c1", "content": "a\nb"},
        ],
    ),
    "a result with an image": (
        [user("hi"), CALL, {**RESULT, "output": [{"type": "input_image", "image_url": URL}]}],
        [
            user("hi"),
            assistant(tool_calls=[LOOK]),
            {
                "role": "tool",
                "tool_call_id": "c1",
                "content": [{"type": "image_url", "image_url": {"url": URL}}],
            },
        ],
    ),
    "custom and namespaced tools": (
        [
            user("hi"),
            {"type": "custom_tool_call", "call_id": "c1", "name": "patch", "input": '*** "x"'},
            {**CALL_2, "namespace": "mcp"},
            {"type": "custom_tool_call_output", "call_id": "c1", "output": "done"},
        ],
        [
            user("hi"),
            assistant(tool_calls=[call("c1", "patch", '{"input":"*** \\"x\\""}'), call("c2", "mcp__look", '{"a":1}')]),
            {"role": "tool", "tool_call_id": "c1", "content": "done"},
        ],
    ),
    "a refusal": ([user("hi"), assistant([{"type": "refusal", "refusal": "No"}])], [user("hi"), assistant("No")]),
    "arguments as an object": (
        [user("hi"), {**CALL, "arguments": {"a": 1}}, {**CALL_2, "arguments": None}],
        [user("hi"), assistant(tool_calls=[LOOK, call("c2", "look", "")])],
    ),
    "nothing said": ([user(""), assistant(None), user([])], [user(""), assistant(""), user("")]),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_items_become_the_messages_of_a_chat(name: str) -> None:
    given, expected = CONVERSATIONS[name]
    assert messages(given) == expected


def test_instructions_are_the_one_system_message_at_the_beginning() -> None:
    given = [{"role": "developer", "content": [{"type": "input_text", "text": text} for text in "ab"]}, user("hi")]
    assert messages(given, instructions="Be kind.")[0] == {"role": "system", "content": "Be kind.\n\na\n\nb"}
    assert messages("hi", instructions="") == messages("hi", instructions=None) == [user("hi")]
    later = [*given, assistant("Hello"), {"role": "developer", "content": "c"}]
    assert messages(later)[-1] == {"role": "system", "content": "c"}


FIELDS: dict[str, tuple[Json, Json]] = {
    "limits": ({"max_output_tokens": 9, "temperature": 0, "top_p": 1}, {"max_tokens": 9, "temperature": 0, "top_p": 1}),
    "null": (dict.fromkeys(("max_output_tokens", "temperature", "tools", "text", "reasoning", "user", "stream")), {}),
    "effort": ({"reasoning": {"effort": "low", "summary": "auto"}}, {"reasoning_effort": "low"}),
    "text": ({"text": {"format": {"type": "text"}, "verbosity": "low"}}, {}),
    "json": ({"text": {"format": {"type": "json_object"}}}, {"response_format": {"type": "json_object"}}),
    "schema": (
        {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True},
            }
        },
    ),
    "logprobs": ({"top_logprobs": 3}, {"logprobs": True, "top_logprobs": 3}),
    "logprobs alone": ({"include": ["message.output_text.logprobs"]}, {"logprobs": True, "top_logprobs": 1}),
    "stored nowhere": ({"store": True, "background": False, "previous_response_id": None, "metadata": {"a": "b"}}, {}),
    "for OpenAI alone": ({"service_tier": "flex", "prompt_cache_key": "k", "truncation": "auto", "include": []}, {}),
    "samplers of a server": ({"top_k": 3, "stop": ["x"], "id_slot": 1}, {"top_k": 3, "stop": ["x"], "id_slot": 1}),
    "of the chat": ({"messages": [], "n": 2, "functions": []}, {}),
    "user": ({"user": "u", "stream": False}, {"user": "u", "stream": False}),
    "no tools": ({"tool_choice": "required", "parallel_tool_calls": True, "tools": []}, {}),
    "a tool": ({"tools": [FLAT]}, {"tools": [NESTED]}),
    "tools": (
        {"tools": [FLAT, OTHER], "tool_choice": "none", "parallel_tool_calls": False},
        {
            "tools": [NESTED, {"type": "function", "function": {"name": "other"}}],
            "tool_choice": "none",
            "parallel_tool_calls": False,
        },
    ),
    "chosen": (
        {"tools": [OTHER, FLAT], "tool_choice": {"type": "function", "name": "look"}},
        {"tools": [NESTED], "tool_choice": "required"},
    ),
    "allowed": (
        {
            "tools": [OTHER, FLAT, *HOSTED],
            "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [*HOSTED, {**FLAT}]},
        },
        {"tools": [NESTED], "tool_choice": "auto"},
    ),
    "hosted": ({"tools": [*HOSTED, FLAT], "tool_choice": {"type": "web_search"}}, {"tools": [NESTED]}),
    "only hosted": ({"tools": HOSTED, "tool_choice": "required"}, {}),
    "namespace": (
        {"tools": [FLAT, {"type": "namespace", "name": "mcp", "tools": [FLAT, *HOSTED]}]},
        {"tools": [NESTED, {"type": "function", "function": {**FUNCTION, "name": "mcp__look"}}]},
    ),
}


@pytest.mark.parametrize("name", FIELDS)
def test_fields_become_those_of_a_chat(name: str) -> None:
    fields, expected = FIELDS[name]
    body = without_extensions(decoded("hi", **fields).body)
    assert body == {"model": "m", "messages": [user("hi")], **expected}


def test_custom_tool_is_a_function_with_one_text_and_its_grammar_described() -> None:
    form = {"type": "grammar", "syntax": "lark", "definition": "start: WORD"}
    tool = {"type": "custom", "name": "patch", "description": "Patches", "format": form}
    body = decoded("hi", tools=[tool], tool_choice={"type": "custom", "name": "patch"}).body
    function = body["tools"][0]["function"]
    assert function["parameters"]["required"] == ["input"] and function["name"] == "patch"
    assert function["description"].startswith("Patches\n\n") and "start: WORD" in function["description"]
    assert body["tool_choice"] == "required"


def test_unknown_items_parts_and_tools_are_set_aside() -> None:
    item = {"type": "web_search_call", "id": "ws_1", "action": {"query": "x"}}
    part = {"type": "computer_screenshot", "file_id": "f"}
    given = [item, user([part, {"type": "input_text", "text": "hi"}]), {"type": "compaction"}]
    request = decoded(given, tools=[FLAT, *HOSTED])
    aside = extensions_of(request.body, "openai-responses")
    assert messages(given) == [user("hi")]
    assert aside["input"] == [item, part, {"type": "compaction"}] and aside["tools"] == [FLAT, *HOSTED]


REFUSED: dict[str, tuple[Json, str, str]] = {
    "stored response": ({"previous_response_id": "resp_1"}, "previous_response_id", "send the whole conversation in"),
    "stored conversation": ({"conversation": {"id": "c"}}, "conversation", "send the whole conversation in"),
    "stored prompt": ({"prompt": {"id": "p"}}, "prompt", "send the text in 'instructions'"),
    "background": ({"background": True}, "background", "set it to false"),
    "stored item": ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]", "'store': false"),
    "stored image": (
        {"input": [user([{"type": "input_image", "file_id": "f"}])]},
        "input[0].content[0]",
        "'file_id' is not supported",
    ),
    "stored file": ({"input": [user([{"type": "input_file", "file_url": "u"}])]}, "input[0].content[0]", "'file_url'"),
    "no input": ({"input": None}, "input", "Missing required parameter: 'input'."),
    "empty": ({"input": []}, "input", "at least one message"),
    "number": ({"input": 3}, "input", "expected an array, but got an integer"),
    "item": ({"input": ["hi"]}, "input[0]", "expected an object, but got a string"),
    "nameless item": ({"input": [{"content": "hi"}]}, "input[0].type", "Missing required parameter: 'input[0].type'."),
    "role": ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "'user', 'assistant', 'system'"),
    "part": ({"input": [user([{"type": "input_text"}])]}, "input[0].content[0].text", "Missing required parameter"),
    "call": ({"input": [{**CALL, "call_id": None}]}, "input[0].call_id", "Missing required parameter"),
    "tool": ({"tools": [{"type": "function"}]}, "tools[0].name", "Missing required parameter: 'tools[0].name'."),
    "choice": ({"tools": [FLAT], "tool_choice": "any"}, "tool_choice", "'auto', 'none', 'required'"),
    "chosen": ({"tools": [FLAT], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice", "'x' not found"),
    "format": ({"text": {"format": {"type": "xml"}}}, "text.format.type", "'text', 'json_schema', 'json_object'"),
    "limit": ({"max_output_tokens": True}, "max_output_tokens", "expected an integer, but got a boolean"),
    "stream": ({"stream": "yes"}, "stream", "expected a boolean, but got a string"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_invalid_or_stored_elsewhere_is_refused_in_openais_words(name: str) -> None:
    fields, param, words = REFUSED[name]
    with pytest.raises(BadRequest) as raised:
        decoded(**{"given": fields.get("input", "hi"), **{k: v for k, v in fields.items() if k != "input"}})
    assert (raised.value.status, raised.value.param) == (400, param)
    assert words in raised.value.message


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("/rag hi", "/rag hi"),
        ([user("/rag hi"), assistant("x")], "/rag hi"),
        (
            [user("a"), {"type": "message", **user([{"type": "input_image"}, {"type": "input_text", "text": "/x"}])}],
            "/x",
        ),
        ([user([{"type": "input_image"}])], ""),
        ([3, user(3)], ""),
        (None, ""),
    ],
)
def test_the_users_last_text_is_found_before_the_body_is_checked(given: Any, text: str) -> None:
    assert CODEC.user_text({"input": given}) == text


def test_a_chat_is_known_by_its_messages_up_to_the_users_first() -> None:
    parts = [{"type": "input_text", "text": text} for text in "ab"]
    given = [{"role": "developer", "content": "d"}, THOUGHT, user(parts), assistant("x"), user("later")]
    expected = [("system", "Be kind."), ("developer", "d"), ("user", "a\nb")]
    assert CODEC.beginning({"instructions": "Be kind.", "input": given}) == expected
    assert CODEC.beginning({"input": "hi"}) == CODEC.beginning({"input": [user("hi"), SAID]}) == [("user", "hi")]


# -- laws --------------------------------------------------------------------------------------------------------------

PART = st.fixed_dictionaries(
    {"type": st.sampled_from(["input_text", "output_text", "input_image", "refusal", "input_file", "x", "text"])},
    optional={name: TEXT | st.none() for name in ("text", "refusal", "image_url", "file_data", "file_id", "detail")},
)
KINDS = ["message", "reasoning", "function_call", "function_call_output", "custom_tool_call", "item_reference", "x"]
KINDS += ["custom_tool_call_output"]
CONTENT = TEXT | st.none() | st.lists(PART | JSON_VALUES, max_size=3)
ITEM = st.fixed_dictionaries(
    {},
    optional={
        "type": st.sampled_from(KINDS) | JSON_VALUES,
        "role": st.sampled_from(["user", "assistant", "developer", "system", "tool"]) | JSON_VALUES,
        "summary": CONTENT,
        **{name: CONTENT for name in ("content", "output")},
        **{name: TEXT | JSON_VALUES for name in ("call_id", "name", "arguments", "input", "namespace", "id")},
    },
)
TOOL = st.fixed_dictionaries(
    {"type": st.sampled_from(["function", "custom", "namespace", "web_search"]) | JSON_VALUES},
    optional={
        "name": st.sampled_from(["a", "b"]) | JSON_VALUES,
        "parameters": JSON_VALUES,
        "tools": st.lists(st.just(FLAT) | JSON_VALUES, max_size=2) | JSON_VALUES,
    },
)
CHOICE = st.sampled_from(["auto", "none"]) | st.fixed_dictionaries(
    {"type": st.sampled_from(["function", "allowed_tools", "x"])},
    optional={"name": st.sampled_from(["a", "b"]), "mode": TEXT, "tools": st.lists(TOOL, max_size=2) | JSON_VALUES},
)
BODY = st.fixed_dictionaries(
    {"input": TEXT | st.lists(ITEM | st.just(user("hi")), max_size=5) | JSON_VALUES},
    optional={
        "instructions": TEXT | JSON_VALUES,
        "tools": st.lists(TOOL, max_size=3) | JSON_VALUES,
        "tool_choice": CHOICE | JSON_VALUES,
        **{
            name: JSON_VALUES
            for name in ("text", "reasoning", "include", "top_logprobs", "max_output_tokens", "stream", "background")
        },
    },
)
MESSAGE_FIELDS = {"role", "content", "reasoning_content", "tool_calls", "tool_call_id"}


@given(BODY)
@law(2000)
def test_any_body_is_decoded_to_a_chat_or_refused(body: Json) -> None:
    try:
        request = CODEC.decode(copy.deepcopy(body))
    except BadRequest as exc:
        assert exc.message and exc.param
        return
    seen = without_extensions(request.body)
    assert seen["messages"] and all(message.keys() <= MESSAGE_FIELDS for message in seen["messages"])
    assert all(tool.keys() == {"type", "function"} for tool in seen.get("tools", ()))
    assert not any(isinstance(value, Extensions) for found in objects_in(seen) for value in found.values())
    assert CODEC.user_text(body) == request.last_user_text
    CODEC.beginning(body)
    CODEC.writer(request, None)  # type: ignore[arg-type]  # what is repeated in the answer can be repeated
