"""JSON that two parsers could read differently is refused with status 400, and the rest passes unchanged, but for texts
that are not valid Unicode."""

from __future__ import annotations

import gzip
import json
import zlib

import pytest

from tests.support import toxic
from tests.support.harness import Proxy
from tests.support.laws import same
from tests.support.raw_client import post
from tests.support.stages import Stage
from tests.support.toxic import RawUpstream

CHAT = "/v1/chat/completions"


def with_model(more: bytes) -> bytes:
    return b'{"model":"m",' + more + b"}"


BAD_JSON: dict[str, bytes] = {
    "empty": b"",
    "blank": b" \r\n\t ",
    "nested 100 000 lists deep": with_model(b'"x":' + b"[" * 100_000 + b"]" * 100_000),
    "nested 100 000 objects deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "nested 100 000 deep and never closed": b'{"model":"m","x":' + b"[" * 100_000,
    "nested 600 deep": with_model(b'"x":' + b"[" * 600 + b"]" * 600),
    "integer of 5000 digits": with_model(b'"seed":' + b"9" * 5000),
    "integer of 65 bits": with_model(b'"seed":36893488147419103232'),
    "NaN": with_model(b'"temperature":NaN'),
    "Infinity": with_model(b'"temperature":Infinity'),
    "-Infinity": with_model(b'"temperature":-Infinity'),
    "1e999": with_model(b'"temperature":1e999'),
    "-1e999": with_model(b'"temperature":-1e999'),
    "hexadecimal": with_model(b'"seed":0x10'),
    "leading zero": with_model(b'"seed":010'),
    "lone surrogate in a key": with_model(b'"\\ud800":1'),
    "lone surrogate in a key deep inside": with_model(b'"tools":[{"function":{"a\\uDC00":{}}}]'),
    "bad UTF-8 in a key": with_model(b'"messages":[{"role":"user","conten\xff":"x"}]'),
    "surrogate pair in a key that is cut": with_model(b'"\\ud83d \\ude00":1'),
    "lone surrogate in the model's name": b'{"model":"m\\ud800"}',
    "bad UTF-8 in the model's name": b'{"model":"m\xff"}',
    "bad UTF-8 in an escape": with_model(b'"user":"\\\xff"'),
    "bad UTF-8 behind it": with_model(b'"user":"x"') + b"\xff",
    "bad UTF-8 between values": with_model(b'"user":"x",\xc3"stop":1'),
    "UTF-16 with BOM": json.dumps({"model": "m"}).encode("utf-16"),
    "UTF-16 without BOM": json.dumps({"model": "m"}).encode("utf-16-le"),
    "UTF-32": json.dumps({"model": "m"}).encode("utf-32"),
    "UTF-8 BOM alone": b"\xef\xbb\xbf",
    "UTF-8 BOM and white space": b"\xef\xbb\xbf \r\n",
    "two UTF-8 BOMs": b"\xef\xbb\xbf\xef\xbb\xbf" + b'{"model":"m"}',
    "UTF-8 BOM behind white space": b" \xef\xbb\xbf" + b'{"model":"m"}',
    "UTF-8 BOM at the end": b'{"model":"m"}\xef\xbb\xbf',
    "half a UTF-8 BOM": b"\xef\xbb" + b'{"model":"m"}',
    "duplicate key": b'{"model":"m","model":"other"}',
    "duplicate key by escape": b'{"model":"m","mod\\u0065l":"other"}',
    "duplicate key deep inside": with_model(b'"a":[{"b":{"c":1,"c":2}}]'),
    "keys that differ in case": b'{"model":"m","MODEL":"other"}',
    "keys that differ in case by escape": b'{"model":"m","\\u004dodel":"other"}',
    "keys that differ in case for Unicode": b'{"model":"m","stop":"x","\xc5\xbftop":"y"}',
    "list": b'[{"model":"m"}]',
    "string": b'"m"',
    "number": b"1",
    "null": b"null",
    "two objects": b'{"model":"m"}{"model":"m"}',
    "something after it": b'{"model":"m"} x',
    "trailing comma": b'{"model":"m",}',
    "single quotes": b"{'model':'m'}",
    "comment": b'{"model":"m"/* x */}',
    "control character in a string": b'{"model":"m","user":"a\nb"}',
    "NUL in a string": b'{"model":"m","user":"a\x00b"}',
    "cut short": b'{"model":"m","user":"a',
    "not JSON": b"model=m&stream=true",
    "model: number": b'{"model":1}',
    "model: true": b'{"model":true}',
    "model: list": b'{"model":["m"]}',
    "model: object": b'{"model":{"id":"m"}}',
}
WRONG_MODEL: dict[str, bytes] = {
    "model: null": b'{"model":null}',
    "model: false": b'{"model":false}',
    "model: 0": b'{"model":0}',
    "model: empty": b'{"model":""}',
    "model: empty list": b'{"model":[]}',
    "model: missing": b"{}",
}


@pytest.mark.parametrize("body", [pytest.param(body, id=name) for name, body in (BAD_JSON | WRONG_MODEL).items()])
async def test_ambiguous_json_is_a_400_that_never_reaches_the_model(
    proxy: Proxy, upstream: RawUpstream, body: bytes
) -> None:
    answer = await post(proxy.port, CHAT, body)
    assert answer.status == 400, answer
    assert answer.header("content-type") == "application/json; charset=utf-8" or "json" in str(
        answer.header("content-type")
    )
    error = answer.error
    assert error["type"] == "invalid_request_error" and error["message"] and error["code"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) < 300
    assert upstream.received == b""


async def test_lone_surrogate_in_the_model_name_is_told_as_json(proxy: Proxy, upstream: RawUpstream) -> None:
    answer = await post(proxy.port, CHAT, b'{"model":"\\ud800"}')
    assert answer.status == 400 and answer.error["param"] == "model", answer
    assert upstream.received == b""


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses", "/completion", "/tokenize", "/models/load"])
async def test_every_endpoint_answers_bad_json_in_its_own_words(proxy: Proxy, path: str) -> None:
    answer = await post(proxy.port, path, b'{"model":"m","model":"n"}')
    assert answer.status == 400
    assert "twice" in answer.error["message"]
    assert (answer.json().get("type") == "error") == (path == "/v1/messages")


async def test_unknown_fields_reach_the_model_server_as_they_are(proxy: Proxy, upstream: RawUpstream) -> None:
    upstream.script = toxic.plain(b"{}")
    body = {
        "model": "m",
        "x_top": {"deep": [1, 1.0, None, True, {"ü": "\u2028"}]},
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi", "x_part": 0.1}], "x_message": []}],
        "id_slot": 3,
        "return_progress": True,
    }
    answer = await post(proxy.port, CHAT, body)
    assert answer.status == 200
    assert same(upstream.requests[0].json(), body)


BOM = b"\xef\xbb\xbf"
MARKED: dict[str, bytes] = {
    "compact": BOM + b'{"model":"m","n":1}',
    "spaced": BOM + b'{"model": "m", "n": 1}',
    "behind it white space": BOM + b'\r\n\t {"model":"m","n":1}\r\n',
    "and a mark in a text": BOM + '{"model":"m","user":"\ufeff"}'.encode(),
}


@pytest.mark.parametrize("name", MARKED)
async def test_a_byte_order_mark_before_the_body_is_ignored(proxy: Proxy, upstream: RawUpstream, name: str) -> None:
    upstream.script = toxic.plain(b"{}")
    assert (await post(proxy.port, CHAT, MARKED[name])).status == 200
    assert upstream.requests[0].json() == json.loads(MARKED[name].decode("utf-8-sig"))
    assert upstream.requests[0].body.startswith(b"{")


FFFD = "\ufffd"
CUT: dict[str, tuple[bytes, str]] = {
    "high surrogate": (b"a\\ud83d", f"a{FFFD}"),
    "low surrogate": (b"a\\uDE00b", f"a{FFFD}b"),
    "pair the wrong way round": (b"\\ude00\\ud83d", FFFD * 2),
    "high before a pair": (b"\\ud83d\\ud83d\\ude00", f"{FFFD}\U0001f600"),
    "pair with a text between": (b"\\ud83d-\\ude00", f"{FFFD}-{FFFD}"),
    "high before another escape": (b"\\ud800\\u0041\\n", f"{FFFD}A\n"),
    "escaped backslash before the escape": (b"\\\\\\ud83d", f"\\{FFFD}"),
    "no escape at all": (b"\\\\ud83d", "\\ud83d"),
    "whole pair": (b"\\ud83d\\ude00", "\U0001f600"),
    "raw surrogate": (b"\xed\xa0\x80", FFFD * 3),
    "raw pair of surrogates": (b"\xed\xa0\xbd\xed\xb8\x80", FFFD * 6),
    "escaped high and raw low": (b"\\ud83d\xed\xb8\x80", FFFD * 4),
    "Latin-1": (b"caf\xe9 au lait", f"caf{FFFD} au lait"),
    "no UTF-8 at all": (b"\xff\xfe", FFFD * 2),
    "cut emoji": (b"ok \xf0\x9f\x98", f"ok {FFFD}"),
    "cut emoji and a whole one": ("\U0001f600".encode()[:2] + "\U0001f600".encode(), f"{FFFD}\U0001f600"),
    "overlong": (b"\xc0\xaf", FFFD * 2),
    "beyond Unicode": (b"\xf5\x80\x80\x80", FFFD * 4),
    "U+FFFD itself": (FFFD.encode(), FFFD),
}
"""In JSON, and what it means: as many U+FFFD as the Unicode standard (3.9) recommends."""
PLACES: dict[str, bytes] = {
    "message": b'"messages":[{"role":"user","content":"%b"}]',
    "prompt": b'"prompt":"%b"',
    "prompts": b'"prompt":["x","%b"]',
    "input": b'"input":["%b"]',
    "content part": b'"messages":[{"role":"user","content":[{"type":"text","text":"%b"}]}]',
    "tool result": b'"messages":[{"role":"tool","tool_call_id":"1","content":"%b"}]',
    "an object in an object": b'"metadata":{"a":{"b":["%b"]}}',
    "description of a tool": b'"tools":[{"function":{"name":"f","description":"%b"}}]',
    "user": b'"user":"%b"',
}


@pytest.mark.parametrize("place", PLACES)
async def test_a_text_that_is_cut_or_broken_reaches_the_model_server_as_valid_utf_8(
    proxy: Proxy, upstream: RawUpstream, place: str
) -> None:
    upstream.script = toxic.plain(b"{}")
    for spaces in (b"", b" "):
        for wire, meant in CUT.values():
            body = with_model(spaces + PLACES[place] % wire)
            assert (await post(proxy.port, CHAT, body)).status == 200, body
            sent = upstream.requests[-1].body.decode()  # strictly
            valid = with_model(PLACES[place] % json.dumps(meant)[1:-1].encode())
            assert json.loads(sent) == json.loads(valid)


async def test_a_large_text_that_is_cut_is_repaired_beside_the_loop(proxy: Proxy, upstream: RawUpstream) -> None:
    upstream.script = toxic.plain(b"{}")
    assert (await post(proxy.port, CHAT, with_model(b'"prompt":"' + b"x" * 200_000 + b'\\ud83d"'))).status == 200
    assert upstream.requests[0].json()["prompt"] == "x" * 200_000 + FFFD


@pytest.mark.parametrize("model", ["local", "distant"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/api/chat"])
async def test_a_cut_emoji_fails_no_chat_in_any_api(stage: Stage, model: str, path: str) -> None:
    cut = {"role": "user", "content": "look: \ud83d"}
    body = {"model": model, "max_tokens": 8, "stream": False, "messages": [cut]}
    answer = await post(stage.proxy.port, path, json.dumps(body).encode())
    assert answer.status == 200, answer


@pytest.mark.parametrize("arguments", [r'{"a": "\ud83d"}', r'{"a": "\\\ude00"}', {"a": "\ud83d"}])
async def test_a_cut_emoji_in_the_arguments_of_a_call_does_not_fail_the_chat(stage: Stage, arguments: object) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "done"},
    ]
    for model in ("local", "distant"):
        answer = await post(stage.proxy.port, CHAT, {"model": model, "messages": messages, "max_tokens": 4})
        assert answer.status == 200, answer
    sent = json.loads(stage.distant.events("request", "/api/chat")[-1]["body"])["messages"][1]["tool_calls"]
    assert sent[0]["function"]["arguments"]["a"].endswith(FFFD)


@pytest.mark.parametrize("coding", ["gzip", "deflate", "GZIP", "identity"])
async def test_a_compressed_body_reaches_the_model_server_plain(
    proxy: Proxy, upstream: RawUpstream, coding: str
) -> None:
    upstream.script = toxic.plain(b"{}")
    plain = json.dumps({"model": "m", "prompt": "hi " * 50_000}).encode()
    coded = {"gzip": gzip.compress(plain), "deflate": zlib.compress(plain), "identity": plain}[coding.lower()]
    answer = await post(proxy.port, CHAT, coded, headers=[("Content-Encoding", coding)])
    assert answer.status == 200, answer
    assert upstream.requests[0].json() == json.loads(plain)
    assert upstream.requests[0].header("content-encoding") is None


@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/v1/responses", "/api/chat", "/api/show", "/models/load"])
async def test_a_coding_that_is_not_taken_is_refused_with_415_and_those_that_are(proxy: Proxy, path: str) -> None:
    answer = await post(proxy.port, path, b"x" * 100, headers=[("Content-Encoding", "br")])
    assert answer.status == 415 and str(answer.header("accept-encoding")).startswith("gzip, deflate")
    error = answer.json()["error"]
    assert "Content-Encoding" in (error if path.startswith("/api/") else error["message"])


async def test_what_is_compressed_too_well_is_refused_with_413(proxy: Proxy, upstream: RawUpstream) -> None:
    before = proxy.rss_bytes()
    bomb = gzip.compress(with_model(b'"prompt":"' + b"x" * (60 * 2**20) + b'"'))
    answer = await post(proxy.port, CHAT, bomb, headers=[("Content-Encoding", "gzip")])
    assert (answer.status, answer.error["code"]) == (413, "request_too_large")
    assert proxy.rss_bytes() - before < 30 * 2**20 and upstream.received == b""
