"""Answers: what Ollama's lines mean, what our clients get for llama-server's chunks, and that the one is the inverse of
the other, over the recorded transcripts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import orjson
import pytest

from llama_smart_proxy.proxy.chat import ChatRequest, Chunk, Fold, Json, Timing, extensions_of
from llama_smart_proxy.proxy.dialects.ollama import CHAT, GENERATE, WIRE, OllamaReader, OllamaWriter
from llama_smart_proxy.proxy.dialects.ollama.dialect import OLLAMA
from llama_smart_proxy.proxy.dialects.ollama.writing import LONGEST_TEXT
from llama_smart_proxy.proxy.errors import UpstreamFailed, UpstreamRefused

GOLDEN = {
    file.stem: json.loads(file.read_text(encoding="utf-8"))
    for file in sorted((Path(__file__).parents[1] / "golden" / "ollama").glob("*.json"))
}
STREAMS = {"/api/chat": CHAT, "/api/generate": GENERATE}
STREAMED = [
    name
    for name, case in GOLDEN.items()
    if case["request"]["path"] in STREAMS and "lines" in case["response"] and "error" not in name
]
WHEN = {"created_at", "total_duration", "load_duration"}
CREATED = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z")


def question(name: str) -> tuple[ChatRequest, bool]:
    """The request of a transcript, and whether it is a chat."""
    asked = GOLDEN[name]["request"]
    face = STREAMS[asked["path"]]
    return face.decode(json.loads(json.dumps(asked["body"]))), face is CHAT


def frames(name: str) -> list[bytes]:
    return [orjson.dumps(line) for line in GOLDEN[name]["response"]["lines"]]


def chunks(name: str) -> list[Json]:
    reader = WIRE.reader(question(name)[0])
    found = [reader.read(frame) for frame in frames(name)]
    assert reader.done
    return [chunk for chunk in found if chunk is not None]


def completion(all_chunks: list[Json]) -> Json:
    fold = Fold()
    for chunk in all_chunks:
        fold.add(chunk)
    return fold.completion()


TIMES = Timing(arrived_s=10.0, sent_s=10.5)


def writer(*, chat: bool = True, request: ChatRequest | None = None, timing: Timing = TIMES) -> OllamaWriter:
    """One that is asked for the last line 2 seconds after the request arrived."""
    asked = request or ChatRequest({"model": "m", "messages": []}, stream=True)
    return OllamaWriter(asked, timing, chat=chat, clock=lambda: 12.0)


def lines(data: bytes) -> list[Json]:
    """What was written, line by line, and that it is well-formed NDJSON with good times, which are taken out."""
    assert data == b"" or data.endswith(b"\n")
    found = [orjson.loads(line) for line in data.split(b"\n")[:-1]]
    for line in found:
        if "error" not in line:
            assert CREATED.fullmatch(line.pop("created_at"))
    return found


def delta(finish: str | None = None, **fields: Any) -> Json:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": finish}]}


def call_delta(index: int, known: str | None = None, name: str | None = None, arguments: str = "") -> Json:
    function = {"arguments": arguments, **({"name": name} if name else {})}
    head = {"id": known, "type": "function"} if known else {}
    return delta(tool_calls=[{"index": index, **head, "function": function}])


def said(content: str = "", *, model: str = "m", **message: Any) -> Json:
    return {"model": model, "message": {"role": "assistant", "content": content, **message}, "done": False}


# -- the transcripts ---------------------------------------------------------------------------------------------------


def test_transcripts_are_what_a_replay_can_use() -> None:
    for name, case in GOLDEN.items():
        assert case["name"] == name
        assert case["request"].keys() <= {"method", "path", "body"}
        assert case["response"].keys() in ({"status", "headers", "lines"}, {"status", "headers", "body"})
        assert case["response"]["headers"]["Content-Type"].startswith("application/")


@pytest.mark.parametrize("name", [name for name in STREAMED if name != "chat-tools-native"])
def test_reading_and_writing_gives_the_same_lines(name: str) -> None:
    request, chat = question(name)
    ours = writer(chat=chat, request=request)
    written = lines(b"".join(map(ours.chunk, chunks(name))) + ours.end())
    recorded = GOLDEN[name]["response"]["lines"]
    assert [{k: v for k, v in line.items() if k not in WHEN} for line in written] == [
        {k: v for k, v in line.items() if k not in WHEN} for line in recorded
    ]
    assert written[-1]["total_duration"] == 2 * 10**9
    assert written[-1]["load_duration"] == recorded[-1]["load_duration"] + 5 * 10**8  # our queue, and Ollama's load


@pytest.mark.parametrize("name", ["chat", "generate"])
def test_an_answer_that_is_not_streamed_is_the_recorded_object(name: str) -> None:
    request, chat = question(name)
    ours = writer(chat=chat, request=request)
    written = orjson.loads(ours.reply(completion(chunks(f"{name}-stream"))))
    recorded = GOLDEN[name]["response"]["body"]
    assert written.keys() == recorded.keys()
    text = "message" if chat else "response"
    expected = GOLDEN[f"{name}-stream"]["response"]["lines"]
    pieces = [line["message"]["content"] if chat else line["response"] for line in expected]
    assert (written[text]["content"] if chat else written[text]) == "".join(pieces)
    assert {k: v for k, v in written.items() if k not in (*WHEN, text)} == {
        k: v for k, v in expected[-1].items() if k not in (*WHEN, text)
    }


def test_tool_calls_in_the_last_line_are_the_same_answer() -> None:
    native, own_line = completion(chunks("chat-tools-native")), completion(chunks("chat-tools"))
    assert native["choices"] == own_line["choices"]
    request, _ = question("chat-tools-native")
    ours = writer(request=request)
    *_, calls, last = lines(b"".join(map(ours.chunk, chunks("chat-tools-native"))) + ours.end())
    assert calls["message"] == GOLDEN["chat-tools"]["response"]["lines"][1]["message"]
    assert (last["done"], last["message"]) == (True, {"role": "assistant", "content": ""})


def test_an_error_line_is_a_failure_with_its_words() -> None:
    *good, bad = frames("chat-error-midway")
    reader = OllamaReader()
    assert all(reader.read(frame) for frame in good)
    with pytest.raises(UpstreamRefused, match="an error was encountered while running the model: unexpected EOF"):
        reader.read(bad)
    assert not reader.done


# -- reading -----------------------------------------------------------------------------------------------------------


def test_the_last_line_tells_usage_and_timings_in_llama_cpps_names() -> None:
    line = {"message": {"content": ""}, "done": True, "done_reason": "length", "prompt_eval_count": 20}
    line |= {"prompt_eval_duration": 5 * 10**6, "eval_count": 4, "eval_duration": 2 * 10**9, "load_duration": 7}
    chunk = OllamaReader().read(orjson.dumps({**line, "prompt_eval_cached_count": 15}))
    assert chunk is not None
    assert chunk["choices"] == [{"index": 0, "delta": {}, "finish_reason": "length"}]
    assert chunk["usage"] == {
        "prompt_tokens": 20,
        "completion_tokens": 4,
        "total_tokens": 24,
        "prompt_tokens_details": {"cached_tokens": 15},
    }
    assert chunk["timings"] == {
        "cache_n": 15,
        "prompt_n": 5,
        "prompt_ms": 5.0,
        "predicted_n": 4,
        "predicted_ms": 2000.0,
        "prompt_per_second": 1000.0,
        "predicted_per_second": 2.0,
    }
    assert extensions_of(chunk, "ollama") == {"load_duration": 7, "prompt_eval_cached_count": 15}


@pytest.mark.parametrize("reason", ["load", "unload", None, "stop"])
def test_any_other_end_is_a_stop(reason: str | None) -> None:
    reader = OllamaReader()
    chunk = reader.read(orjson.dumps({"response": "", "done": True, **({"done_reason": reason} if reason else {})}))
    assert chunk is not None and chunk["choices"][0]["finish_reason"] == "stop"
    ours = writer(chat=False)
    (last,) = lines(ours.chunk(chunk) + ours.end())
    assert last["done_reason"] == (reason or "stop")


def test_calls_get_indices_and_ids_and_their_arguments_as_a_text() -> None:
    call = {"function": {"name": "f", "arguments": {"a": "ü"}}}
    line = orjson.dumps({"created_at": "t", "message": {"content": "", "tool_calls": [call, call]}, "done": False})
    reader = OllamaReader()
    first, second = reader.read(line), reader.read(line)
    assert first is not None and second is not None
    calls = [call for chunk in (first, second) for call in chunk["choices"][0]["delta"]["tool_calls"]]
    assert [call["index"] for call in calls] == [0, 1, 2, 3]
    assert len({call["id"] for call in calls}) == 4
    assert calls[0]["function"] == {"name": "f", "arguments": '{"a":"ü"}'}
    assert OllamaReader().read(line) == first
    end = reader.read(b'{"message":{"content":""},"done":true,"done_reason":"stop"}')
    assert end is not None and end["choices"][0]["finish_reason"] == "tool_calls"


def test_unknown_fields_at_every_level_come_back_and_get_into_no_other_api() -> None:
    function = {"index": 0, "name": "f", "arguments": {}, "x": 1}
    sent = [
        {**said("hi", x=1), "y": [2]},
        said(tool_calls=[{"id": "c", "function": function, "z": 3}], w=4),
        {**said(), "done": True, "done_reason": "stop", "v": {"u": 5}},
    ]
    reader, ours = OllamaReader(), writer()
    read = [reader.read(orjson.dumps(line)) for line in sent]
    assert all(chunk is not None and '"x"' not in json.dumps(chunk["choices"]) for chunk in read)
    written = lines(b"".join(ours.chunk(chunk) for chunk in read if chunk is not None) + ours.end())
    assert written[:2] == sent[:2]
    assert written[2].items() >= sent[2].items()


def test_a_line_that_says_nothing_is_nothing() -> None:
    assert OllamaReader().read(b'{"model":"m","created_at":"t","message":{"role":"assistant","content":""}}') is None


@pytest.mark.parametrize(
    "frame",
    [
        *[b"not json", b"[]", b"5", b'"error"', b"\xff", b'{"message":5}', b'{"message":{"content":[1]}}'],
        *[b'{"response":7}', b'{"message":{"thinking":{"a":1}}}', b'{"message":{"tool_calls":[{}]}}'],
        *[b'{"message":{"tool_calls":[{"function":{"name":[]}}]}}', b'{"message":{"tool_calls":7}}'],
    ],
)
def test_what_is_no_line_of_an_answer_is_the_servers_failure(frame: bytes) -> None:
    with pytest.raises(UpstreamFailed) as failed:
        OllamaReader().read(frame)
    assert failed.value.status == 502


@pytest.mark.parametrize("error", ["out of memory", {"message": "out of memory"}])
def test_an_error_may_be_a_text_or_an_object(error: Any) -> None:
    with pytest.raises(UpstreamRefused, match=r"^out of memory$"):
        OllamaReader().read(orjson.dumps({"error": error}))


# -- writing -----------------------------------------------------------------------------------------------------------

USAGE = {"prompt_tokens": 30, "completion_tokens": 4, "total_tokens": 34}
TIMINGS = {"cache_n": 20, "prompt_n": 10, "prompt_ms": 1.5, "predicted_n": 4, "predicted_ms": 8.25}
ENDING = [delta("stop"), {"choices": [], "usage": USAGE, "timings": TIMINGS}]
METRICS = {
    "total_duration": 2 * 10**9,
    "load_duration": 5 * 10**8,
    "prompt_eval_count": 30,
    "prompt_eval_duration": 1_500_000,
    "eval_count": 4,
    "eval_duration": 8_250_000,
}


def test_llama_servers_stream_becomes_a_line_a_token_and_one_last_line() -> None:
    ours = writer()
    stream = [delta(role="assistant", content=None), delta(content="Hel"), delta(content=""), delta(content="lo")]
    written = [lines(ours.chunk(chunk)) for chunk in [*stream, *ENDING]]
    assert written == [[], [said("Hel")], [], [said("lo")], [], []]
    assert lines(ours.end()) == [{**said(), "done": True, "done_reason": "stop", **METRICS}]
    assert ours.content_type == "application/x-ndjson"


def test_generate_has_its_own_form_and_a_place_for_its_context() -> None:
    timing = Timing(TIMES.arrived_s, TIMES.sent_s)
    ours = writer(chat=False, timing=timing)
    written = lines(b"".join(map(ours.chunk, [delta(reasoning_content="Hm."), delta(content="Hi"), *ENDING])))
    assert written == [
        {"model": "m", "response": "", "thinking": "Hm.", "done": False},
        {"model": "m", "response": "Hi", "done": False},
    ]
    timing.extra = {"context": [1, 2]}
    (last,) = lines(ours.end())
    assert last == {"model": "m", "response": "", "done": True, "done_reason": "stop", "context": [1, 2], **METRICS}
    timing.extra = {"context": [3]}
    whole = writer(chat=False, timing=timing)
    reply = orjson.loads(whole.reply(completion([Chunk.of("Hi").seen, *ENDING])))
    assert (reply["response"], reply["context"], reply["done"], reply["eval_count"]) == ("Hi", [3], True, 4)


def test_metrics_that_are_not_known_are_left_out() -> None:
    (last,) = lines(writer(timing=Timing(arrived_s=12.0)).end())
    assert last == {**said(), "done": True, "done_reason": "stop"}
    ours = writer()
    ours.chunk({"choices": [], "usage": USAGE})
    (last,) = lines(ours.end())
    assert (last["prompt_eval_count"], last["eval_count"], "eval_duration" in last) == (30, 4, False)


def test_tool_calls_are_told_when_they_are_whole() -> None:
    ours = writer()
    stream = [
        delta(content="Look: "),
        call_delta(0, "a", "look", '{"at"'),
        call_delta(0, arguments=':"Łódź"}'),
        call_delta(1, "b", "rest"),
        delta("tool_calls"),
    ]
    first = {"id": "a", "function": {"index": 0, "name": "look", "arguments": {"at": "Łódź"}}}
    second = {"id": "b", "function": {"index": 1, "name": "rest", "arguments": {}}}
    written = [lines(ours.chunk(chunk)) for chunk in stream]
    assert written == [[said("Look: ")], [], [], [said(tool_calls=[first])], []]
    calls, last = lines(ours.end())
    assert calls == said(tool_calls=[second])
    assert (last["done"], last["done_reason"]) == (True, "stop")
    reply = orjson.loads(writer().reply(completion(stream)))
    assert reply["message"] == {"role": "assistant", "content": "Look: ", "tool_calls": [first, second]}
    assert reply["done_reason"] == "stop"


def test_text_behind_a_call_comes_behind_it() -> None:
    ours = writer()
    stream = [call_delta(0, "a", "f", "{}"), delta(content="done")]
    written = lines(b"".join(map(ours.chunk, stream)))
    assert [("tool_calls" in line["message"], line["message"]["content"]) for line in written] == [
        (True, ""),
        (False, "done"),
    ]


def test_a_call_cut_off_by_the_limit_is_left_out_and_any_other_broken_one_is_a_failure() -> None:
    broken = call_delta(0, "a", "f", '{"x": ')
    ours = writer()
    assert ours.chunk(broken) + ours.chunk(delta("length")) == b""
    (last,) = lines(ours.end())
    assert last["done_reason"] == "length"
    assert "tool_calls" not in orjson.loads(writer().reply(completion([broken, delta("length")])))["message"]
    for following in (delta("stop"), call_delta(1, "b", "g", "{}"), delta(content="x")):
        ours = writer()
        assert ours.chunk(broken) == b""
        with pytest.raises(UpstreamFailed, match="invalid arguments"):
            assert ours.chunk(following) + ours.end()
    with pytest.raises(UpstreamFailed, match="invalid arguments"):
        writer().reply(completion([broken, delta("stop")]))


@pytest.mark.parametrize("asked", [0, 2, None])
def test_alternatives_are_told_only_if_asked_for(asked: int | None) -> None:
    token = {"token": "Hi", "logprob": -0.5, "bytes": [72, 105]}
    item = {"id": 5, **token, "top_logprobs": [{"id": 5, **token}]}
    fields = {} if asked is None else {"top_logprobs": asked}
    stream = [
        {"choices": [{"index": 0, "delta": {}, "finish_reason": None, "logprobs": {"content": [item]}}]},
        {"choices": [{"index": 0, "delta": {"content": "Hi"}, "finish_reason": None, "logprobs": {"content": [item]}}]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop", "logprobs": {"content": [item]}}]},
    ]
    told = {**token, **({"top_logprobs": [token]} if asked else {})}
    for request, chat in (
        (CHAT.decode({"model": "m", "messages": [{}], "logprobs": True, **fields}), True),
        (GENERATE.decode({"model": "m", "prompt": "x", "raw": True, "logprobs": True, **fields}), False),
    ):
        ours = writer(chat=chat, request=request)
        line, last = lines(b"".join(map(ours.chunk, stream)) + ours.end())
        assert (line["logprobs"], last["logprobs"]) == ([told, told], [told])
        assert orjson.loads(writer(chat=chat, request=request).reply(completion(stream)))["logprobs"] == [told] * 3


@pytest.mark.parametrize("character", ["x", "\x01", "😀"])
def test_no_line_is_longer_than_clients_can_read(character: str) -> None:
    text = character * (LONGEST_TEXT * 2 + 1)
    for chunk, name in ((Chunk.of(text), "content"), (Chunk.of(reasoning=text), "thinking")):
        written = writer().chunk(chunk.seen)
        assert max(map(len, written.split(b"\n"))) < 8_000_000
        assert "".join(line["message"][name] for line in lines(written)) == text


def test_a_second_answer_is_not_mixed_into_the_first() -> None:
    ours = writer()
    assert ours.chunk({"choices": [{"index": 1, "delta": {"content": "no"}, "finish_reason": None}]}) == b""


def test_an_error_is_one_line_that_chat_uis_can_show() -> None:
    failure = UpstreamFailed("it broke\noff")
    (line,) = lines(writer().error(failure))
    assert line["error"] == "it broke\noff" and line["done"] is False and "model" in line
    assert line["message"] == {"role": "assistant", "content": "\n\n**Error:** it broke off"}
    (line,) = lines(OLLAMA.error_event(failure))
    assert line["error"] == "it broke\noff" and line["message"]["content"] == "\n\n**Error:** it broke off"
    assert OLLAMA.error_event(failure).startswith(b'{"error":'), "that is how a relay recognises it"
