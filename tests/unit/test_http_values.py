"""Bodies and headers as values: what is sent is what was parsed, and what is named by `Connection` is left out."""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_smart_proxy.proxy.errors import BadRequest
from llama_smart_proxy.proxy.http.body import parse_object, serialise
from llama_smart_proxy.proxy.http.coding import CODINGS, FREE_BYTES, MAX_RATIO, coding_of, decompressed
from llama_smart_proxy.proxy.http.headers import downstream_headers
from llama_smart_proxy.proxy.http.text import MAX_INVALID
from llama_smart_proxy.proxy.middleware.chain import Selection
from llama_smart_proxy.proxy.middleware.context import RequestFacts
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


def test_what_is_sent_is_valid_utf_8_also_where_a_lone_surrogate_comes_from_within() -> None:
    assert serialise({"messages": [{"content": "a\ud83d"}]}).decode() == '{"messages":[{"content":"a\ufffd"}]}'
    with pytest.raises(BadRequest, match="key"):
        serialise({"\ud83d": 1})


def test_a_body_that_is_hardly_text_is_refused() -> None:
    """Each invalid byte takes time, in the one thread that parses large bodies."""
    assert parse_object(b'{"a":"' + b"\xff" * 1000 + b'"}') == {"a": "\ufffd" * 1000}
    with pytest.raises(BadRequest, match="not valid UTF-8"):
        parse_object(b'{"a":"' + b"\xff" * (MAX_INVALID + 1) + b'"}')


# -- compressed bodies -------------------------------------------------------------------------------------------------

MIB = 2**20
TEXT = b'{"model":"m"}' * 10


def raw_deflate(data: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return stream.compress(data) + stream.flush()


WRITERS: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("gzip", gzip.compress),
    ("x-gzip", gzip.compress),
    ("deflate", zlib.compress),
    ("deflate", raw_deflate),
]


@pytest.mark.parametrize(("coding", "compress"), WRITERS)
def test_a_compressed_body_is_what_was_compressed(coding: str, compress: Callable[[bytes], bytes]) -> None:
    assert decompressed(compress(TEXT), coding, MIB) == TEXT
    assert decompressed(compress(b""), coding, MIB) == b""


@pytest.mark.parametrize(("coding", "compress"), WRITERS)
def test_what_is_cut_or_not_compressed_or_has_more_behind_it_is_a_bad_request(
    coding: str, compress: Callable[[bytes], bytes]
) -> None:
    whole = compress(TEXT)
    for raw in (b"", b"x", TEXT, whole[:-1], whole[:5], whole + b"x", whole + whole):
        with pytest.raises(BadRequest, match=f"is not valid {coding} data") as failed:
            decompressed(raw, coding, MIB)
        assert failed.value.status == 400


@pytest.mark.parametrize(("coding", "compress"), WRITERS)
def test_a_body_may_not_be_larger_than_the_limit_or_compressed_too_well(
    coding: str, compress: Callable[[bytes], bytes]
) -> None:
    fits = random.Random(1).randbytes(MIB)
    assert decompressed(compress(fits), coding, MIB) == fits
    for body, limit, says in ((fits + b"x", MIB, "larger than 1 MiB"), (b"0" * 40 * MIB, 64 * MIB, "more than 1:100")):
        with pytest.raises(BadRequest, match=says) as failed:
            decompressed(compress(body), coding, limit)
        assert failed.value.status == 413
    assert len(decompressed(compress(b"0" * FREE_BYTES), coding, 64 * MIB)) == FREE_BYTES > MAX_RATIO * 5000


@pytest.mark.skipif("zstd" not in CODINGS, reason="Python's own zstd comes with 3.14")
def test_zstd_is_decompressed_where_python_can() -> None:
    zstd = import_module("compression.zstd")
    assert decompressed(zstd.compress(TEXT), "zstd", MIB) == TEXT
    for raw in (b"", b"x", zstd.compress(TEXT)[:-1], zstd.compress(b"0" * 40 * MIB)):
        with pytest.raises(BadRequest):
            decompressed(raw, "zstd", 64 * MIB)


@pytest.mark.parametrize(
    ("header", "coding"),
    [("gzip", "gzip"), ("GZip", "gzip"), ("identity", None), ("", None), ("identity, gzip", "gzip")],
)
def test_the_coding_is_named_in_any_case_and_identity_is_none(header: str, coding: str | None) -> None:
    assert coding_of(header) == coding


@pytest.mark.parametrize("header", ["br", "compress", "gzip, gzip", "gzip, br", "gzip;q=1", "aws-chunked", "*"])
def test_a_coding_that_is_not_taken_is_415_and_names_those_that_are(header: str) -> None:
    with pytest.raises(BadRequest, match="gzip, deflate") as refused:
        coding_of(header)
    assert refused.value.status == 415


def test_agents_see_headers_about_the_user_and_no_credentials() -> None:
    withheld = (
        "Authorization",
        "X-Api-Key",
        "Api-Key",
        "X-Goog-Api-Key",
        "X-Auth-Token",
        "Cookie",
        "Proxy-Authorization",
    )
    seen = {"X-OpenWebUI-User-Email": "a@b.example", "User-Agent": "x", "Idempotency-Key": "1"}
    facts = RequestFacts(dict.fromkeys(withheld, "secret") | seen, "/v1/messages", "id", "remote", Selection("chat"))
    assert facts.headers == {name.lower(): value for name, value in seen.items()}
