"""Laws of the Ollama dialect: a request comes back as it was, whatever fields it has, and an answer is the same however
its bytes are cut."""

from __future__ import annotations

import copy
from typing import Any

import orjson
from hypothesis import given
from hypothesis import strategies as st

from llama_smart_proxy.proxy.chat import Json, Timing, without_extensions
from llama_smart_proxy.proxy.dialects.base import ClientCodec
from llama_smart_proxy.proxy.dialects.ollama import CHAT, GENERATE, WIRE, OllamaWriter, fields
from llama_smart_proxy.proxy.dialects.ollama.options import SAMPLING
from tests.support.laws import JSON_VALUES, TEXT, law, splits, unknown_fields

KNOWN = {
    *fields.CHAT_FIELDS,
    *fields.GENERATE_FIELDS,
    *fields.MESSAGE_FIELDS,
    *fields.CALL_FIELDS,
    *fields.FUNCTION_FIELDS,
    *SAMPLING,
    *("num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "draft_num_predict", "use_mmap"),
}
INTEGERS = st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 50) | st.floats(-3, 50)
NUMBERS = INTEGERS | st.floats(allow_nan=False, allow_infinity=False)
IMAGES = st.lists(st.sampled_from(["QUJD", "iVBORw0KGgo=", "UklG\r\nRg==", "SUQz", ""]), max_size=3)
SCHEMAS = st.dictionaries(TEXT, JSON_VALUES, max_size=3)


def some(fields: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[Json]:
    """Objects with any of these fields, any of which may be null."""
    return st.fixed_dictionaries({}, optional={name: st.none() | values for name, values in fields.items()})


OPTIONS = some(
    {name: INTEGERS for name in ("top_k", "repeat_last_n", "seed", "num_predict", "num_keep", "num_ctx")}
    | {name: NUMBERS for name in ("temperature", "top_p", "min_p", "repeat_penalty", "presence_penalty")}
    | {"stop": st.lists(TEXT, max_size=2), "use_mmap": st.booleans(), "mirostat": JSON_VALUES}
)
CALLS = st.lists(
    st.builds(
        lambda call, function: {**call, "function": function},
        some({"id": st.sampled_from(["", "call_0", "call_1", "x"])}),
        some({"name": st.sampled_from(["f", "g"]), "index": st.integers(0, 3), "arguments": SCHEMAS}),
    ),
    max_size=3,
)
MESSAGES = st.lists(
    some(
        {
            "role": st.sampled_from(["user", "assistant", "tool", "system", "User", "other"]),
            "content": TEXT,
            "thinking": TEXT,
            "images": IMAGES,
            "tool_calls": CALLS,
            "tool_name": st.sampled_from(["", "f", "g"]),
            "tool_call_id": st.sampled_from(["", "call_0", "x"]),
        }
    ),
    max_size=5,
)
COMMON: dict[str, st.SearchStrategy[Any]] = {
    "model": TEXT,
    "stream": st.booleans(),
    "format": SCHEMAS | st.sampled_from(["json", ""]),
    "keep_alive": st.sampled_from(["5m", -1, 0, 2.5]),
    "options": OPTIONS,
    "think": st.booleans() | st.sampled_from(["low", "max"]),
    "truncate": st.booleans(),
    "shift": st.booleans(),
    "logprobs": st.booleans(),
    "top_logprobs": st.integers(0, 20),
}
CHATS = some(COMMON | {"messages": MESSAGES, "tools": st.lists(SCHEMAS, max_size=2)})
TEXTS = {name: TEXT for name in ("prompt", "suffix", "system", "template")}
GENERATES = some(
    COMMON | TEXTS | {"context": st.lists(st.integers(0, 9), max_size=3), "raw": st.booleans(), "images": IMAGES}
).filter(lambda body: not (body.get("raw") and any(body.get(name) for name in ("template", "system", "context"))))
BODIES = st.one_of(
    CHATS.flatmap(lambda body: unknown_fields(body, KNOWN)).map(lambda body: (CHAT, body)),
    GENERATES.flatmap(lambda body: unknown_fields(body, KNOWN)).map(lambda body: (GENERATE, body)),
)


@given(BODIES)
@law(600)
def test_a_request_comes_back_as_it_was(asked: tuple[ClientCodec, Json]) -> None:
    face, said = asked
    request = face.decode(copy.deepcopy(said))
    path = "/api/chat" if face is CHAT else "/api/generate"
    assert face.encode(request) == said
    assert WIRE.encode(copy.deepcopy(request)) == (path, {**said, "stream": True})


@given(BODIES)
@law(150)
def test_what_an_openai_style_server_gets_holds_nothing_it_does_not_know(asked: tuple[ClientCodec, Json]) -> None:
    face, said = asked
    body = without_extensions(face.decode(copy.deepcopy(said)).body)
    known = {"model", "messages", "prompt", "suffix", "tools", "response_format", "json_schema", "logprobs"}
    assert body.keys() <= known | {"top_logprobs", "chat_template_kwargs"} | set(SAMPLING.values())
    for message in body.get("messages", ()):
        assert message.keys() <= {"role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name"}
        for call in message.get("tool_calls", ()):
            assert (call.keys(), call["function"].keys()) == ({"id", "type", "function"}, {"name", "arguments"})
    assert "max_tokens" not in body or body["max_tokens"] >= 0
    assert body.get("repeat_last_n", 0) >= 0


@given(CHATS.flatmap(lambda body: unknown_fields(body, KNOWN)), TEXT)
@law(150)
def test_an_edited_text_goes_up_and_all_else_stays(said: Json, text: str) -> None:
    request = CHAT.decode(copy.deepcopy(said))
    for message in request.body["messages"]:
        message["content"] = text
    expected = copy.deepcopy(said)
    for before, after in zip(said.get("messages") or (), expected.get("messages") or (), strict=True):
        if text or before.get("content"):
            after["content"] = text
        if before.get("images"):
            del after["images"]
    assert CHAT.encode(request) == expected


WORDS = st.fixed_dictionaries({}, optional={"content": TEXT, "thinking": TEXT}).map(
    lambda words: {"role": "assistant", "content": "", **words}
)
LINES = st.lists(WORDS, max_size=6).map(
    lambda messages: [
        *({"model": "m", "created_at": "t", "message": message, "done": False} for message in messages),
        {"model": "m", "created_at": "t", "message": {"role": "assistant", "content": ""}, "done": True},
    ]
)


def written(pieces: list[bytes]) -> bytes:
    """What a client gets of these upstream bytes."""
    request = CHAT.decode({"model": "m"})
    splitter, reader = WIRE.splitter(), WIRE.reader(request)
    writer = OllamaWriter(request, Timing(0.0), chat=True, clock=lambda: 1.0, wall_ns=lambda: 0)
    frames = [frame for piece in pieces for frame in splitter.split(splitter.push(piece))]
    chunks = [chunk for frame in frames if (chunk := reader.read(frame)) is not None]
    return b"".join(map(writer.chunk, chunks)) + writer.end()


@given(LINES.flatmap(lambda lines: splits(b"".join(orjson.dumps(line) + b"\n" for line in lines))))
@law(300)
def test_an_answer_is_the_same_however_its_bytes_are_cut(pieces: list[bytes]) -> None:
    assert written(pieces) == written([b"".join(pieces)])
