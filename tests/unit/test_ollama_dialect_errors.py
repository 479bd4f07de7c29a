"""What Ollama clients are told when a request cannot mean anything: Ollama's own words, and always status 400."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.dialects import OLLAMA
from llama_smart_proxy.proxy.dialects.base import ClientCodec
from llama_smart_proxy.proxy.dialects.ollama import CHAT, GENERATE, keep_alive_s
from llama_smart_proxy.proxy.errors import BadRequest

QUESTION = {"role": "user", "content": "hi"}
LEVELS = '"high", "medium", "low", "max", true, or false'
CANNOT = "json: cannot unmarshal"

BOTH: list[tuple[Json, str]] = [
    *[
        ({"options": {name: value}}, f'option "{name}" must be of type float32')
        for name in ("temperature", "top_p", "min_p", "typical_p", "repeat_penalty")
        for value in ("hot", True, [1])
    ],
    *[
        ({"options": {name: "8"}}, f'option "{name}" must be of type integer')
        for name in ("top_k", "num_predict", "num_keep", "seed", "repeat_last_n", "num_ctx", "num_gpu", "num_thread")
    ],
    ({"options": {"use_mmap": 1}}, 'option "use_mmap" must be of type boolean'),
    ({"options": {"stop": "x"}}, 'option "stop" must be of type array'),
    ({"options": {"stop": ["x", 1]}}, 'option "stop" must be of an array of strings'),
    ({"options": []}, f"{CANNOT} array into Go struct field REQUEST.options of type map[string]interface {{}}"),
    ({"model": 5}, f"{CANNOT} number into Go struct field REQUEST.model of type string"),
    ({"stream": "no"}, f"{CANNOT} string into Go struct field REQUEST.stream of type bool"),
    ({"truncate": 1}, f"{CANNOT} number into Go struct field REQUEST.truncate of type bool"),
    ({"top_logprobs": "3"}, f"{CANNOT} string into Go struct field REQUEST.top_logprobs of type int"),
    ({"top_logprobs": 1.5}, f"{CANNOT} number 1.5 into Go struct field REQUEST.top_logprobs of type int"),
    ({"top_logprobs": 21}, "top_logprobs must be between 0 and 20"),
    ({"top_logprobs": -1}, "top_logprobs must be between 0 and 20"),
    ({"think": "loud"}, f'invalid think value: "loud" (must be {LEVELS})'),
    ({"think": 1}, f"think must be a boolean or string ({LEVELS})"),
    ({"format": "yaml"}, 'invalid format: "\\"yaml\\""; expected "json" or a valid JSON Schema object'),
    ({"format": [1]}, 'invalid format: "[1]"; expected "json" or a valid JSON Schema object'),
    ({"format": False}, 'invalid format: "false"; expected "json" or a valid JSON Schema object'),
    ({"keep_alive": "60"}, 'time: missing unit in duration "60"'),
    ({"keep_alive": True}, "Unsupported type: 'bool'"),
    ({"Model": "a", "model": "b"}, 'the field "model" appears twice, in different case'),
]

MESSAGES = "Go struct field ChatRequest.messages"
CHAT_ONLY: list[tuple[Json, str]] = [
    ({"messages": {}}, f"{CANNOT} object into {MESSAGES} of type []api.Message"),
    ({"messages": ["hi"]}, f"{CANNOT} string into {MESSAGES} of type api.Message"),
    ({"messages": [None]}, f"{CANNOT} null into {MESSAGES} of type api.Message"),
    ({"messages": [{"content": [1]}]}, f"{CANNOT} array into {MESSAGES}.content of type string"),
    ({"messages": [{"role": 1}]}, f"{CANNOT} number into {MESSAGES}.role of type string"),
    ({"messages": [{"thinking": True}]}, f"{CANNOT} bool into {MESSAGES}.thinking of type string"),
    ({"messages": [{"images": "QQ=="}]}, f"{CANNOT} string into {MESSAGES}.images of type []api.ImageData"),
    ({"messages": [{"images": [1]}]}, f"{CANNOT} number into {MESSAGES}.images of type api.ImageData"),
    ({"messages": [{"images": ["data:image/png;base64,QQ=="]}]}, "illegal base64 data at input byte 4"),
    ({"messages": [{"images": ["QQQ"]}]}, "illegal base64 data at input byte 3"),
    ({"messages": [{"images": ["\u017f\u017f\u017f\u017f"]}]}, "illegal base64 data at input byte 0"),
    ({"messages": [{"tool_calls": [1]}]}, f"{CANNOT} number into {MESSAGES}.tool_calls of type api.ToolCall"),
    (
        {"messages": [{"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]},
        f"{CANNOT} string into {MESSAGES}.tool_calls.function.arguments of type api.ToolCallFunctionArguments",
    ),
    (
        {"messages": [{"tool_calls": [{}]}]},
        f"{CANNOT} null into {MESSAGES}.tool_calls.function of type api.ToolCallFunction",
    ),
    ({"tools": {}}, f"{CANNOT} object into Go struct field ChatRequest.tools of type api.Tools"),
    ({"tools": ["look"]}, f"{CANNOT} string into Go struct field ChatRequest.tools of type api.Tool"),
]

RAW = "raw mode does not support template, system, or context"
GENERATE_ONLY: list[tuple[Json, str]] = [
    ({"raw": True, "template": "t"}, RAW),
    ({"raw": True, "system": "s"}, RAW),
    ({"raw": True, "context": [1]}, RAW),
    ({"prompt": ["hi"]}, f"{CANNOT} array into Go struct field GenerateRequest.prompt of type string"),
    ({"suffix": 1}, f"{CANNOT} number into Go struct field GenerateRequest.suffix of type string"),
    ({"context": "x"}, f"{CANNOT} string into Go struct field GenerateRequest.context of type []int"),
    ({"images": ["*"]}, "illegal base64 data at input byte 0"),
    ({"images": ["*"], "raw": True}, "illegal base64 data at input byte 0"),
]


def refusal(face: ClientCodec, body: Json) -> BadRequest:
    with pytest.raises(BadRequest) as refused:
        face.decode(body)
    return refused.value


@pytest.mark.parametrize(("body", "text"), BOTH)
def test_a_field_of_both_endpoints_is_refused_in_ollamas_words(body: Json, text: str) -> None:
    for face, question, struct in (
        (CHAT, {"messages": [QUESTION]}, "ChatRequest"),
        (GENERATE, {"prompt": "hi"}, "GenerateRequest"),
    ):
        error = refusal(face, {**question, **body})
        assert (error.status, error.message) == (400, text.replace("REQUEST", struct))


@pytest.mark.parametrize(
    ("face", "body", "text"), [(CHAT, *row) for row in CHAT_ONLY] + [(GENERATE, *row) for row in GENERATE_ONLY]
)
def test_a_field_of_one_endpoint_is_refused_in_ollamas_words(face: ClientCodec, body: Json, text: str) -> None:
    error = refusal(face, body)
    assert (error.status, error.message) == (400, text)
    assert b'{"error":"' in OLLAMA.error_body(error)


@pytest.mark.parametrize("text", ["\ud800", 2**70])
def test_arguments_that_json_cannot_carry_are_refused(text: Any) -> None:
    calls = [{"function": {"name": "f", "arguments": {"a": text}}}]
    assert refusal(CHAT, {"messages": [{"role": "assistant", "tool_calls": calls}]}).status == 400


def test_raw_mode_takes_empty_fields() -> None:
    GENERATE.decode({"prompt": "hi", "raw": True, "template": "", "system": None, "context": []})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("60", 'time: missing unit in duration "60"'),
        ("1h30", 'time: missing unit in duration "1h30"'),
        ("5d", 'time: unknown unit "d" in duration "5d"'),
        ("", 'time: invalid duration ""'),
        ("-", 'time: invalid duration "-"'),
        ("m5", 'time: invalid duration "m5"'),
        ("5m ", 'time: unknown unit "m " in duration "5m "'),
        ("\u0663s", 'time: invalid duration "\u0663s"'),
        ("300000000h", 'time: invalid duration "300000000h"'),
        (True, "Unsupported type: 'bool'"),
        ([5], "Unsupported type: '[]interface {}'"),
        ({"s": 5}, "Unsupported type: 'map[string]interface {}'"),
    ],
)
def test_a_keep_alive_that_is_no_time_is_refused(value: object, text: str) -> None:
    with pytest.raises(BadRequest) as refused:
        keep_alive_s(value)
    assert (refused.value.status, refused.value.message) == (400, text)


def test_a_large_image_is_checked_to_its_end() -> None:
    good = base64.b64encode(bytes(3_000_000)).decode()
    GENERATE.decode({"prompt": "hi", "images": [good]})
    error = refusal(GENERATE, {"prompt": "hi", "images": [good[:-1] + "*"]})
    assert error.message == "illegal base64 data at input byte 3999999"
