"""Answers to Anthropic's clients: the events of a stream, the whole Message, and reading them back."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_smart_proxy.proxy.chat import ChatRequest, Fold, Json, Timing, extensions_of
from llama_smart_proxy.proxy.dialects.anthropic import MESSAGES, reader
from llama_smart_proxy.proxy.dialects.base import Writer
from llama_smart_proxy.proxy.dialects.framing import EventSplitter, event_data
from llama_smart_proxy.proxy.dialects.openai import WIRE
from llama_smart_proxy.proxy.errors import Overloaded, UpstreamFailed, UpstreamRefused
from tests.support.laws import TEXT, law, splits

REQUEST = ChatRequest({"model": "asked", "messages": [{"role": "user", "content": "12345678"}]}, stream=True)
USAGE = {"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15}


def writer() -> Writer:
    return MESSAGES.writer(REQUEST, Timing(0.0))


def delta(finish: str | None = None, **fields: object) -> Json:
    return {"id": "chatcmpl-7", "choices": [{"index": 0, "delta": fields, "finish_reason": finish}]}


def call(index: int, arguments: str, **fields: str) -> Json:
    """A piece of a tool call; the first has `id` and `name`, too."""
    identity = {"id": fields["id"], "type": "function"} if fields else {}
    function = {"name": fields["name"]} if fields else {}
    return delta(tool_calls=[{"index": index, **identity, "function": {**function, "arguments": arguments}}])


def written(*chunks: Json) -> bytes:
    target = writer()
    return b"".join([*(target.chunk(chunk) for chunk in chunks), target.end()])


def events(data: bytes) -> list[Json]:
    """The data of all events, each of which is named like its type."""
    splitter = EventSplitter()
    frames = splitter.split(splitter.push(data))
    assert splitter.rest == b""
    found = [orjson.loads(event_data(frame) or b"") for frame in frames]
    assert [frame.split(b"\n")[0] for frame in frames] == [f"event: {event['type']}".encode() for event in found]
    return found


def read_back(data: bytes) -> tuple[list[Json], bool]:
    """The chunks that a reader makes of these events, and whether it saw the end."""
    splitter, source = EventSplitter(), reader()
    chunks = [source.read(frame) for frame in splitter.split(splitter.push(data))]
    return [chunk for chunk in chunks if chunk is not None], source.done


def fold(chunks: list[Json]) -> Json:
    whole = Fold()
    for chunk in chunks:
        whole.add(chunk)
    return whole.completion()


# -- laws --------------------------------------------------------------------------------------------------------------

PIECE = TEXT.filter(bool)
TOOL = st.tuples(PIECE, TEXT, st.lists(PIECE, max_size=3))


@st.composite
def answers(draw: st.DrawFn) -> list[Json]:
    """Chunks as llama-server sends them: the role, deltas of all kinds in any order, the finish, the usage."""
    chunks, calls = [delta(role="assistant", content=None)], 0
    for made in draw(st.lists(st.tuples(st.sampled_from(["content", "reasoning_content"]), TEXT) | TOOL, max_size=8)):
        if len(made) == 2:
            chunks.append(delta(**{made[0]: made[1]}))
        else:
            chunks.append(call(calls, "", id=made[0], name=made[1]))
            chunks += [call(calls, piece) for piece in made[2]]
            calls += 1
    chunks.append(delta(draw(st.sampled_from(["tool_calls" if calls else "stop", "length"]))))
    cached = draw(st.none() | st.integers(0, 12))
    details = {} if cached is None else {"prompt_tokens_details": {"cached_tokens": cached}}
    return [*chunks, {"choices": [], "usage": {**USAGE, **details}, "timings": {"predicted_n": 3}}]


def translated(pieces: list[bytes]) -> bytes:
    """The bytes for the client, of the bytes of an OpenAI-style server."""
    splitter, source, target = EventSplitter(), WIRE.reader(REQUEST), writer()
    out = b""
    for piece in pieces:
        for frame in splitter.split(splitter.push(piece)):
            chunk = source.read(frame)
            out += b"" if chunk is None else target.chunk(chunk)
    assert source.done and splitter.rest == b""
    return out + target.end()


@given(st.data(), answers())
@law(150)
def test_any_split_of_the_servers_bytes_gives_the_same_events(data: st.DataObject, chunks: list[Json]) -> None:
    stream = b"".join(b"data: %b\n\n" % orjson.dumps(chunk) for chunk in chunks) + b"data: [DONE]\n\n"
    assert translated(data.draw(splits(stream))) == translated([stream]) == written(*chunks)


@given(answers())
@law(150)
def test_what_was_written_reads_back_as_the_same_answer(chunks: list[Json]) -> None:
    back, done = read_back(written(*chunks))
    before, after = fold(chunks), fold(back)
    assert done
    if before["choices"][0]["message"].get("reasoning_content") == "":
        del before["choices"][0]["message"]["reasoning_content"]  # what was said to be empty is not said at all
    assert after["choices"] == before["choices"]
    assert after["usage"] == before["usage"]


@given(answers())
@law(150)
def test_blocks_follow_one_another_and_every_one_is_begun_and_ended(chunks: list[Json]) -> None:
    first, *blocks, summary, last = events(written(*chunks))
    assert [first["type"], summary["type"], last["type"]] == ["message_start", "message_delta", "message_stop"]
    opened, kind = -1, ""
    for event in blocks:
        match event["type"]:
            case "content_block_start":
                assert (kind, event["index"]) == ("", opened + 1)
                opened, kind = event["index"], event["content_block"]["type"]
            case "content_block_stop":
                assert kind and event["index"] == opened
                kind = ""
            case other:
                assert (other, event["index"]) == ("content_block_delta", opened) and kind
    assert kind == ""


# -- streams -----------------------------------------------------------------------------------------------------------


def test_whole_sequence_of_thinking_text_and_a_tool_call() -> None:
    found = events(
        written(
            delta(role="assistant", content=None),
            delta(reasoning_content="Hm"),
            delta(reasoning_content="."),
            delta(content="Hi"),
            call(0, "", id="t1", name="look"),
            call(0, '{"a":'),
            call(0, "1}"),
            delta("tool_calls"),
            {"choices": [], "usage": {**USAGE, "prompt_tokens_details": {"cached_tokens": 4}}},
        )
    )
    message = {
        **{"id": "msg_7", "type": "message", "role": "assistant", "content": [], "model": "asked"},
        **{"stop_reason": None, "stop_sequence": None, "usage": {"input_tokens": 2, "output_tokens": 0}},
    }
    use = {"type": "tool_use", "id": "t1", "name": "look", "input": {}}
    usage = {"input_tokens": 8, "cache_read_input_tokens": 4, "output_tokens": 3}
    start, step, stop = "content_block_start", "content_block_delta", "content_block_stop"
    assert found == [
        {"type": "message_start", "message": message},
        {"type": start, "index": 0, "content_block": {"type": "thinking", "thinking": "", "signature": ""}},
        {"type": step, "index": 0, "delta": {"type": "thinking_delta", "thinking": "Hm"}},
        {"type": step, "index": 0, "delta": {"type": "thinking_delta", "thinking": "."}},
        {"type": step, "index": 0, "delta": {"type": "signature_delta", "signature": ""}},
        {"type": stop, "index": 0},
        {"type": start, "index": 1, "content_block": {"type": "text", "text": ""}},
        {"type": step, "index": 1, "delta": {"type": "text_delta", "text": "Hi"}},
        {"type": stop, "index": 1},
        {"type": start, "index": 2, "content_block": use},
        {"type": step, "index": 2, "delta": {"type": "input_json_delta", "partial_json": '{"a":'}},
        {"type": step, "index": 2, "delta": {"type": "input_json_delta", "partial_json": "1}"}},
        {"type": stop, "index": 2},
        {"type": "message_delta", "delta": {"stop_reason": "tool_use", "stop_sequence": None}, "usage": usage},
        {"type": "message_stop"},
    ]


@pytest.mark.parametrize(
    ("finish", "called", "reason"),
    [
        ("stop", False, "end_turn"),
        ("length", False, "max_tokens"),
        ("length", True, "max_tokens"),
        ("tool_calls", True, "tool_use"),
        ("stop", True, "tool_use"),
        ("content_filter", False, "refusal"),
        ("something new", False, "end_turn"),
        (None, False, "end_turn"),
    ],
)
def test_reason_for_the_end_is_told_in_anthropics_words(finish: str | None, called: bool, reason: str) -> None:
    chunks = [*([call(0, "{}", id="t", name="f")] if called else []), delta(finish), delta(content="")]
    assert events(written(*chunks))[-2]["delta"]["stop_reason"] == reason
    assert orjson.loads(writer().reply(fold(chunks)))["stop_reason"] == reason


def test_answer_without_a_word_has_no_blocks() -> None:
    assert [event["type"] for event in events(written())] == ["message_start", "message_delta", "message_stop"]
    assert orjson.loads(writer().reply(Fold().completion()))["content"] == []


def test_first_chunk_is_told_at_once_and_the_end_waits_for_the_usage() -> None:
    target = writer()
    assert target.chunk(delta(role="assistant", content="")).startswith(b"event: message_start\n")
    assert target.chunk(delta(content="Hi")).count(b"event: ") == 2
    assert target.chunk(delta("stop")) == b""
    assert target.chunk({"choices": [], "usage": USAGE}) == b""
    assert events(target.end())[-2]["usage"] == {"input_tokens": 12, "output_tokens": 3}


def test_without_a_count_the_guess_for_the_input_stands() -> None:
    assert events(written(delta("stop", content="Hi")))[-2]["usage"] == {"input_tokens": 2, "output_tokens": 0}


def test_late_piece_of_a_tool_call_goes_to_its_own_block() -> None:
    chunks = [call(0, "{", id="a", name="f"), call(1, "{", id="b", name="g"), call(0, "}"), call(1, "}"), delta("stop")]
    pieces = [event for event in events(written(*chunks)) if event["type"] == "content_block_delta"]
    assert [(event["index"], event["delta"]["partial_json"]) for event in pieces] == [
        (0, "{"),
        (1, "{"),
        (0, "}"),
        (1, "}"),
    ]
    assert fold(read_back(written(*chunks))[0])["choices"][0]["message"] == fold(chunks)["choices"][0]["message"]


def test_tool_call_without_an_identity_gets_one() -> None:
    use = events(written(delta(tool_calls=[{"function": {"name": "f", "arguments": "{}"}}])))[1]["content_block"]
    assert use["id"].startswith("toolu_") and use["name"] == "f"


def test_error_is_an_event_in_anthropics_envelope_and_the_last_one() -> None:
    target = writer()
    target.chunk(delta(content="Hi"))
    (event,) = events(target.error(Overloaded("no room")))
    assert event == {"type": "error", "error": {"type": "overloaded_error", "message": "no room"}}


# -- whole answers -----------------------------------------------------------------------------------------------------


def test_reply_is_one_message_with_all_blocks() -> None:
    chunks = [
        delta(reasoning_content="Hm."),
        delta(content="Hi"),
        call(0, '{"a":1}', id="t1", name="look"),
        call(1, '{"a', id="t2", name="look"),
        delta("length"),
        {"choices": [], "usage": USAGE},
    ]
    assert orjson.loads(writer().reply(fold(chunks))) == {
        "id": "msg_7",
        "type": "message",
        "role": "assistant",
        "model": "asked",
        "content": [
            {"type": "thinking", "thinking": "Hm.", "signature": ""},
            {"type": "text", "text": "Hi"},
            {"type": "tool_use", "id": "t1", "name": "look", "input": {"a": 1}},
            {"type": "tool_use", "id": "t2", "name": "look", "input": {}},
        ],
        "stop_reason": "max_tokens",
        "stop_sequence": None,
        "usage": {"input_tokens": 12, "output_tokens": 3},
    }


# -- reading -----------------------------------------------------------------------------------------------------------


def stream(*found: Json) -> bytes:
    return b"".join(b"event: %b\ndata: %b\n\n" % (event["type"].encode(), orjson.dumps(event)) for event in found)


COUNTS = {"input_tokens": 7, "cache_read_input_tokens": 2, "cache_creation_input_tokens": 1, "output_tokens": 1}
START = {"type": "message_start", "message": {"id": "msg_1", "model": "m", "usage": COUNTS}}
THINK = [
    {"type": "content_block_start", "index": 0, "content_block": {"type": "thinking", "thinking": ""}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "Hm."}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "signature_delta", "signature": "S=="}},
    {"type": "content_block_stop", "index": 0},
]
MET = {
    "type": "message_delta",
    "delta": {"stop_reason": "stop_sequence", "stop_sequence": "END"},
    "usage": {"output_tokens": 5},
}
STOP = {"type": "message_stop"}


def test_what_chunks_cannot_say_passes_through_them() -> None:
    chunks, done = read_back(stream(START, {"type": "ping"}, *THINK, MET, STOP))
    assert done
    completion = fold(chunks)
    assert completion["choices"][0]["finish_reason"] == "stop"
    assert completion["usage"] == {
        **{"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    assert extensions_of(completion, "anthropic") == {
        "signature": "S==",
        "stop_reason": "stop_sequence",
        "stop_sequence": "END",
    }
    whole = orjson.loads(writer().reply(completion))
    assert whole["content"] == [{"type": "thinking", "thinking": "Hm.", "signature": "S=="}]
    assert (whole["stop_reason"], whole["stop_sequence"]) == ("stop_sequence", "END")
    again = events(written(*chunks))
    assert THINK[2] in again and again[-2]["delta"] == MET["delta"]


def test_stop_sequence_is_the_reason_also_where_the_server_says_that_the_turn_ended() -> None:
    ended = {**MET, "delta": {"stop_reason": "end_turn", "stop_sequence": "END"}}  # as llama-server does
    chunks, _ = read_back(stream(START, ended, STOP))
    assert events(written(*chunks))[-2]["delta"] == MET["delta"]


def test_signature_of_one_block_is_not_taken_for_that_of_the_next() -> None:
    unsigned = [{**event, "index": 1} for event in THINK if event is not THINK[2]]
    chunks, _ = read_back(stream(START, *THINK, {**THINK[0], "index": 1}, *unsigned[1:], MET, STOP))
    assert "signature" not in extensions_of(fold(chunks), "anthropic")


def test_blocks_that_begin_with_all_they_have_are_read_and_others_are_left_out() -> None:
    blocks: list[Json] = [
        {"type": "text", "text": "Hi"},
        {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
        {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}},
    ]
    starts = [{"type": "content_block_start", "index": at, "content_block": block} for at, block in enumerate(blocks)]
    foreign = {"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": "{"}}
    message = fold(read_back(stream(START, *starts, foreign, MET, STOP))[0])["choices"][0]["message"]
    function = {"name": "f", "arguments": '{"a":1}'}
    assert message == {
        "role": "assistant",
        "content": "Hi",
        "tool_calls": [{"id": "t", "type": "function", "function": function}],
    }


def test_stream_that_breaks_off_is_not_done() -> None:
    assert read_back(stream(START, *THINK, MET))[1] is False


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"busy"}}', "busy"),
        (b'event: error\ndata: {"error":{"code":500,"message":"broken"}}', "broken"),
        (b"event: message_stop\ndata: {", "the model server sent an event that cannot be understood"),
        (b"data: []", "the model server sent an event that cannot be understood"),
        (b'data: {"type":"message_start"}', "the model server sent an event that cannot be understood"),
    ],
)
def test_error_and_nonsense_of_a_server_are_its_failure(frame: bytes, message: str) -> None:
    with pytest.raises((UpstreamFailed, UpstreamRefused)) as raised:
        reader().read(frame)
    assert raised.value.message == message
