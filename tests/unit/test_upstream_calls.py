"""The parts of streamed tool calls come in many forms, and always make the calls that the server means."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.dialects import ollama, openai
from llama_smart_proxy.proxy.dialects.base import UpstreamCodec
from tests.support.laws import law
from tests.support.odd_answers import (
    CITY,
    DONE,
    ROME,
    TIME,
    WEATHER,
    anthropic_calls,
    both,
    calls_of,
    decoded,
    delta,
    folded,
    ollama_calls,
    part,
)

INTERLEAVED = [
    *[part("get_weather", "", index=0, id="a"), part("get_time", "", index=1, id="b")],
    *[part(..., '{"city":', index=0), part(..., '{"city":', index=1)],
    *[part(..., '"Rome"}', index=1), part(..., '"Paris"}', index=0)],
]
TWO_CALLS = {
    "interleaved": INTERLEAVED,
    "a late part": [
        *[part("get_weather", '{"city":', index=0, id="a"), part("get_time", ROME, index=1, id="b")],
        part(..., '"Paris"}', index=0),
    ],
    "from index 1": [part("get_weather", CITY, index=1, id="a"), part("get_time", ROME, index=2, id="b")],
    "always index 0": [
        *[part("get_weather", "", index=0, id="a"), part(..., CITY, index=0)],
        *[part("get_time", "", index=0, id="b"), part(..., ROME, index=0)],
    ],
    "no index": [
        *[part("get_weather", "", id="a"), part(..., '{"city":'), part(..., '"Paris"}')],
        *[part("get_time", "", id="b"), part(..., ROME)],
    ],
    "null index": [part("get_weather", CITY, index=None, id="a"), part("get_time", ROME, index=None, id="b")],
    "neither index nor id": [part("get_weather", '{"city":'), part(..., '"Paris"}'), part("get_time", ROME)],
    "index 0 and no id": [part("get_weather", CITY, index=0), part("get_time", ROME, index=0)],
    "an index as text": [part("get_weather", CITY, index="0", id="a"), part("get_time", ROME, index="1", id="b")],
    "a name with every part": [
        *[part("get_weather", piece, index=0, id="a") for piece in ("", '{"city":', '"Paris"}')],
        *[part("get_time", piece, index=1, id="b") for piece in ("", ROME)],
    ],
    "a name with every part and nothing else": [
        *[part("get_weather", piece) for piece in ("", '{"city":', '"Paris"}')],
        *[part("get_time", piece) for piece in ('{"city":', '"Rome"}')],
    ],
    "an id with every part": [
        *[part("get_weather", '{"city":', id="a"), part(None, '"Paris"}', id="a")],
        *[part("get_time", '{"city":', id="b"), part(None, '"Rome"}', id="b")],
    ],
    "another id with every part": [
        *[part("get_weather", '{"city":', index=0, id="a"), part(..., '"Paris"}', index=0, id="b")],
        *[part("get_time", '{"city":', index=1, id="c"), part(..., '"Rome"}', index=1, id="d")],
    ],
    "empty ids and names": [
        *[
            part("get_weather", "", index=0, id="a"),
            part("", '{"city":', index=0, id=""),
            part("", '"Paris"}', index=0),
        ],
        part("get_time", ROME, index=1, id="b"),
    ],
    "arguments as an object": [
        *[part("get_weather", {"city": "Paris"}, index=0, id="a"), part("get_time", {"city": "Rome"}, index=1, id="b")]
    ],
    "whole in one chunk": [
        delta(
            tool_calls=[
                {"id": "a", "function": {"name": "get_weather", "arguments": CITY}},
                {"id": "b", "function": {"name": "get_time", "arguments": ROME}},
            ]
        )
    ],
    "whole in one chunk, index 0 each": [
        delta(
            tool_calls=[
                {"index": 0, "id": "a", "function": {"name": "get_weather", "arguments": CITY}},
                {"index": 0, "id": "b", "function": {"name": "get_time", "arguments": ROME}},
            ]
        )
    ],
    "the call itself as the part": [
        delta(tool_calls=[{"name": "get_weather", "arguments": CITY}, {"name": "get_time", "arguments": ROME}])
    ],
    "repeated as a whole at the end": [
        *[part("get_weather", CITY, index=0, id="a"), part("get_time", ROME, index=1, id="b")],
        *[part("get_weather", CITY, index=0, id="a"), part("get_time", ROME, index=1, id="b")],
    ],
    "a brace too many": [
        *[part("get_weather", CITY, index=0, id="a"), part(..., "}", index=0)],
        *[part("get_time", ROME, index=1, id="b"), part(..., "}\n", index=1)],
    ],
    "an id that comes later": [
        *[part("get_weather", '{"city":', index=0), part(..., '"Paris"}', index=0, id="a")],
        *[part("get_time", '{"city":', index=1), part("get_time", '"Rome"}', index=1, id="b")],
    ],
    "another id with every part, the last without an index": [
        *[part("get_weather", "", index=0, id="a"), part(None, '{"city":', index=0, id="b")],
        *[part(None, '"Paris"}', index=0, id="c"), part("get_time", "", index=1, id="d"), part(None, ROME, id="e")],
    ],
    "one id for all": [
        *[part("get_weather", '{"city":', index=0, id="a"), part("get_time", ROME, index=1, id="a")],
        part(..., '"Paris"}', index=0, id="a"),
    ],
    "numbers for ids": [part("get_weather", CITY, index=0, id=1), part("get_time", ROME, index=1, id=2)],
    "a name that comes later": [
        *[part(..., '{"city":', index=0, id="a"), part("get_weather", '"Paris"}', index=0)],
        *[part(None, "", index=1, id="b"), part("get_time", ROME, index=1)],
    ],
    "an index with a fraction": [
        *[part("get_weather", '{"city":', index=0.0, id="a"), part("get_time", ROME, index=1.0, id="b")],
        part(..., '"Paris"}', index=0.0),
    ],
    "null among them": [
        *[delta(tool_calls=[None]), part("get_weather", CITY, index=0, id="a")],
        *[delta(tool_calls=[None, {"index": 1, "id": "b", "function": {"name": "get_time", "arguments": ROME}}])],
    ],
}


@pytest.mark.parametrize("parts", TWO_CALLS.values(), ids=TWO_CALLS)
@pytest.mark.parametrize("codec", [openai.WIRE, openai.OWN_WIRE], ids=["translated", "same API"])
def test_every_part_of_a_tool_call_gets_to_its_call(parts: list[bytes], codec: UpstreamCodec) -> None:
    assert calls_of(folded(both(*parts), codec)) == [WEATHER, TIME]


@pytest.mark.parametrize("parts", TWO_CALLS.values(), ids=TWO_CALLS)
def test_bytes_that_are_kept_stand_for_the_same_calls(parts: list[bytes]) -> None:
    found: dict[int, list[str]] = {}
    for chunk in decoded(both(*parts), openai.OWN_WIRE)[1]:
        sent = chunk.seen if chunk.frame is None else orjson.loads(chunk.frame.removeprefix(b"data:"))
        for call in sent["choices"][0]["delta"].get("tool_calls") or ():
            texts = found.setdefault(call["index"], ["", ""])
            texts[0] += call["function"].get("name") or ""
            texts[1] += call["function"].get("arguments") or ""
    assert [tuple(texts) for _, texts in sorted(found.items())] == [WEATHER, TIME]


@pytest.mark.parametrize("parts", TWO_CALLS.values(), ids=TWO_CALLS)
def test_no_call_is_finished_before_its_arguments_are(parts: list[bytes]) -> None:
    assert ollama_calls(both(*parts)) == [(name, orjson.loads(text)) for name, text in (WEATHER, TIME)]
    assert anthropic_calls(both(*parts)) == [WEATHER, TIME]


def test_a_legacy_function_call_is_a_tool_call_for_other_apis() -> None:
    calls = [{"name": "get_time", "arguments": ""}, {"arguments": '{"city":'}, {"arguments": '"Rome"}'}]
    data = b"".join(delta(function_call=call) for call in calls) + delta("function_call") + DONE
    assert (calls_of(folded(data)), folded(data)["choices"][0]["finish_reason"]) == ([TIME], "tool_calls")
    assert ollama_calls(data) == [("get_time", orjson.loads(ROME))]
    own = folded(data, openai.OWN_WIRE)["choices"][0]
    assert own["finish_reason"] == "function_call" and "tool_calls" not in own["message"]


def test_text_in_a_call_does_not_end_it() -> None:
    half, text = part("get_weather", '{"city":', index=0, id="a"), delta(content="So")
    data = both(half, text, part(..., '"Paris"}', index=0), text)
    assert ollama_calls(data) == [("get_weather", orjson.loads(CITY))]
    assert calls_of(folded(data)) == [WEATHER]


def test_two_calls_of_one_tool_without_ids_are_two() -> None:
    parts = [
        part("get_time", '{"city":', index=0),
        part("get_time", '"Paris"}', index=0),
        part("get_time", ROME, index=0),
    ]
    assert calls_of(folded(both(*parts))) == [("get_time", CITY), ("get_time", ROME)]


@pytest.mark.parametrize("arguments", [None, "", " \n", {}, "{}", ...])
def test_a_call_without_arguments_is_a_call(arguments: Any) -> None:
    assert ollama_calls(both(part("get_time", arguments, index=0, id="a"))) == [("get_time", {})]


def test_an_empty_object_before_the_arguments_is_none_of_them() -> None:
    parts = [
        *[part("get_weather", "{}", index=0, id="a"), part(..., CITY, index=0)],
        *[part("get_time", {}, index=1, id="b"), part(..., '{"city":', index=1), part(..., '"Rome"}', index=1)],
    ]
    assert calls_of(folded(both(*parts))) == [WEATHER, TIME]
    assert ollama_calls(both(*parts)) == [(name, orjson.loads(text)) for name, text in (WEATHER, TIME)]


def test_arguments_that_are_encoded_twice_are_an_object() -> None:
    data = both(part("get_time", orjson.dumps(ROME).decode(), index=0, id="a"))
    assert ollama_calls(data) == [("get_time", orjson.loads(ROME))]


def test_calls_with_empty_arguments_are_whole_calls() -> None:
    parts = [part("get_time", "{}", index=0, id="a"), part("get_weather", "{}", index=1, id="b")]
    assert calls_of(folded(both(*parts))) == [("get_time", "{}"), ("get_weather", "{}")]


def test_made_ids_are_what_mistrals_templates_accept() -> None:
    call = folded(both(part("get_time", ROME)))["choices"][0]["message"]["tool_calls"][0]
    assert len(call["id"]) == 9 and call["id"].isalnum() and call["type"] == "function"


def test_calls_without_a_finish_reason_are_passed_on_at_the_end() -> None:
    assert calls_of(folded(b"".join(INTERLEAVED) + DONE)) == [WEATHER, TIME]


@law(300)
@given(st.data())
def test_parts_with_ids_and_indexes_may_come_in_any_order(data: st.DataObject) -> None:
    texts = data.draw(st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=5)), min_size=1, max_size=4))
    queues = []
    for number, value in enumerate(texts):
        text = orjson.dumps(value).decode()
        cut = data.draw(st.integers(0, len(text)))
        first = part(f"tool{number}", text[:cut], index=number, id=f"call{number}")
        queues.append([first, part(..., text[cut:], index=number)])
    order, parts = [number for number in range(len(queues)) for _ in range(2)], []
    for number in data.draw(st.permutations(order)):
        parts.append(queues[number].pop(0))
    found = dict(calls_of(folded(both(*parts))))
    assert found == {f"tool{number}": orjson.dumps(value).decode() for number, value in enumerate(texts)}


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (CITY, CITY),
        ("", {}),
        (None, {}),
        ({"a": 1}, {"a": 1}),
        ('{"a": ', {"arguments": '{"a": '}),
        ("[1]", {"arguments": "[1]"}),
        (r'{"a": "\ud83d"}', {"a": "\ufffd"}),
        (r'{"a": "\uDE00\ud83d\ude00\\\ud83d\n"}', {"a": "\ufffd\U0001f600\\\ufffd\n"}),
        (r'{"a": "\\ud83d", "b": "\ud83d"}', {"a": r"\ud83d", "b": "\ufffd"}),
        (r'{"a": "\ud83d', {"arguments": r'{"a": "\ud83d'}),
        ([1], {"arguments": [1]}),
        ("null", {"arguments": "null"}),
    ],
)
def test_odd_arguments_in_the_history_do_not_end_the_chat(given: Any, meant: Any) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "get_time", "arguments": given}}
    messages: list[Json] = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    body = openai.OPENAI.bind({"model": "m", "messages": messages}, {})
    text = body["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert text == given or orjson.loads(text) == meant
    assert call == {"id": "a", "type": "function", "function": {"name": "get_time", "arguments": given}}
    assert (body["messages"] is messages) == (given == CITY)  # a field is never changed in place
    sent = ollama.WIRE.encode(openai.CHAT.decode(body))[1]["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert sent == (orjson.loads(CITY) if meant == CITY else meant)
