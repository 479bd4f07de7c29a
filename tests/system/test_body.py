"""JSON that two parsers could read differently is refused with status 400, and the rest passes unchanged."""

from __future__ import annotations

import json

import pytest

from tests.support import toxic
from tests.support.harness import Proxy
from tests.support.laws import same
from tests.support.raw_client import post
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
    "lone high surrogate": with_model(b'"user":"\\ud800"'),
    "lone low surrogate": with_model(b'"user":"a\\udc00b"'),
    "lone surrogate in a key": with_model(b'"\\ud800":1'),
    "lone surrogate deep inside": with_model(b'"messages":[{"role":"user","content":"\\udfff"}]'),
    "raw surrogate bytes": with_model(b'"user":"\xed\xa0\x80"'),
    "bad UTF-8": with_model(b'"user":"\xff\xfe"'),
    "cut UTF-8": with_model(b'"user":"\xe2\x82"'),
    "overlong UTF-8": with_model(b'"user":"\xc0\xaf"'),
    "UTF-16 with BOM": json.dumps({"model": "m"}).encode("utf-16"),
    "UTF-16 without BOM": json.dumps({"model": "m"}).encode("utf-16-le"),
    "UTF-32": json.dumps({"model": "m"}).encode("utf-32"),
    "UTF-8 BOM": b"\xef\xbb\xbf" + b'{"model":"m"}',
    "duplicate key": b'{"model":"m","model":"other"}',
    "duplicate key by escape": b'{"model":"m","mod\\u0065l":"other"}',
    "duplicate key deep inside": with_model(b'"a":[{"b":{"c":1,"c":2}}]'),
    "keys that differ in case": b'{"model":"m","MODEL":"other"}',
    "keys that differ in case by escape": b'{"model":"m","\\u004dodel":"other"}',
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
    assert answer.status in (400, 404), answer
    assert answer.error["message"]
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
