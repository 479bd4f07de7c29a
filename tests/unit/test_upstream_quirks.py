"""Servers deviate from OpenAI's reference in many ways; their answers are taken for what they mean."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from llama_smart_proxy.proxy.chat import ChatRequest, Json
from llama_smart_proxy.proxy.dialects import anthropic, openai
from llama_smart_proxy.proxy.stream.decoder import StreamDecoder
from tests.support.odd_answers import CHAT, CITY, DONE, TIME, calls_of, decoded, delta, event, folded, part

USUAL = delta(role="assistant", content="") + delta(content="Hello") + delta(content=" there")
END = delta("stop")
USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
TALLY = event({"choices": [], "usage": USAGE})
WHOLE = {
    "object": "chat.completion",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello there"}}],
}
SAME_ANSWERS = {
    "no end mark": USUAL + END,
    "no end mark, usage last": USUAL + END + TALLY,
    "no last blank line": (USUAL + END).rstrip(b"\n"),
    "blanks round the end mark": USUAL + END + b"data:  [DONE] \t\r\n\r\n",
    "a byte order mark": b"\xef\xbb\xbf" + USUAL + END + DONE,
    "blank lines before it": b"\r\n\n" + USUAL + END + DONE,
    "empty data": USUAL + b"data:\n\ndata: \n\n" + END + DONE,
    "null choices": event({"choices": None, "x": 1}) + USUAL + END + event({"choices": None, "usage": USAGE}) + DONE,
    "no choices": event({"prompt_filter_results": []}) + USUAL + END + event({"usage": USAGE}) + DONE,
    "a null choice": event({"choices": [None]}) + USUAL + END + DONE,
    "a null delta": USUAL + event({"choices": [{"index": 0, "delta": None, "finish_reason": "stop"}]}) + DONE,
    "null indexes": event({"choices": [{"index": None, "delta": {"content": "Hello"}}]})
    + event({"choices": [{"index": None, "delta": {"content": " there"}}]})
    + END
    + DONE,
    "indexes that are none": event({"choices": [{"index": "0", "delta": {"content": "Hello"}}]})
    + event({"choices": [{"index": [], "delta": {"content": " there"}}]})
    + END
    + DONE,
    "a message for a delta": event(
        {"choices": [{"message": {"role": "assistant", "content": "Hello there"}, "finish_reason": "stop"}]}
    ),
    "content in parts": delta(content=[{"type": "text", "text": "Hello"}, {"type": "text", "text": " there"}]) + END,
    "content in texts": delta(content=["Hello", " there"]) + END,
    "a null error": event({"error": None, "choices": [{"index": 0, "delta": {"content": "Hello there"}}]}) + END,
    "an empty error": event(
        {"error": {"message": "", "code": None}, "choices": [{"index": 0, "delta": {"content": "Hello there"}}]}
    )
    + END,
    "empty finish reasons": delta("", content="Hello") + delta("", content=" there") + delta("stop") + delta("") + DONE,
    "no finish reason": USUAL + DONE,
    "always an empty one": delta("", content="Hello there") + DONE,
    "the server's own": USUAL + delta("eos_token") + DONE,
    "two of them": USUAL + END + END + DONE,
    "more after the end mark": USUAL + END + DONE + delta(content=" again") + b"data: oops\n\n",
    "half an event after the end mark": USUAL + END + DONE + b'data: {"choi',
    "null usage": event({"usage": None, "choices": [{"index": 0, "delta": {"content": "Hello there"}}]}) + END + DONE,
    "one JSON object": orjson.dumps(WHOLE),
    "one JSON object in many lines": orjson.dumps(WHOLE, option=orjson.OPT_INDENT_2) + b"\n",
    "more after the end": USUAL + END + DONE + delta(content="!") + event({"error": "late"}),
    "an end mark as JSON": USUAL + END + event("[DONE]"),
    "an end mark in other letters": USUAL + END + event(b"[Done]"),
    "heartbeats as data": event(b"ping")
    + USUAL
    + event(b": OPENROUTER PROCESSING")
    + event(b"keep-alive")
    + END
    + DONE,
    "NaN and Infinity": event(
        b'{"choices":[{"index":0,"delta":{"content":"Hello there"},"x":[NaN,-Infinity]}],"timings":{"y":NaN}}'
    )
    + END
    + DONE,
    "NaN in one JSON object": orjson.dumps(WHOLE).replace(b'"object"', b'"x":NaN,"object"'),
    "indexes as texts": event({"choices": [{"index": "0", "delta": {"content": "Hello"}}]})
    + event({"choices": [{"index": "0", "delta": {"content": " there"}, "finish_reason": "stop"}]})
    + DONE,
    "an only choice with index 1": event({"choices": [{"index": 1, "delta": {"content": "Hello"}}]})
    + event({"choices": [{"index": 1, "delta": {"content": " there"}, "finish_reason": "stop"}]})
    + DONE,
    "logprobs as a list": event(
        {"choices": [{"index": 0, "delta": {"content": "Hello there"}, "logprobs": [{"token": "x"}]}]}
    )
    + END
    + DONE,
    "lines of JSON": b"\n".join(
        orjson.dumps({"choices": [{"index": 0, "delta": {"content": text}}]}) for text in ("Hello", " there")
    ),
}


@pytest.mark.parametrize("data", SAME_ANSWERS.values(), ids=SAME_ANSWERS)
def test_an_odd_stream_is_the_answer_that_it_means(data: bytes) -> None:
    choice = folded(data)["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Hello there", "stop")
    assert choice == folded(data, openai.OWN_WIRE)["choices"][0] and choice["index"] == 0


@pytest.mark.parametrize("name", ["no end mark, usage last", "null choices", "no choices"])
def test_its_usage_counts(name: str) -> None:
    assert folded(SAME_ANSWERS[name])["usage"] == USAGE


@pytest.mark.parametrize(
    ("usage", "meant"),
    [
        (
            {**USAGE, "completion_tokens": None, "total_tokens": None},
            {**USAGE, "completion_tokens": 0, "total_tokens": 7},
        ),
        ({"prompt_tokens": 7.0, "completion_tokens": 3.0}, USAGE),
        ({}, None),
        (None, None),
        ([], None),
        ({"prompt_tokens": None}, None),
        ({"prompt_tokens": "7", "completion_tokens": "3"}, USAGE),
        ({"prompt_tokens": "n/a", "completion_tokens": 3}, {**USAGE, "prompt_tokens": 0, "total_tokens": 3}),
        ({"prompt_tokens": -1, "completion_tokens": -1, "total_tokens": -2}, None),
        ({**USAGE, "prompt_tokens_details": "none", "completion_tokens_details": []}, USAGE),
    ],
)
def test_odd_counts_are_numbers_or_none(usage: Any, meant: Json | None) -> None:
    assert folded(USUAL + event({"choices": [], "usage": usage}) + DONE).get("usage") == meant


@pytest.mark.parametrize(
    "end",
    [
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop", "usage": USAGE}]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "x_groq": {"id": "r", "usage": USAGE}},
        {
            "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}],
            "usage": {"input_tokens": 7, "output_tokens": 3},
        },
    ],
)
def test_usage_in_other_places_counts(end: Json) -> None:
    found = folded(USUAL + event(end) + DONE)["usage"]
    assert {name: found[name] for name in USAGE} == USAGE


def test_an_impossible_tokens_logprob_is_a_number() -> None:
    data = event(b'{"choices":[{"index":0,"delta":{"content":"a"},"logprobs":{"content":[{"logprob":-Infinity}]}}]}')
    assert folded(data + END + DONE)["choices"][0]["logprobs"] == {"content": [{"logprob": -9999.0}]}


def test_half_an_emoji_does_not_end_an_answer() -> None:
    halves = [
        event(b'{"choices":[{"index":0,"delta":{"content":"%s"}}]}' % half) for half in (rb"a\ud83d", rb"\ude00b")
    ]
    assert folded(b"".join(halves) + END + DONE)["choices"][0]["message"]["content"] == "a\ufffd\ufffdb"


def test_the_last_real_usage_counts() -> None:
    data = USUAL + TALLY + event({"choices": [], "usage": None}) + event({"choices": [], "usage": {}}) + DONE
    decoder, _ = decoded(data)
    assert decoder.usage == USAGE == folded(data)["usage"]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("max_tokens", "length"),
        ("model_length", "length"),
        ("tool_use", "tool_calls"),
        ("end_turn", "stop"),
        (7, "stop"),
    ],
)
def test_a_finish_reason_is_one_of_openais(given: Any, meant: str) -> None:
    assert folded(USUAL + delta(given) + DONE)["choices"][0]["finish_reason"] == meant


@pytest.mark.parametrize(
    "fields",
    [
        {"thinking": "Hm."},
        {"reasoning": "Hm."},
        {"reasoning": {"text": "Hm."}},
        {"reasoning": ["H", {"type": "text", "text": "m."}]},
        {"reasoning": True, "thinking": "Hm."},
        {"reasoning": "Hm.", "reasoning_content": "Hm."},
        {"reasoning": None, "thinking": "", "reasoning_content": "Hm."},
        {
            "reasoning_details": [
                {"type": "reasoning.text", "text": "H"},
                {"type": "reasoning.summary", "summary": "m."},
            ]
        },
        {"reasoning": "Hm.", "reasoning_details": [{"type": "reasoning.text", "text": "Hm."}]},
        {
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]},
                {"type": "text", "text": ""},
            ]
        },
        {"content": [{"type": "thinking", "thinking": "Hm."}]},
    ],
)
def test_reasoning_has_one_name_and_occurs_once(fields: Json) -> None:
    data = delta(role="assistant", **fields) + delta(content="Hi", reasoning=None) + END + DONE
    message = folded(data)["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm.", "Hi")
    assert not {"reasoning", "thinking"} & message.keys()
    assert "".join(chunk.reasoning for chunk in decoded(data, openai.OWN_WIRE)[1]) == "Hm."
    same_api = folded(data, openai.OWN_WIRE)["choices"][0]["message"]
    assert "Hm." in (same_api.get("reasoning"), same_api.get("reasoning_content"))


@pytest.mark.parametrize(
    ("data", "message", "status"),
    [
        (b'{"error":{"message":"quota exceeded","code":429}}', "quota exceeded", 429),
        (b'{"error":{"message":"busy","code":"503"}}', "busy", 503),
        (b'{"object":"error","message":"too many","code":400}', "too many", 400),
        (b'{"detail":"Not authenticated"}', "Not authenticated", 502),
        (b'{"message":"no such deployment","status":404}', "no such deployment", 404),
        (b'{"error":"it broke"}\n', "it broke", 502),
        (event({"choices": None, "error_type": "BadRequestError", "error_message": "too long"}), "too long", 502),
        (event({"object": "error", "message": "oom", "code": 500}), "oom", 500),
        (USUAL + b'event: error\ndata: {"message": "overloaded", "code": 503}\n\n', "overloaded", 503),
        (USUAL + b"event: error\ndata: out of memory\n\n", "out of memory", 502),
        (USUAL + b'error: {"code":500,"message":"no slot"}\n\n', "no slot", 500),
        (
            event({"error": {"message": "gone", "code": 502}, "choices": [{"delta": {}, "finish_reason": "error"}]}),
            "gone",
            502,
        ),
        (delta("error"), "the model server ended its answer with an error", 502),
        (b'[{"error":{"message":"no such key","code":400}}]', "no such key", 400),
        (b'{"success":false,"errors":[{"message":"no route","code":7000}]}', "no route", 502),
        (b"<html><body>Log in</body></html>", "the model server answered with a web page instead of a completion", 502),
        (b"  \n<!DOCTYPE html>", "the model server answered with a web page instead of a completion", 502),
        (b'{"status":"ok"}', "the model server answered with JSON instead of a completion", 502),
        (b'[{"role":"user"}]', "the model server answered with JSON instead of a completion", 502),
        (b'{"choices":[{"message":{"cont', "the model server ended its answer before it was complete", 502),
        (delta("null", content="Hello"), "the model server ended its answer before it was complete", 502),
        (USUAL, "the model server ended its answer before it was complete", 502),
        (b"", "the model server ended its answer before it was complete", 502),
    ],
)
def test_a_failure_is_the_servers_with_its_message_and_status(data: bytes, message: str, status: int) -> None:
    failure = decoded(data)[0].failure
    assert failure is not None and (failure.message, failure.status) == (message, status)


def test_of_several_choices_each_needs_a_finish_reason() -> None:
    one = event({"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": "stop"}]})
    other = event({"choices": [{"index": 1, "delta": {"content": "b"}, "finish_reason": "length"}]})
    assert decoded(one, n=2)[0].failure is not None
    assert [choice["finish_reason"] for choice in folded(one + other, n=2)["choices"]] == ["stop", "length"]


def test_a_whole_message_of_anthropics_api_is_understood() -> None:
    blocks = [
        {"type": "thinking", "thinking": "Hm."},
        {"type": "text", "text": "Hi"},
        {"type": "tool_use", "id": "t", "name": "get_time", "input": {"city": "Rome"}},
    ]
    usage = {"input_tokens": 7, "output_tokens": 3}
    body = {
        "type": "message",
        "id": "msg_1",
        "model": "m",
        "content": blocks,
        "stop_reason": "tool_use",
        "usage": usage,
    }
    completion = folded(orjson.dumps(body), anthropic.MESSAGES.same_api or openai.WIRE)
    message = completion["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"], calls_of(completion)) == ("Hi", "Hm.", [TIME])
    assert (completion["choices"][0]["finish_reason"], completion["usage"]) == ("tool_calls", USAGE)


def test_usual_frames_keep_their_bytes() -> None:
    parts = [part("get_weather", "", index=0, id="a", type="function"), part(..., CITY, index=0)]
    data = USUAL + b"".join(parts) + delta("tool_calls") + TALLY + DONE
    decoder, chunks = decoded(data, openai.OWN_WIRE)
    assert b"".join(chunk.frame or b"?" for chunk in chunks) + decoder.tail == data


def test_bytes_that_do_not_mean_what_they_say_are_not_kept() -> None:
    whole = event({"choices": [{"message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}]})
    assert [chunk.frame for chunk in decoded(whole + DONE, openai.OWN_WIRE)[1]] == [None]
    assert decoded(USUAL + END + DONE)[0].tail == b""  # another API's client gets none of it


@pytest.mark.parametrize("data", [USUAL + END + DONE, USUAL + DONE])
def test_the_end_is_reported_at_once(data: bytes) -> None:
    ends: list[int] = []
    decoder = StreamDecoder(openai.WIRE, ChatRequest(dict(CHAT), True), ended=lambda: ends.append(1))
    decoder.feed(data[:-1])
    assert ends == []
    decoder.feed(data[-1:])
    assert ends == [1] and decoder.finish() == [] and ends == [1]
