"""Requests of the Ollama API: what they mean in OpenAI's shape, and what may be changed on the way."""

from __future__ import annotations

import base64
import copy
import math
from typing import Any

import pytest

from llama_smart_proxy.proxy.chat import ChatRequest, Json, extensions_of, without_extensions
from llama_smart_proxy.proxy.dialects.base import Loading
from llama_smart_proxy.proxy.dialects.ollama import CHAT, GENERATE, WIRE, as_text, keep_alive_s
from llama_smart_proxy.proxy.dialects.ollama.options import WHOLE_CONTEXT

ASK = [{"role": "user", "content": "hi"}]
PNG, JPEG = b"\x89PNG\r\n\x1a\n" + bytes(30), b"\xff\xd8\xff\xe0" + bytes(30)
WAV, MP3 = b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(20), b"ID3\x04" + bytes(30)
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1}}, "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA, "strict": True}}


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def chat(**fields: Any) -> ChatRequest:
    return CHAT.decode(copy.deepcopy({"model": "m", "messages": ASK, **fields}))


def generate(**fields: Any) -> ChatRequest:
    return GENERATE.decode(copy.deepcopy({"model": "m", "prompt": "hi", **fields}))


def meant(request: ChatRequest) -> Json:
    """All that an OpenAI-style server would get, but for the model."""
    return {key: value for key, value in without_extensions(request.body).items() if key != "model"}


# -- options -----------------------------------------------------------------------------------------------------------

ROWS: list[tuple[str, Any, Json]] = [
    ("temperature", 0, {"temperature": 0}),
    ("top_k", 40.7, {"top_k": 40}),
    ("top_k", -1, {"top_k": 0}),
    ("top_p", 0.9, {"top_p": 0.9}),
    ("min_p", 0.05, {"min_p": 0.05}),
    ("typical_p", 1.0, {"typical_p": 1.0}),
    ("repeat_last_n", 64, {"repeat_last_n": 64}),
    ("repeat_last_n", 0, {"repeat_last_n": 0}),
    ("repeat_last_n", -1, {"repeat_last_n": WHOLE_CONTEXT}),
    ("repeat_penalty", 1.1, {"repeat_penalty": 1.1}),
    ("presence_penalty", 0.5, {"presence_penalty": 0.5}),
    ("frequency_penalty", -0.5, {"frequency_penalty": -0.5}),
    ("seed", -1, {"seed": -1}),
    ("seed", 2**40, {"seed": 2**40}),
    ("stop", ["a", "b"], {"stop": ["a", "b"]}),
    ("num_predict", 7, {"max_tokens": 7}),
    ("num_predict", 0, {"max_tokens": 0}),
    ("num_predict", -1, {}),
    ("num_predict", -2, {}),
    ("num_predict", 2**40, {"max_tokens": 2**31 - 1}),
    ("num_keep", 4, {"n_keep": 4}),
    ("num_keep", -7, {"n_keep": -1}),
    *[(name, 8, {}) for name in ("num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "draft_num_predict")],
    ("use_mmap", False, {}),
    *[(name, "of any type", {}) for name in ("mirostat", "mirostat_tau", "tfs_z", "penalize_newline", "numa")],
    *[(name, [1], {}) for name in ("low_vram", "f16_kv", "use_mlock", "vocab_only", "logits_all", "new_one")],
    ("temperature", None, {}),
]


@pytest.mark.parametrize(("option", "value", "ours"), ROWS)
def test_an_option_becomes_what_llama_server_takes_and_comes_back_as_it_was(
    option: str, value: Any, ours: Json
) -> None:
    for face, body in ((CHAT, {"messages": ASK}), (GENERATE, {"prompt": "hi"})):
        said = {**body, "options": {option: value}}
        request = face.decode(copy.deepcopy(said))
        assert meant(request) == {"messages": ASK, **ours}
        assert face.encode(request) == said
    if not ours:
        assert extensions_of(request.body, "ollama")["options"] == {option: value}


def test_no_default_is_made_up() -> None:
    assert meant(chat()) == {"messages": ASK}
    assert meant(chat(options={})) == {"messages": ASK}
    assert meant(generate(options=None)) == {"messages": ASK}


def test_load_time_options_and_times_are_kept_for_those_who_schedule() -> None:
    request = chat(options={"num_ctx": 8192, "temperature": 1}, keep_alive="5m", truncate=False, shift=True)
    said = extensions_of(request.body, "ollama")
    assert said["options"] == {"num_ctx": 8192}
    assert (said["keep_alive"], said["truncate"], said["shift"]) == ("5m", False, True)


def test_an_option_that_is_changed_on_the_way_goes_up_changed() -> None:
    request = chat(options={"num_predict": -1, "repeat_last_n": -1, "num_ctx": 5, "top_k": 1.5, "seed": 3})
    request.body |= {"max_tokens": 9, "top_k": 7, "repeat_last_n": 2}
    del request.body["seed"]
    assert CHAT.encode(request)["options"] == {"num_predict": 9, "repeat_last_n": 2, "num_ctx": 5, "top_k": 7}


# -- other fields ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "ours"),
    [
        ("json", {"type": "json_object"}),
        (SCHEMA, {"type": "json_schema", "json_schema": {"name": "schema", "schema": SCHEMA}}),
        ("", None),
        (None, None),
    ],
)
def test_format_becomes_response_format(value: Any, ours: Json | None) -> None:
    request = chat(format=value)
    assert request.body.get("response_format") == ours
    assert CHAT.encode(request)["format"] == value
    schema = {"json_schema": {} if value == "json" else value} if ours else {}
    text = generate(format=value, raw=True)
    assert meant(text) == {"prompt": "hi", **schema}
    assert GENERATE.encode(text)["format"] == value


@pytest.mark.parametrize(
    ("value", "ours"),
    [
        (True, {"enable_thinking": True}),
        (False, {"enable_thinking": False}),
        *[(level, {"enable_thinking": True, "reasoning_effort": level}) for level in ("low", "medium", "high", "max")],
        (None, None),
    ],
)
def test_think_becomes_variables_of_the_template(value: Any, ours: Json | None) -> None:
    for request in (chat(think=value), generate(think=value)):
        assert request.body.get("chat_template_kwargs") == ours


@pytest.mark.parametrize(("said", "ours"), [({}, 1), ({"top_logprobs": 0}, 1), ({"top_logprobs": 5}, 5)])
def test_llama_server_is_asked_for_one_alternative_at_least(said: Json, ours: int) -> None:
    assert meant(chat(logprobs=True, **said)) == {"messages": ASK, "logprobs": True, "top_logprobs": ours}
    assert meant(generate(logprobs=True, raw=True, **said)) == {"prompt": "hi", "logprobs": ours}
    assert meant(chat(logprobs=False, **said)) == {"messages": ASK}


def test_stream_is_the_default() -> None:
    assert [chat().stream, chat(stream=None).stream, chat(stream=True).stream] == [True] * 3
    assert not generate(stream=False).stream


def test_names_of_fields_are_taken_in_any_case_as_go_does() -> None:
    request = CHAT.decode({"Model": "m", "MESSAGES": [{"Role": "User", "CONTENT": "hi", "x": 1}], "\u017ftream": False})
    assert (request.model, request.stream, without_extensions(request.body)["messages"]) == ("m", False, ASK)
    body = {"model": "m", "messages": [{"role": "User", "content": "hi", "x": 1}], "stream": False}
    assert CHAT.encode(request) == body


def test_tools_pass_whole() -> None:
    request = chat(tools=[TOOL])
    assert request.body["tools"] == [TOOL]
    assert WIRE.encode(request)[1]["tools"] == [TOOL]
    assert "tools" not in chat(tools=[]).body


# -- messages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (PNG, "data:image/png;base64,"),
        (JPEG, "data:image/jpeg;base64,"),
        (b"GIF89a" + bytes(9), "data:image/gif;base64,"),
        (b"RIFF\x24\x00\x00\x00WEBPVP8 ", "data:image/webp;base64,"),
        (b"BM" + bytes(20), "data:image/bmp;base64,"),
        (b"?", "data:image/jpeg;base64,"),
    ],
)
def test_an_image_becomes_a_data_url_of_its_type(data: bytes, part: str) -> None:
    shown = {"type": "image_url", "image_url": {"url": part + b64(data)}}
    message = {"role": "user", "content": "what is it?", "images": [b64(data)]}
    content = [{"type": "text", "text": "what is it?"}, shown]
    assert chat(messages=[message]).body["messages"] == [{"role": "user", "content": content}]
    assert generate(prompt="", images=[b64(data)]).body["messages"] == [{"role": "user", "content": [shown]}]


def test_sound_among_the_images_becomes_a_part_of_its_own() -> None:
    for data, form in ((WAV, "wav"), (MP3, "mp3"), (b"\xff\xfb\x90" + bytes(9), "mp3")):
        request = generate(images=[b64(data)])
        heard = {"type": "input_audio", "input_audio": {"data": b64(data), "format": form}}
        assert request.body["messages"][0]["content"][1] == heard
        assert GENERATE.encode(request)["images"] == [b64(data)]


def test_line_ends_in_base64_are_left_out_and_come_back() -> None:
    wrapped = b64(PNG)[:8] + "\r\n" + b64(PNG)[8:]
    request = generate(images=[wrapped])
    assert request.body["messages"][0]["content"][1]["image_url"]["url"] == "data:image/png;base64," + b64(PNG)
    assert GENERATE.encode(request)["images"] == [wrapped]


def call(arguments: Any, **more: Any) -> Json:
    return {"function": {"name": "look", "arguments": arguments}, **more}


def test_calls_without_ids_get_the_same_ones_each_time_and_results_find_them() -> None:
    messages = [
        {"role": "assistant", "tool_calls": [call({"at": "Łódź"}), call({}), {"function": {"name": "read"}}]},
        {"role": "tool", "content": "a book", "tool_name": "read"},
        {"role": "tool", "content": "fog", "tool_name": "look"},
        {"role": "tool", "content": "sun"},
        {"role": "assistant", "content": "", "thinking": "Hm.", "tool_calls": [call({"at": "here"}, id="mine")]},
        {"role": "tool", "content": "rain", "tool_call_id": "mine"},
    ]
    request = chat(messages=messages)
    first, *results, second, last = without_extensions(request.body["messages"])
    assert [item["id"] for item in first["tool_calls"]] == ["call00000", "call00001", "call00002"]
    assert first["tool_calls"][0]["type"] == "function"
    assert first["tool_calls"][0]["function"] == {"name": "look", "arguments": '{"at":"Łódź"}'}
    assert [(item["tool_call_id"], item["name"]) for item in results] == [
        ("call00002", "read"),
        ("call00000", "look"),
        ("call00001", "look"),
    ]
    assert (second["reasoning_content"], second["tool_calls"][0]["id"]) == ("Hm.", "mine")
    assert last == {"role": "tool", "content": "rain", "tool_call_id": "mine", "name": "look"}
    assert CHAT.encode(request)["messages"] == messages
    longer = chat(messages=[*messages, *ASK])
    assert without_extensions(longer.body["messages"][:-1]) == without_extensions(request.body["messages"])


def test_ids_that_are_made_are_nine_letters_and_digits_and_those_of_results_follow_their_calls() -> None:
    """Mistral's chat templates accept no others. Some clients leave out the ids of calls, but not those of results."""
    calls = [call({}), call({}), {"function": {"name": "read"}}]
    messages = [
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "content": "1", "tool_name": "read", "tool_call_id": "lost-3"},
        {"role": "tool", "content": "2", "tool_call_id": "lost-1"},
        {"role": "tool", "content": "3", "tool_name": "renamed"},
        {"role": "assistant", "tool_calls": [call({}, id="call00003"), call({})]},
        {"role": "tool", "content": "4", "tool_name": "look"},
        {"role": "tool", "content": "5"},
        {"role": "tool", "content": "too many"},
    ]
    request = chat(messages=messages)
    first, *found = request.body["messages"]
    made = [item["id"] for item in first["tool_calls"]]
    assert all(len(one) == 9 and one.isalnum() for one in made)
    assert [item["tool_call_id"] for item in found[:3]] == [made[2], made[0], made[1]]
    again = [item["id"] for item in found[3]["tool_calls"]]
    assert again[0] == "call00003" and again[1] not in [*made, again[0]] and len(again[1]) == 9
    assert [item.get("tool_call_id") for item in found[4:]] == [*again, None]
    assert CHAT.encode(request)["messages"] == messages, "an Ollama gets what was sent"


def test_a_message_without_a_role_is_a_users() -> None:
    messages = [{"content": "hi"}, {"role": None, "content": "you"}, {"role": "", "content": "there"}]
    request = chat(messages=messages)
    assert [message["role"] for message in request.body["messages"]] == ["user"] * 3
    assert CHAT.encode(request)["messages"] == messages, "an Ollama gets what was sent"


def test_a_message_that_is_changed_goes_up_changed_and_keeps_its_other_fields() -> None:
    messages = [
        {"role": "system", "content": "Be brief.", "cache": {"ttl": 1}},
        {"role": "user", "content": "secret", "images": [b64(PNG)], "x": 1},
        {"role": "assistant", "tool_calls": [call({"at": "secret"}, y=2)]},
        {"role": "tool", "content": "secret"},
    ]
    request = chat(messages=messages, options={"num_ctx": 8})
    _, asked, called, told = request.body["messages"]
    asked["content"][0]["text"] = told["content"] = "***"
    called["tool_calls"][0]["function"]["arguments"] = '{"at":"***"}'
    request.body["messages"].insert(1, {"role": "system", "content": "Rhyme."})
    assert CHAT.encode(request)["messages"] == [
        messages[0],
        {"role": "system", "content": "Rhyme."},
        {"role": "user", "content": "***", "images": [b64(PNG)], "x": 1},
        {"role": "assistant", "tool_calls": [call({"at": "***"}, y=2)]},
        {"role": "tool", "content": "***"},
    ]
    assert WIRE.encode(request) == ("/api/chat", {**CHAT.encode(request), "stream": True})


# -- generate ----------------------------------------------------------------------------------------------------------


def test_generate_is_a_chat_of_one_question() -> None:
    said = {"system": "Be brief.", "template": "{{ .Prompt }}", "context": [1, 2]}
    request = generate(**said)
    assert meant(request) == {"messages": [{"role": "system", "content": "Be brief."}, *ASK]}
    assert extensions_of(request.body, "ollama")["context"] == [1, 2]
    assert WIRE.encode(request) == ("/api/generate", {"model": "m", "prompt": "hi", "stream": True, **said})


def test_raw_and_suffix_are_texts_to_be_continued() -> None:
    raw, middle, both = generate(raw=True), generate(suffix="end"), generate(suffix="end", raw=True)
    assert [meant(raw), meant(middle), meant(both)] == [
        {"prompt": "hi"},
        {"prompt": "hi", "suffix": "end"},
        {"prompt": "hi"},
    ]
    assert all(request.is_text for request in (raw, middle, both))
    for request, said in ((raw, {"raw": True}), (middle, {"suffix": "end"}), (both, {"suffix": "end", "raw": True})):
        assert WIRE.encode(request) == ("/api/generate", {"model": "m", "prompt": "hi", "stream": True, **said})


def test_a_question_that_became_a_longer_chat_goes_to_chat() -> None:
    request = generate(template="t", keep_alive=3, options={"num_ctx": 8})
    request.body["messages"] += [{"role": "assistant", "content": "yes"}, {"role": "user", "content": "more"}]
    path, body = WIRE.encode(request)
    assert (path, body.pop("messages")[0]) == ("/api/chat", ASK[0])
    assert body == {"model": "m", "stream": True, "keep_alive": 3, "options": {"num_ctx": 8}}


def test_a_question_put_into_its_template_is_asked_for_with_the_same_limits() -> None:
    request = generate(format=SCHEMA, logprobs=True, top_logprobs=3, think=True, options={"top_k": 1}, stream=False)
    text = as_text(request, "<user>hi")
    assert meant(text) == {"prompt": "<user>hi", "json_schema": SCHEMA, "logprobs": 3, "top_k": 1}
    assert (text.is_text, text.stream, text.model) == (True, False, "m")


@pytest.mark.parametrize(
    ("body", "chat_loads", "generate_loads"),
    [
        ({}, True, True),
        ({"messages": [], "prompt": ""}, True, True),
        ({"messages": ASK, "prompt": "hi"}, False, False),
        ({"messages": None, "suffix": "x"}, True, False),
        ({"messages": [], "images": ["QQ=="]}, True, False),
        ({"messages": [], "context": [1]}, True, True),
    ],
)
def test_an_empty_request_only_loads(body: Json, chat_loads: bool, generate_loads: bool) -> None:
    assert (CHAT.loading(body) is not None) is chat_loads
    assert (GENERATE.loading(body) is not None) is generate_loads


def test_the_answer_to_a_load_is_one_whole_object() -> None:
    reply = CHAT.load_reply("m", Loading.LOAD)
    assert reply.pop("created_at").endswith("Z")
    empty = {"role": "assistant", "content": ""}
    assert reply == {"model": "m", "message": empty, "done": True, "done_reason": "load"}
    assert GENERATE.load_reply("m", Loading.UNLOAD)["response"] == ""


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        *[(0, 0), ("0", 0), ("0s", 0), ("-0s", 0), (-0.0, 0), (300, 300), (0.5, 0.5), ("500ms", 0.5), ("5m", 300)],
        *[("1h30m", 5400), ("+1.5h", 5400), (".5s", 0.5), ("1.s", 1), ("3us", 3e-6), ("3\u00b5s", 3e-6)],
        *[(-1, math.inf), (-0.1, math.inf), ("-1m", math.inf), ("-1ns", math.inf), (1e30, math.inf)],
    ],
)
def test_keep_alive_is_seconds_or_a_go_duration(value: object, seconds: float | None) -> None:
    assert keep_alive_s(value) == (seconds if seconds is None else pytest.approx(seconds))
