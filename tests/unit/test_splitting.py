"""Documents are split into pieces of bounded size that begin with their headings, and nothing of them is lost."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_smart_proxy.proxy.knowledge.base import Chunking, Piece, Unreadable
from llama_smart_proxy.proxy.knowledge.reading.documents import pieces_of
from llama_smart_proxy.proxy.knowledge.reading.splitting import TOKENS, heading_path, tokens
from tests.support.laws import law

LONG = "Some words of a sentence. " * 12
TABLE = "| name | price |\n|---|---|\n"
ROWS = [f"| thing {number} | {number}00 |" for number in range(60)]


def pieces(text: str, name: str = "a.md", characters: int = 900, overlap: int = 0) -> list[Piece]:
    return list(pieces_of(text.encode("utf-8", "replace"), name, "", Chunking(characters, overlap)))


def body(piece: Piece) -> str:
    return piece.text.removeprefix(piece.heading)


def letters(text: str) -> str:
    return re.sub(r"[\W_]", "", text)


@pytest.mark.parametrize(
    ("text", "name", "headings"),
    [
        (f"# A\n\n## B\n\n{LONG}\n\n## C\n\n{LONG}", "a.md", ["A > B", "A > C"]),
        (f"# A\n\n{LONG}\n\n# B\n\n{LONG}", "a.md", ["a.md > A", "a.md > B"]),
        (f"Title\n=====\n\nPart\n----\n\n{LONG}", "a.md", ["Title > Part"]),
        (f"# [A](x) `b` #\n\n{LONG}", "a.md", ["A b"]),
        (f"```\n# no heading\n```\n{LONG}", "a.md", ["a.md"]),
        (f"---\ntitle: 'Front matter'\ndate: 1\n---\n\n## B\n\n{LONG}", "a.md", ["Front matter > B"]),
        (f'+++\ntitle = "T"\n+++\n{LONG}', "a.md", ["T"]),
        (f"- item\n---\n{LONG}", "a.md", ["a.md"]),
        (
            f"=====\nTitle\n=====\n\nPart\n----\n{LONG}\n\nOther\n-----\n{LONG}",
            "a.rst",
            ["Title > Part", "Title > Other"],
        ),
        (
            f"=head1 NAME\n\nmy - a program\n\n=head1 USE\n\n=head2 B<Long>\n\n{LONG}",
            "a.pod",
            ["my - a program > USE > Long"],
        ),
        (f"# comment\n{LONG}", "a.py", ["a.py"]),
        (LONG, "", [""]),
    ],
)
def test_pieces_are_called_by_the_headings_above_them(text: str, name: str, headings: list[str]) -> None:
    found = [piece.heading for piece in pieces(text, name)]
    assert found[-len(headings) :] == headings
    assert "title" not in "".join(map(body, pieces(text, name)))


def test_tiny_neighbours_of_one_section_are_one_piece_and_keep_their_headings() -> None:
    text = "# A\n\n" + "".join(f"## B{number}\n\nText {number}.\n\n" for number in range(5)) + f"## C\n\n{LONG * 2}"
    first, second = pieces(text)
    assert first.heading == "A"
    assert all(f"B{number}\n\nText {number}." in first.text for number in range(5))
    assert second.heading == "A > C"


def test_a_long_table_repeats_its_head_in_each_piece() -> None:
    found = pieces(f"# Prices\n\nBefore.\n\n{TABLE}" + "\n".join(ROWS) + "\n\nAfter.", characters=400)
    parts = [piece for piece in found if "| thing" in piece.text]
    assert len(parts) > 3 and all(TABLE in piece.text for piece in parts)
    assert [line for piece in parts for line in piece.text.split("\n") if line.startswith("| thing")] == ROWS


def test_a_block_of_code_that_fits_is_not_torn() -> None:
    code = "```\n" + "\n".join(f"line({number})" for number in range(20)) + "\n```"
    assert any(code in piece.text for piece in pieces(f"# A\n\n{LONG * 2}\n\n{code}\n\n{LONG * 2}"))


@pytest.mark.parametrize("text", ["漢字" * 3000, "한국어 " * 2000, "0f3a9c" * 900, "x=1;" * 1500, "Ünïcödé " * 900])
def test_dense_text_has_no_more_tokens_than_embedding_models_read(text: str) -> None:
    found = pieces(text, "a.txt")
    assert max(tokens(piece.text) for piece in found) <= TOKENS
    assert letters("".join(map(body, found))) == letters(text)


def test_parts_repeat_so_much_of_the_one_before_as_is_configured() -> None:
    text = " ".join(f"Sentence {number} is here." for number in range(100))
    one, two = (sum(len(body(piece)) for piece in pieces(text, "a.txt", 300, overlap)) for overlap in (0, 100))
    assert two > one + 10 * 50


def test_the_outer_headings_are_left_out_of_a_long_path() -> None:
    assert heading_path("Title", ["one", "two", "three"], 20) == "Title > … > three"
    assert heading_path("Setup guide | Manual", ["Setup guide", "Part"], 99) == "Setup guide | Manual > Part"
    assert len(heading_path("T" * 500, ["x" * 500] * 9, 60)) <= 60


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("naïve café".encode(), "naïve café"),
        (b"\xef\xbb\xbfmark", "mark"),
        ("naïve".encode("utf-16"), "naïve"),
        ("plain text without a mark".encode("utf-16-le"), "plain text without a mark"),
        ("Größe und Übung für alle Bürger, süß".encode("latin-1"), "Größe und Übung für alle Bürger, süß"),
        ("one é bad é byte é of é many é in é it é or é more é \u2019 é ".encode() + b"\xff end", "one é bad"),
        (b"a\r\nb\rc\x0cd", "a\nb\nc\n\nd"),
        (b"colour \x1b[31mred\x1b[0m" + b" and more" * 9, "colour \x1b[31mred"),
    ],
)
def test_text_is_decoded(content: bytes, text: str) -> None:
    assert next(pieces_of(content, "a", "", Chunking())).text.startswith(f"a\n\n{text}")


@pytest.mark.parametrize("content", [b"", b" \n", b"---\n", b"abc\0def\0\0\1" * 20, bytes(range(256)) * 9])
def test_what_has_no_text_is_unreadable(content: bytes) -> None:
    with pytest.raises(Unreadable, match=r"contains no text|binary"):
        list(pieces_of(content, "a.txt", "", Chunking()))


@law(800)
@given(st.text(st.sampled_from("ab ä漢한.\n\n#-`|>*_"), max_size=400), st.integers(30, 200), st.integers(0, 50))
def test_no_letter_of_a_text_is_lost_and_no_piece_is_too_long(text: str, characters: int, overlap: int) -> None:
    if not letters(text):
        return
    found = pieces(text, "n.txt", characters)
    assert letters("".join(map(body, found))) == letters(text)
    for piece in [*found, *pieces(text, "n.txt", characters, overlap)]:
        assert len(piece.text) <= characters and piece.text.startswith(piece.heading)


@law(400)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 90)), min_size=1, max_size=12), st.integers(80, 600))
def test_each_word_of_a_markdown_text_is_in_one_piece(parts: list[tuple[int, int]], characters: int) -> None:
    words = iter(range(10_000))
    text, expected = "", []
    for level, count in parts:
        text += f"{'#' * level} Heading\n\n" if level else ""
        paragraph = [f"w{next(words)}x" for _ in range(count)]
        expected += paragraph
        text += " ".join(paragraph) + "\n\n"
    found = pieces(text, "n.md", characters)
    assert [word for piece in found for word in re.findall(r"w\d+x", piece.text)] == expected
    assert max(len(piece.text) for piece in found) <= characters
