"""Bodies that are parsed the short way or in a thread are the same as those that are not."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import weakref
from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llama_smart_proxy.proxy.errors import BadRequest
from llama_smart_proxy.proxy.http.aside import in_thread
from llama_smart_proxy.proxy.http.body import MAX_VALUES, ON_LOOP_BYTES, Body, parse_body, parse_strictly, serialise
from tests.support import toxic
from tests.support.harness import Proxy, until
from tests.support.laws import law
from tests.support.raw_client import post
from tests.support.toxic import RawUpstream
from tests.system.test_body import BAD_JSON, WRONG_MODEL
from tests.unit.test_http_values import requests

# -- the short way -----------------------------------------------------------------------------------------------------

NUMBERS = (
    *("0", "-0", "1", "1.0", "1.00", "-0.0", "-1", "01", "0.1", "0.10", "0.30000000000000004", "123456789.123456789"),
    *("1e5", "1E5", "1e+22", "1e22", "1e-7", "2.5e-8", "5e-324", "1e-400", "1e999", "-1e999", "100000000000000000000"),
    *("18446744073709551615", "18446744073709551616", "-9223372036854775808", "-9223372036854775809"),
)
STRINGS = (
    *('""', '"x"', '"é"', '"\\u00e9"', '"\\n"', '"\\u000a"', '"\\/"', '"/"', '"\\b\\f\\r\\t"', '"\\""', '"\\\\"'),
    *('"\\ud800"', '"\ud800"', '"\\ud83d\\ude00"', '"😀"', '"\x7f"', '"\\u007f"', '"\u2028"', '"\\u2028"'),
    *('"\x1f"', '"\\u001f"', '"\\u001F"', '"\\x"', "'x'", "x", '"'),
)
CONSTANTS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")
KEYS = ("a", "A", "model", "Model", "", "é", "É", "\\u0061", "a" * 65, "ß", "\\n", "ſ", "s")  # noqa: RUF001
COMMAS = st.sampled_from([",", ",", ",", ", ", ",\n  ", ",,"])
COLONS = st.sampled_from([":", ":", ":", ": ", " :"])


def _listed(items: list[str], comma: str) -> str:
    return f"[{comma.join(items)}]"


def _object(pairs: list[tuple[str, str]], comma: str, colon: str) -> str:
    return "{" + comma.join(f'"{key}"{colon}{value}' for key, value in pairs) + "}"


def objects(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    pairs = st.tuples(st.sampled_from(KEYS), values)
    return st.builds(_object, st.lists(pairs, max_size=4), COMMAS, COLONS)


TEXTS = st.recursive(
    st.sampled_from(NUMBERS + STRINGS + CONSTANTS),
    lambda inner: st.builds(_listed, st.lists(inner, max_size=4), COMMAS) | objects(inner),
    max_leaves=12,
)
NEARLY_JSON = st.builds(
    lambda before, text, behind: f"{before}{text}{behind}".encode("utf-8", "surrogatepass"),
    st.sampled_from(["", "", "", " ", "\ufeff"]),
    objects(TEXTS) | TEXTS,
    st.sampled_from(["", "", "", "\n", " ", "x", "{}", "\x00"]),
)
COMPACT = requests().map(orjson.dumps)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """JSON with a byte too many, or too few, or another one."""
    text = draw(COMPACT | NEARLY_JSON)
    place = draw(st.integers(0, len(text)))
    return text[:place] + draw(st.binary(max_size=2)) + text[place + draw(st.integers(0, 2)) :]


def outcome(parsed: Any, raw: bytes) -> tuple[object, ...]:
    """What comes of it: the value, of which the text shows the type of each number and the order of the keys, or the
    whole error."""
    try:
        return ("is", repr(parsed(raw)))
    except BadRequest as exc:
        return ("refused", exc.status, exc.code, exc.message)


@given(COMPACT | NEARLY_JSON | damaged())
@law(1500)
@example(b'{"a":1.0}')
@example(b'{"a":1}')
@example(b'{"a":1e22}')
@example(b'{"a":18446744073709551616}')
@example(b'{"a":1,"A":2}')
@example(b'{"a":[{"b":1,"b":1}]}')
@example(b'{"a":"\xed\xa0\x80"}')
def test_the_short_way_comes_to_the_same_as_the_long_one(raw: bytes) -> None:
    assert outcome(lambda raw: parse_body(raw).value, raw) == outcome(parse_strictly, raw)


@pytest.mark.parametrize("name", BAD_JSON | WRONG_MODEL)
def test_what_is_refused_is_refused_either_way(name: str) -> None:
    raw = (BAD_JSON | WRONG_MODEL)[name]
    assert outcome(lambda raw: parse_body(raw).value, raw) == outcome(parse_strictly, raw)


@given(COMPACT | NEARLY_JSON)
@law(500)
def test_raw_bytes_stand_for_an_object_only_where_they_are_what_it_is_serialised_to(raw: bytes) -> None:
    try:
        value, kept = parse_body(raw)
    except BadRequest:
        return
    assert kept is None or kept == raw == serialise(value)


def test_a_body_as_clients_in_javascript_send_it_is_kept() -> None:
    raw = '{"model":"m","messages":[{"role":"user","content":"ü \\"\\n\\\\ 😀"}],"temperature":0.7,"n":1}'.encode()
    assert parse_body(raw).raw == raw


@pytest.mark.parametrize("inner", [b"1,", b"[],", b"{},", b"[[[[]]]],", b'{"a":{}},'])
def test_too_many_values_are_refused_however_few_commas_they_need(inner: bytes) -> None:
    many = MAX_VALUES // max(1, inner.count(b"["), inner.count(b"{"))
    assert len(parse_body(b'{"x":[' + inner * (many // 2) + b"0]}").value["x"]) == many // 2 + 1
    with pytest.raises(BadRequest, match="too many values"):
        parse_body(b'{"x":[' + inner * (many + 1) + b"0]}")


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")], ids=["compact", "spaced"])
@pytest.mark.parametrize("item", [7, [[]], {"a": 0}, "text, " * 20], ids=["numbers", "lists", "objects", "texts"])
async def test_large_bodies_reach_the_model_server_as_they_are(
    proxy: Proxy, upstream: RawUpstream, item: object, separators: tuple[str, str]
) -> None:
    upstream.script = toxic.plain(b"{}")
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "x": [item] * (ON_LOOP_BYTES // 2)}
    answers = await asyncio.gather(
        *(post(proxy.port, "/v1/chat/completions", json.dumps(body, separators=separators).encode()) for _ in range(3))
    )
    assert [answer.status for answer in answers] == [200, 200, 200]
    assert all(request.json() == body for request in upstream.requests)


async def test_a_large_body_that_is_wrong_is_refused_in_the_same_words(proxy: Proxy, upstream: RawUpstream) -> None:
    body = b'{"model":"m","x":[' + b"1," * ON_LOOP_BYTES + b'0],"x":1}'
    answer = await post(proxy.port, "/v1/chat/completions", body)
    assert answer.status == 400 and "a key appears twice" in answer.error["message"]
    assert upstream.received == b""


# -- the thread --------------------------------------------------------------------------------------------------------


async def test_the_thread_returns_what_is_made_and_raises_what_is_raised() -> None:
    assert await in_thread(parse_body, b'{"a":1}', urgent=False) == Body({"a": 1}, b'{"a":1}')
    with pytest.raises(BadRequest, match="missing request body"):
        await in_thread(parse_body, b"", urgent=True)


async def test_what_is_urgent_goes_before_what_waits_and_what_nobody_waits_for_is_not_done() -> None:
    free, done = threading.Event(), list[str]()
    held = asyncio.ensure_future(in_thread(lambda _: free.wait(), None, urgent=False))
    await asyncio.sleep(0)
    waiting = [asyncio.ensure_future(in_thread(done.append, name, urgent=False)) for name in ("one", "two", "three")]
    await asyncio.sleep(0)
    urgent = asyncio.ensure_future(in_thread(done.append, "urgent", urgent=True))
    await asyncio.sleep(0)
    waiting[1].cancel()
    await asyncio.sleep(0)
    free.set()
    await asyncio.gather(held, urgent, waiting[0], waiting[2])
    assert done == ["urgent", "one", "three"]


class Made:
    """Something that can be referred to weakly."""


async def test_what_was_made_is_let_go_at_once_and_the_collector_is_on_again() -> None:
    made = weakref.ref(await in_thread(lambda _: Made(), None, urgent=False))
    await until(lambda: made() is None and gc.isenabled(), what="the end of what was made")
