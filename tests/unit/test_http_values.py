"""Bodies and headers as values: what is sent is what was parsed, and what is named by `Connection` is left out."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_smart_proxy.proxy.errors import BadRequest
from llama_smart_proxy.proxy.http.body import parse_object, serialise
from llama_smart_proxy.proxy.http.headers import downstream_headers
from tests.support.laws import law, same

NAMES = st.text(st.characters(codec="utf-8"), max_size=8)
NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
LEAVES = st.none() | st.booleans() | NUMBERS | st.text(st.characters(codec="utf-8"), max_size=20)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4), max_leaves=25
)
KNOWN = st.fixed_dictionaries(
    {},
    optional={
        "model": st.just("m"),
        "stream": st.booleans(),
        "messages": st.lists(
            st.dictionaries(st.sampled_from(["role", "content", "tool_calls", "x_unknown"]), VALUES, max_size=4),
            max_size=3,
        ),
    },
)


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    """A request with unknown keys at every level; no two top-level keys alike but for case."""
    value = draw(st.dictionaries(NAMES, VALUES, max_size=4)) | draw(KNOWN)
    return {key: item for key, item in value.items() if sum(key.lower() == other.lower() for other in value) == 1}


@given(requests())
@law(500)
def test_what_is_sent_is_what_was_parsed(value: dict[str, Any]) -> None:
    for ascii_only in (True, False):
        parsed = parse_object(json.dumps(value, ensure_ascii=ascii_only).encode())
        sent = serialise(parsed)
        assert same(json.loads(sent), value)
        assert list(json.loads(sent)) == list(value), "the order of keys changed"


@given(st.binary(max_size=40) | st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass")))
@law(1000)
def test_any_bytes_are_an_object_or_a_bad_request(data: bytes) -> None:
    try:
        serialise(parse_object(data))
    except BadRequest as exc:
        assert exc.status == 400


@pytest.mark.parametrize("text", ["1.0", "-0.0", "1e22", "1.5e-7", "0.1", "123456789.123456789", "5e-324", "1e-400"])
def test_numbers_keep_their_value(text: str) -> None:
    sent = serialise(parse_object(b'{"x":%b}' % text.encode()))
    assert repr(json.loads(sent)["x"]) == repr(float(text))


def test_named_by_connection_in_any_order() -> None:
    kept = downstream_headers([("x-a", "1"), ("connection", "X-A , close"), ("x-b", "2"), ("connection", "x-c")])
    assert kept == [("x-b", "2")]
