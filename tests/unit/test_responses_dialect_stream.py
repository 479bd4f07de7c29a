"""Answers to clients of the Responses API: the events of a stream, and the whole response."""

from __future__ import annotations

from typing import Any

import pytest

from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.errors import Overloaded, UpstreamFailed
from tests.support.responses import COUNTED, LOOK, TOOLS, USAGE, call, delta, events, whole, writer, written

PART = {"type": "output_text", "annotations": [], "logprobs": [], "text": ""}
THOUGHTS = {"id": "rs_1", "type": "reasoning", "summary": []}
MESSAGE = {"id": "msg_2", "type": "message", "role": "assistant"}
CALLED = {"id": "fc_3", "type": "function_call", "call_id": "t1", "name": "look"}
NEW, DONE = {"status": "in_progress"}, {"status": "completed"}
OUTPUT: list[Json] = [
    {**THOUGHTS, **DONE, "content": [{"type": "reasoning_text", "text": "Hm"}]},
    {**MESSAGE, **DONE, "content": [{**PART, "text": "Hi"}]},
    {**CALLED, **DONE, "arguments": '{"a":1}'},
]
FIRST = {"item_id": "rs_1", "output_index": 0, "content_index": 0}
SECOND = {"item_id": "msg_2", "output_index": 1, "content_index": 0}
THIRD = {"item_id": "fc_3", "output_index": 2}
STEPS: list[tuple[str, Json]] = [
    ("output_item.added", {"output_index": 0, "item": {**THOUGHTS, **NEW, "content": []}}),
    ("content_part.added", {**FIRST, "part": {"type": "reasoning_text", "text": ""}}),
    ("reasoning_text.delta", {**FIRST, "delta": "Hm"}),
    ("reasoning_text.done", {**FIRST, "text": "Hm"}),
    ("content_part.done", {**FIRST, "part": {"type": "reasoning_text", "text": "Hm"}}),
    ("output_item.done", {"output_index": 0, "item": OUTPUT[0]}),
    ("output_item.added", {"output_index": 1, "item": {**MESSAGE, **NEW, "content": []}}),
    ("content_part.added", {**SECOND, "part": PART}),
    ("output_text.delta", {**SECOND, "delta": "H", "logprobs": []}),
    ("output_text.delta", {**SECOND, "delta": "i", "logprobs": []}),
    ("output_text.done", {**SECOND, "text": "Hi", "logprobs": []}),
    ("content_part.done", {**SECOND, "part": {**PART, "text": "Hi"}}),
    ("output_item.done", {"output_index": 1, "item": OUTPUT[1]}),
    ("output_item.added", {"output_index": 2, "item": {**CALLED, **NEW, "arguments": ""}}),
    ("function_call_arguments.delta", {**THIRD, "delta": '{"a":'}),
    ("function_call_arguments.delta", {**THIRD, "delta": "1}"}),
    ("function_call_arguments.done", {**THIRD, "name": "look", "arguments": '{"a":1}'}),
    ("output_item.done", {"output_index": 2, "item": OUTPUT[2]}),
]
"""The events of thoughts, a text and a call of a tool, between the beginning and the end of the response."""


def test_whole_sequence_of_thoughts_text_and_a_tool_call() -> None:
    created, begun, *steps, last = events(
        written(
            *(delta(role="assistant", content=None), delta(reasoning_content="Hm"), delta(content="H")),
            *(delta(content="i"), call(0, "", id="t1", name="look"), call(0, '{"a":'), call(0, "1}")),
            *(delta("tool_calls"), {"choices": [], "usage": USAGE}),
            tools=[LOOK],
        )
    )
    start = whole_response([]) | {"status": "in_progress", "completed_at": None, "usage": None}
    assert created == {"type": "response.created", "response": start}
    assert begun == {"type": "response.in_progress", "response": start}
    assert steps == [{"type": f"response.{kind}", **fields} for kind, fields in STEPS]
    assert last == {"type": "response.completed", "response": whole_response(OUTPUT)}


def whole_response(output: list[Json]) -> Json:
    """The response to "hi" with the tool `look`."""
    return {
        **{"id": "resp_0", "object": "response", "created_at": 0, "completed_at": 0, "status": "completed"},
        **{"error": None, "incomplete_details": None, "model": "asked", "output": output, "usage": COUNTED},
        **{"previous_response_id": None, "store": False, "background": False, "truncation": "disabled"},
        **{"instructions": None, "max_output_tokens": None, "max_tool_calls": None, "metadata": {}, "user": None},
        **{"parallel_tool_calls": True, "prompt_cache_key": None, "safety_identifier": None, "top_logprobs": 0},
        **{"service_tier": "default", "temperature": None, "top_p": None, "tool_choice": "auto"},
        **{"reasoning": {"effort": None, "summary": None}, "text": {"format": {"type": "text"}}},
        "tools": [{**LOOK, "description": None}],
    }


def test_request_is_repeated_in_the_response() -> None:
    fields: Json = {
        **{"instructions": "Be kind.", "max_output_tokens": 9, "metadata": {"a": "b"}, "parallel_tool_calls": False},
        **{"safety_identifier": "s", "service_tier": "flex", "temperature": 0.5, "top_p": 0.1, "truncation": "auto"},
        **{"tool_choice": {"type": "function", "name": "look"}, "top_logprobs": 2, "user": "u", "max_tool_calls": 1},
        **{"prompt_cache_key": "k", "background": False},
    }
    tools = [LOOK, {"type": "web_search", "x": 1}]
    sent = {**fields, "tools": tools, "store": True, "text": {"verbosity": "low"}, "reasoning": {"effort": "low"}}
    for response in (events(written(**sent))[-1]["response"], whole(**sent)):
        assert {name: response[name] for name in fields} == fields
        assert response["tools"] == [{**LOOK, "description": None}, tools[1]] and response["store"] is False
        assert response["text"] == {"format": {"type": "text"}, "verbosity": "low"}
        assert response["reasoning"] == {"effort": "low", "summary": None}


def test_thoughts_are_a_summary_for_clients_that_request_one() -> None:
    found = events(written(delta(reasoning_content="Hm"), delta("stop"), reasoning={"summary": "auto"}))
    kinds = [event["type"].removeprefix("response.") for event in found[2:-1]]
    summary = ["part.added", "text.delta", "text.done", "part.done"]
    assert kinds == ["output_item.added", *(f"reasoning_summary_{kind}" for kind in summary), "output_item.done"]
    item = found[-1]["response"]["output"][0]
    assert (item["summary"], item["content"]) == ([{"type": "summary_text", "text": "Hm"}], [])


def test_call_of_a_custom_tool_is_told_in_one_piece_and_unpacked() -> None:
    chunks = [
        call(0, "", id="t", name="patch"),
        call(0, '{"input":"*** \\u0041'),
        call(0, '\\n"}'),
        delta("tool_calls"),
    ]
    found = events(written(*chunks, tools=TOOLS))
    step = {"item_id": "ctc_1", "output_index": 0}
    assert found[3:5] == [
        {"type": "response.custom_tool_call_input.delta", **step, "delta": "*** A\n"},
        {"type": "response.custom_tool_call_input.done", **step, "input": "*** A\n"},
    ]
    [item] = found[-1]["response"]["output"]
    assert (item["type"], item["name"], item["input"]) == ("custom_tool_call", "patch", "*** A\n")
    [other] = whole(call(0, "no JSON", id="t", name="patch"), tools=TOOLS)["output"]
    assert other["input"] == "no JSON"


def test_call_of_a_tool_in_a_namespace_names_both() -> None:
    [item] = whole(call(0, "{}", id="t", name="mcp__look"), tools=TOOLS)["output"]
    assert (item["name"], item["namespace"]) == ("look", "mcp")


def test_call_is_done_once_its_arguments_are_and_not_before() -> None:
    target = writer(tools=[LOOK])
    data = target.chunk(call(0, '{"a', id="a", name="look")) + target.chunk(call(1, "{", id="b", name="look"))
    data += target.chunk(call(0, '":1}'))
    assert b"arguments.done" not in data
    third = target.chunk(call(2, "", id="c", name="look"))
    assert third.count(b"event: response.function_call_arguments.done") == 1 and b'"{\\"a\\":1}"' in third
    found = events(data + third + target.chunk(call(1, "}")) + target.end())[-1]["response"]["output"]
    assert [(item["call_id"], item["arguments"]) for item in found] == [("a", '{"a":1}'), ("b", "{}"), ("c", "")]


def test_piece_for_a_call_that_is_done_is_an_error_of_the_server() -> None:
    target = writer()
    for chunk in (call(0, "{}", id="a", name="f"), call(1, "{}", id="b", name="f"), call(0, " ")):
        target.chunk(chunk)
    with pytest.raises(UpstreamFailed, match="continued a tool call that was complete"):
        target.chunk(call(0, '{"a":1}'))


@pytest.mark.parametrize(
    ("finish", "status", "reason"),
    [
        ("stop", "completed", None),
        ("tool_calls", "completed", None),
        ("something new", "completed", None),
        (None, "completed", None),
        ("length", "incomplete", {"reason": "max_output_tokens"}),
        ("content_filter", "incomplete", {"reason": "content_filter"}),
    ],
)
def test_reason_for_the_end_is_told_in_the_words_of_this_api(finish: str | None, status: str, reason: Any) -> None:
    chunks = [delta(content="Hi"), delta(finish)]
    last = events(written(*chunks))[-1]
    assert last["type"] == f"response.{status}"
    for response in (last["response"], whole(*chunks)):
        assert (response["status"], response["incomplete_details"]) == (status, reason)
        assert response["output"][0]["status"] == status
        assert (response["completed_at"] is None) is (status == "incomplete")


def test_answer_without_a_word_is_an_empty_message() -> None:
    found = events(written())
    assert [event["type"] for event in found[2:4]] == ["response.output_item.added", "response.content_part.added"]
    [message] = found[-1]["response"]["output"]
    assert message["content"][0]["text"] == "" == whole()["output"][0]["content"][0]["text"]
    assert found[-1]["response"]["usage"] is None


def test_logprobs_are_told_with_as_many_alternatives_as_were_requested() -> None:
    one = {"token": "H", "logprob": -0.5, "bytes": [72]}
    chunk = delta(content="H")
    chunk["choices"][0]["logprobs"] = {"content": [{**one, "id": 3, "top_logprobs": [one, {**one, "token": "J"}]}]}
    for count, tops in ((0, []), (1, [one])):
        fields = {"include": ["message.output_text.logprobs"], "top_logprobs": count}
        found = events(written(chunk, delta(content="i"), **fields))
        expected = [{**one, "top_logprobs": tops}]
        assert [event["logprobs"] for event in found[4:7]] == [expected, [], expected]
        assert whole(chunk, **fields)["output"][0]["content"][0]["logprobs"] == expected


@pytest.mark.parametrize("begun", [True, False])
def test_failure_is_an_error_event_and_a_failed_response(begun: bool) -> None:
    target = writer()
    data = target.chunk(delta(content="Hi")) if begun else b""
    *before, error, failed = events(data + target.error(Overloaded("no room")))
    fields = {"code": "overloaded", "message": "no room", "param": None}
    assert before[0]["type"] == "response.created"
    assert error == {"type": "error", **fields, "error": {"type": "unavailable_error", **fields}}
    response = failed["response"]
    assert (failed["type"], response["status"]) == ("response.failed", "failed")
    assert response["error"] == {"code": "server_error", "message": "no room"}
    texts = [(item["status"], item["content"][0]["text"]) for item in response["output"]]
    assert texts == ([("incomplete", "Hi")] if begun else [])
