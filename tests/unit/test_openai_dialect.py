"""The OpenAI dialect, and the values of a chat: what is read, written and folded."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given

from llama_smart_proxy.proxy.chat import (
    ChatRequest,
    Chunk,
    Extensions,
    Fold,
    Json,
    Timing,
    attach,
    extensions_of,
    without_extensions,
)
from llama_smart_proxy.proxy.dialects import openai, upstream_errors
from llama_smart_proxy.proxy.dialects.openai import WIRE, ChatWriter, EventReader, TextWriter
from llama_smart_proxy.proxy.errors import BadRequest, ContextExceeded, UpstreamFailed, UpstreamRefused
from llama_smart_proxy.proxy.stream.decoder import StreamDecoder
from tests.support.laws import law, splits, unknown_fields

ASK: Json = {"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}
TOOL: Json = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
REQUEST = ChatRequest({**ASK, "stream_options": {"include_usage": True}}, stream=True)


def events(*values: Any) -> bytes:
    return b"".join(b"data: " + orjson.dumps(value) + b"\n\n" for value in values) + b"data: [DONE]\n\n"


def delta(finish: str | None = None, **fields: Any) -> Json:
    return {"id": "x", "choices": [{"index": 0, "delta": fields, "finish_reason": finish}]}


STREAM = events(
    delta(role="assistant", content=None),
    delta(reasoning_content="Hm\u2028."),
    delta(content="Hel"),
    delta(content="lo 😀"),
    delta(tool_calls=[{"index": 0, "id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"a"'}}]),
    delta(tool_calls=[{"index": 0, "function": {"arguments": ":1}"}}]),
    delta("tool_calls"),
    {"id": "x", "choices": [], "usage": {"total_tokens": 7}, "timings": {"predicted_n": 3}},
)


@given(unknown_fields({**ASK, "tools": [TOOL]}))
@law(300)
def test_a_request_is_what_it_was_with_every_field_it_had(body: Json) -> None:
    before = orjson.dumps(body)
    assert orjson.dumps(openai.CHAT.encode(openai.CHAT.decode(body))) == before


@given(unknown_fields({**ASK, "tools": [TOOL]}))
@law(300)
def test_a_server_gets_every_field_and_is_asked_for_a_stream_with_usage(body: Json) -> None:
    path, sent = WIRE.encode(ChatRequest(body, stream=False))
    assert path == "/v1/chat/completions"
    assert (sent.pop("stream"), sent.pop("stream_options")["include_usage"]) == (True, True)
    assert sent == {key: value for key, value in body.items() if key not in ("stream", "stream_options")}


@given(splits(STREAM))
@law(500)
def test_what_a_client_gets_does_not_depend_on_how_the_answer_arrived(pieces: list[bytes]) -> None:
    assert _translated(pieces) == _translated([STREAM])


def _translated(pieces: list[bytes]) -> list[Any]:
    """The events an OpenAI client gets, without those fields that are made anew for each answer."""
    writer, decoder = ChatWriter(REQUEST, Timing(0.0)), StreamDecoder(WIRE, REQUEST)
    chunks = [chunk for piece in pieces for chunk in decoder.feed(piece)] + decoder.finish()
    written = b"".join(writer.chunk(chunk.seen) for chunk in chunks) + writer.end()
    assert decoder.failure is None
    *data, end = [part.removeprefix(b"data: ") for part in written.split(b"\n\n")[:-1]]
    assert end == b"[DONE]"
    return [{k: v for k, v in orjson.loads(item).items() if k != "created"} for item in data]


def test_a_stream_becomes_one_completion() -> None:
    fold = Fold()
    for chunk in StreamDecoder(WIRE, REQUEST).feed(STREAM):
        fold.add(chunk.seen)
    completion = fold.completion()
    assert completion["choices"] == [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": "Hello 😀",
                "reasoning_content": "Hm\u2028.",
                "tool_calls": [
                    {"type": "function", "function": {"name": "look", "arguments": '{"a":1}'}, "id": "c1"},
                ],
            },
            "finish_reason": "tool_calls",
        }
    ]
    assert (completion["usage"], completion["timings"]) == ({"total_tokens": 7}, {"predicted_n": 3})


def test_several_answers_and_their_logprobs_are_kept_apart() -> None:
    fold = Fold()
    for index, text in ((1, "b"), (0, "a"), (1, "B")):
        choice = {"index": index, "delta": {"content": text}, "logprobs": {"content": [{"token": text}]}}
        fold.add({"choices": [choice]})
    found = fold.completion()["choices"]
    assert [choice["message"]["content"] for choice in found] == ["a", "bB"]
    assert [[item["token"] for item in choice["logprobs"]["content"]] for choice in found] == [["a"], ["b", "B"]]


def test_a_name_that_comes_with_every_part_of_a_call_is_one_name() -> None:
    fold = Fold()
    for piece in ('{"a"', ":1}"):
        fold.add(delta(tool_calls=[{"index": 0, "function": {"name": "look", "arguments": piece}}]))
    assert fold.completion()["choices"][0]["message"]["tool_calls"][0]["function"] == {
        "name": "look",
        "arguments": '{"a":1}',
    }


def test_an_answer_of_nothing_is_still_one() -> None:
    assert Fold().completion()["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": ""}, "finish_reason": "stop"}
    ]


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (b'data: {"error":{"message":"out of memory","type":"server_error"}}', "out of memory"),
        (b'data: {"error":"out of memory"}', "out of memory"),
        (b"data: [1,2]", "1,2"),
        (b"data: {", "not JSON"),
    ],
)
def test_an_error_in_a_stream_is_raised_with_its_words(frame: bytes, words: str) -> None:
    with pytest.raises((UpstreamFailed, UpstreamRefused), match=words):
        EventReader(REQUEST).read(frame)


def test_an_event_of_an_unknown_shape_breaks_the_answer_off() -> None:
    decoder = StreamDecoder(WIRE, REQUEST)
    assert decoder.feed(b'data: {"choices":[3]}\n\n') == []
    assert decoder.failure is not None and decoder.failure.code == "upstream_error"
    assert decoder.feed(STREAM) == []


def test_a_stream_that_stops_early_is_incomplete() -> None:
    decoder = StreamDecoder(WIRE, REQUEST)
    decoder.feed(events(delta(content="Hel")).removesuffix(b"data: [DONE]\n\n"))
    decoder.finish()
    assert decoder.failure is not None and decoder.failure.code == "upstream_incomplete"


def test_infill_and_text_completions_are_read_as_chunks() -> None:
    native = EventReader(REQUEST)
    assert native.read(b'data: {"content":"a","stop":false}') == Chunk.of("a").seen
    last = native.read(b'data: {"content":"","stop":true,"stop_type":"limit","timings":{"predicted_n":1}}')
    assert last is not None and native.done
    assert (last["choices"][0]["finish_reason"], last["timings"]) == ("length", {"predicted_n": 1})
    read = EventReader(REQUEST).read(b'data: {"choices":[{"index":0,"text":"b","finish_reason":null}]}')
    assert read == Chunk.of("b").seen


def test_thoughts_stay_where_the_server_put_them_for_clients_of_its_api() -> None:
    read = openai.OWN_WIRE.reader(REQUEST).read(b'data: {"choices":[{"index":0,"delta":{"reasoning":"Hm."}}]}')
    assert read is not None
    chunk = Chunk(read)
    assert (chunk.reasoning, chunk.delta) == ("Hm.", {"reasoning": "Hm."})
    chunk.reasoning = "Oh."
    assert chunk.delta == {"reasoning": "Oh."}
    both = Chunk({"choices": [{"index": 0, "delta": {"reasoning": "a", "reasoning_content": "a"}, "logprobs": 1}]})
    both.reasoning = "a"
    assert both.choice["logprobs"] == 1 and both.delta == {"reasoning": "a", "reasoning_content": "a"}
    both.reasoning = "b"
    assert both.choice == {"index": 0, "delta": {"reasoning_content": "b"}}


def test_what_is_said_as_before_keeps_its_logprobs() -> None:
    for delta in ({"content": "a"}, {"role": "assistant", "content": None}, {"reasoning_content": "a"}):
        chunk = Chunk({"choices": [{"index": 0, "delta": delta, "logprobs": {"content": []}}]})
        chunk.text, chunk.reasoning = chunk.text, chunk.reasoning
        assert "logprobs" in chunk.choice
        chunk.text = "b"
        assert "logprobs" not in chunk.choice


def test_only_what_is_known_of_a_servers_error_is_passed_on() -> None:
    error = {"message": "no", "type": "exceed", "code": 400, "n_ctx": 8, "key": "sk", "param": "x" * 201, "n_bad": [1]}
    assert upstream_errors.error_details({"error": error}) == {"type": "exceed", "code": 400, "n_ctx": 8}
    for body in ({"error": "no"}, {"detail": "no"}, ["no"], None):
        assert upstream_errors.error_details(body) == {}


def test_fill_in_the_middle_goes_to_llama_servers_own_endpoint() -> None:
    request = openai.TEXT.decode({"model": "m", "prompt": "a", "suffix": "c", "max_tokens": 3, "temperature": 0})
    path, body = openai.LLAMA_CPP.encode(request)
    assert path == "/infill"
    assert {key: body[key] for key in ("input_prefix", "input_suffix", "n_predict", "temperature", "stream")} == {
        "input_prefix": "a",
        "input_suffix": "c",
        "n_predict": 3,
        "temperature": 0,
        "stream": True,
    }
    assert not {"prompt", "suffix", "max_tokens"} & body.keys()
    assert WIRE.encode(request)[0] == "/v1/completions"


def test_a_text_completion_is_written_as_one() -> None:
    writer = TextWriter(ChatRequest({"model": "m", "prompt": "a"}, stream=True), Timing(0.0))
    event = json.loads(writer.chunk(Chunk.of("b").seen).removeprefix(b"data: "))
    assert (event["object"], event["choices"]) == (
        "text_completion",
        [{"text": "b", "index": 0, "finish_reason": None}],
    )
    fold = Fold()
    fold.add(Chunk.of("b").seen)
    whole = json.loads(writer.reply(fold.completion()))
    assert (whole["object"], whole["choices"]) == (
        "text_completion",
        [{"text": "b", "index": 0, "finish_reason": "stop"}],
    )


def test_usage_is_told_in_a_stream_only_to_those_who_asked() -> None:
    plain = ChatWriter(ChatRequest(ASK, stream=True), Timing(0.0))
    for writer, told in ((ChatWriter(REQUEST, Timing(0.0)), True), (plain, False)):
        event = json.loads(
            writer.chunk({**Chunk.of("a").seen, "usage": {"total_tokens": 1}, "timings": {}}).removeprefix(b"data: ")
        )
        assert "usage" not in event and "timings" in event
        assert (b'"usage"' in writer.end()) is told


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"messages": "Hi"},
        {"messages": []},
        {"messages": ["Hi"]},
        {"messages": [{"role": "user"}], "stream": "yes"},
    ],
)
def test_what_is_no_chat_is_refused(body: Json) -> None:
    with pytest.raises(BadRequest):
        openai.CHAT.decode(body)


def test_what_was_set_aside_is_seen_by_its_own_dialect_alone() -> None:
    body = attach({"a": [attach({"b": 1}, "ollama", {"shift": True})]}, "ollama", {"truncate": False})
    assert extensions_of(body, "ollama") == {"truncate": False} and extensions_of(body, "anthropic") == {}
    assert without_extensions(body) == {"a": [{"b": 1}]}
    assert extensions_of({"_extensions": {"truncate": False}}, "ollama") == {}  # a client's own field of that name
    assert without_extensions({"_extensions": {"x": 1}}) == {"_extensions": {"x": 1}}
    with pytest.raises(TypeError):
        orjson.dumps(Extensions("ollama", {}), option=orjson.OPT_PASSTHROUGH_SUBCLASS)


@pytest.mark.parametrize(
    ("message", "tokens", "limit"),
    [
        ("request (932 tokens) exceeds the available context size (64 tokens), try increasing it", 932, 64),
        ("This model's maximum context length is 4096 tokens. However, you requested 5000 tokens (1 in x)", 5000, 4096),
        ("This model's maximum context length is 8 tokens. However, your messages resulted in 9 tokens", 9, 8),
        ("prompt is too long: 20 tokens > 10 maximum", 20, 10),
        ("the input length exceeds the context length", None, None),
    ],
)
def test_a_prompt_over_the_context_is_recognized(message: str, tokens: int | None, limit: int | None) -> None:
    error = upstream_errors.refused(400, json.dumps({"error": {"message": message}}).encode())
    assert isinstance(error, ContextExceeded) and error.message == message
    assert (error.status, error.tokens, error.limit) == (400, tokens, limit)
    assert not isinstance(upstream_errors.refused(400, b'{"error":"the context is fine"}'), ContextExceeded)


@pytest.mark.parametrize("odd", ["many", 0, -1, 1.5, True, None])
def test_counts_that_are_none_are_not_taken_for_some(odd: Any) -> None:
    details = {"type": "exceed_context_size_error", "n_prompt_tokens": odd, "n_ctx": odd}
    message = "request (932 tokens) exceeds the available context size (64 tokens)"
    error = upstream_errors.refused(400, json.dumps({"error": {"message": message, **details}}).encode())
    assert isinstance(error, ContextExceeded) and (error.tokens, error.limit) == (932, 64)


TIMED = {"cache_n": 4, "prompt_n": 7, "prompt_ms": 1.5, "predicted_n": 3, "predicted_ms": 2.5}
COUNTED = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
BY_TIMINGS = {
    "prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14, "prompt_tokens_details": {"cached_tokens": 4},
}  # fmt: skip
UNCACHED = {
    "prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10, "prompt_tokens_details": {"cached_tokens": 0},
}  # fmt: skip
QUOTED = {"choices": [{"delta": {"content": '"timings":{"cache_n":9,"prompt_n":9,"predicted_n":9}}'}}]}


@pytest.mark.parametrize(
    ("events", "usage"),
    [
        ([{"choices": [], "timings": TIMED}], BY_TIMINGS),
        ([{"choices": [], "timings": TIMED, "object": "behind"}], BY_TIMINGS),
        ([{"choices": [], "timings": {"prompt_n": 7, "predicted_n": 3}}], UNCACHED),
        ([{"choices": [], "usage": COUNTED, "timings": TIMED}], COUNTED),
        ([{"choices": [], "timings": TIMED}, {"choices": [], "usage": COUNTED}], COUNTED),
        ([{"choices": [], "timings": TIMED}, QUOTED], BY_TIMINGS),
        ([QUOTED], None),
        ([{"choices": [{"delta": {"content": "x"}}]}], None),
        ([{"choices": [], "timings": {**TIMED, "more": {"deep": {}}}}], BY_TIMINGS),
        ([{"choices": [], "timings": {**TIMED, "predicted_n": None}}], None),
    ],
)  # fmt: skip
def test_the_counts_of_a_stream_are_those_of_its_last_event_that_has_any(
    events: list[Json], usage: Json | None
) -> None:
    frames = b"".join(b"data: " + orjson.dumps(event) + b"\n\n" for event in events) + b"data: [DONE]\n\n"
    assert openai.OPENAI.usage(frames) == usage
    assert openai.OPENAI.usage(b"\n".join(map(orjson.dumps, events))) == usage
