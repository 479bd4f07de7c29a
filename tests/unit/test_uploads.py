"""Forms are split into their fields while they arrive, in whatever pieces, within limits."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_smart_proxy.proxy.api.multipart import MAX_PARTS
from llama_smart_proxy.proxy.api.uploads import FormParser, Part, name_of
from llama_smart_proxy.proxy.errors import BadRequest
from tests.support.laws import law

BOUNDARY = b"-x"
TEXT = 'Content-Disposition: form-data; name="purpose"'
FILE = (
    'content-disposition: Form-Data; name=file; filename="a \\"b\\".md"\r\nContent-Type: text/markdown; charset=utf-8'
)
CONTENTS = st.lists(
    st.sampled_from([b"\r\n", b"--", b"-x", b"\r", b"\n", b"--y", b"a", b"\0\xff", b"-"]), max_size=12
).map(b"".join)


def form(*fields: tuple[str, bytes], end: bytes = b"--\r\n") -> bytes:
    parts = [b"--" + BOUNDARY + b"\r\n" + head.encode() + b"\r\n\r\n" + content + b"\r\n" for head, content in fields]
    return b"".join(parts) + b"--" + BOUNDARY + end


def fed(*pieces: bytes) -> tuple[list[tuple[Part, bytes]], bool]:
    parser, fields = FormParser(BOUNDARY), list[tuple[Part, bytes]]()
    for piece in pieces:
        for item in parser.feed(piece):
            if isinstance(item, Part):
                fields.append((item, b""))
            else:
                fields[-1] = fields[-1][0], fields[-1][1] + item
    return fields, parser.ended


@law(2000)
@given(CONTENTS, CONTENTS, st.lists(st.integers(0, 400), max_size=8))
def test_a_form_is_the_same_in_whatever_pieces_it_arrives(first: bytes, second: bytes, cuts: list[int]) -> None:
    if b"\r\n--" + BOUNDARY in b"\r\n" + first or b"\r\n--" + BOUNDARY in b"\r\n" + second:
        return
    raw = b"preamble\r\n" + form((TEXT, first), (FILE, second)) + b"epilogue --" + BOUNDARY
    edges = [0, *sorted(min(cut, len(raw)) for cut in cuts), len(raw)]
    pieces = [raw[start:end] for start, end in pairwise(edges)]
    expected = [(Part("purpose"), first), (Part("file", 'a "b".md', "text/markdown"), second)]
    assert fed(*pieces) == fed(*[raw[at : at + 1] for at in range(len(raw))]) == (expected, True)


def test_a_form_that_was_cut_has_not_ended() -> None:
    raw = form((TEXT, b"assistants"))
    assert [fed(raw[:cut])[1] for cut in range(len(raw))] == [False] * (len(raw) - 2) + [True] * 2


@pytest.mark.parametrize(
    "raw",
    [
        form(("Content-Type: text/plain", b"no disposition")),
        form(("Content-Disposition: attachment; filename=a", b"another")),
        form((TEXT, b"x"), end=b"more\r\n"),
        form((f"{TEXT}\r\nX: {'x' * 20_000}", b"")),
        b"--" + BOUNDARY + b"\r\n" + b"y" * 20_000,
        form(("Content-Disposition: form-data; name*=nothing''x; filename*=utf-9'en'%ff%", b"")),
    ],
)
def test_what_is_no_form_is_refused_or_read_but_never_fails_otherwise(raw: bytes) -> None:
    try:
        fed(raw)
    except BadRequest as exc:
        assert exc.code == "invalid_form"


def test_a_form_has_a_limited_number_of_fields() -> None:
    assert len(fed(form(*[(TEXT, b"")] * MAX_PARTS))[0]) == MAX_PARTS
    with pytest.raises(BadRequest, match="over 1000 fields"):
        fed(form(*[(TEXT, b"")] * (MAX_PARTS + 1)))


@pytest.mark.parametrize(
    ("given_name", "kept"),
    [
        ("a.md", "a.md"),
        ("../../etc/passwd", "passwd"),
        ("C:\\Users\\me\\a.md", "a.md"),
        ("/", "unnamed"),
        ("..", "unnamed"),
        ("a/..", "unnamed"),
        ("", "unnamed"),
        ("a\0b\n\x1b[2J.md", "a_b__[2J.md"),
        ("\u202etxt.exe", "_txt.exe"),
        ("Müller 文.md", "Müller 文.md"),
        ("x" * 300 + ".md", "x" * 252 + ".md"),
        ("\udc80.md", "_.md"),
    ],
)
def test_the_name_of_a_file_has_no_folder_and_can_be_printed(given_name: str, kept: str) -> None:
    assert name_of(given_name) == kept
