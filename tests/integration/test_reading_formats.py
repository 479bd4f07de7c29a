"""Each format keeps its text and its headings; what cannot be read is named with its reason."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path

import pytest
import uvloop

from llama_smart_proxy.proxy.knowledge.base import Piece, Unreadable
from llama_smart_proxy.proxy.knowledge.reading.reader import DocumentReader
from tests.support import formats

Read = Callable[..., list[Piece]]
LONG = "The text of this part says what it says. " * 12
PAGE = f"""<!DOCTYPE html><html><head><title>Setup | Manual</title><script>var x = "script"</script></head><body>
<nav><ul><li><a href="/">Menu of links</a></li></ul></nav><h1>Setup<a href="#s">#</a></h1><p>{LONG}</p>
<h2>Commands</h2><pre>make
  make install</pre><ul><li>first<ul><li>nested</li></ul></li></ul><p>{LONG}</p>
<table><tr><th>name</th><th>price</th></tr><tr><td>nut</td><td>1</td></tr></table><footer>Imprint</footer></body>"""
MANY = "<p>Related: " + "".join(f'<a href="/{n}">Another page {n}</a><br>' for n in range(9)) + "</p>"


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[[Callable[[DocumentReader], Coroutine[None, None, list[Piece]]]], list[Piece]]]:
    """Asks a reader that all tests share, in the event loop of the proxy."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        reader = DocumentReader()
        yield lambda ask: runner.run(asyncio.wait_for(ask(reader), 200))
        runner.run(reader.close())


@pytest.fixture
def read(run: Callable[..., list[Piece]]) -> Read:
    return lambda content, name="file", kind="": run(lambda reader: reader.page(content, name, kind))


def test_a_page_keeps_its_structure_and_loses_its_menus(read: Read) -> None:
    pieces = read(PAGE.encode())
    text = "\n".join(piece.text for piece in pieces)
    assert [piece.heading for piece in pieces] == ["Setup | Manual", "Setup | Manual > Commands"]
    assert "```\nmake\n  make install\n```" in text and "- first\n  - nested" in text
    assert "| name | price |\n|---|---|\n| nut | 1 |" in text
    assert not any(word in text for word in ("Menu", "script", "Imprint"))


def test_short_terms_stay_with_their_definitions_and_rows_without_a_head_have_none(read: Read) -> None:
    terms = "".join(f"<dt>Term {n}<dd>This is the definition of number {n}." for n in range(9))
    rows = "".join(f"<tr><td>thing {n}<td>{n}00 dollars" for n in range(9))
    text = read(f"<!doctype html><body><dl>{terms}</dl><table>{rows}</table>".encode())[0].text
    assert all(f"Term {n}\n\nThis is the definition of number {n}." in text for n in range(9))
    assert "| thing 0 | 000 dollars |\n| thing 1 | 100 dollars |" in text


def test_a_page_of_links_is_read_if_there_is_nothing_else(read: Read) -> None:
    [piece] = read(f"<!doctype html><title>Index</title><body>{MANY}".encode())
    assert "Another page 8" in piece.text


def test_the_bookmarks_of_a_pdf_are_its_headings(read: Read) -> None:
    pages = [
        f"Page header\nIntroduction\n{LONG}\nPart one\n{LONG}",
        f"Page header\n{LONG}\nDetails\n{LONG}\nhyphen-\nated",
    ]
    pages += ["Page header\nmore"] * 4
    bookmarks = [("Introduction", 0, 0), ("Part one", 0, 0), ("Details", 1, 1)]
    pieces = read(formats.pdf(pages, bookmarks, title="The manual"))
    assert list(dict.fromkeys(piece.heading for piece in pieces)) == [
        "The manual > Introduction",
        "The manual > Part one",
        "The manual > Part one > Details",
    ]
    text = "\n".join(piece.text for piece in pieces)
    assert "hyphenated" in text and "Page header" not in text


def test_office_files_keep_headings_and_tables(read: Read) -> None:
    word = formats.docx(("Heading1", "Manual"), ("Heading2", "Setup"), ("", LONG))
    assert [(piece.heading, LONG.strip() in piece.text) for piece in read(word)] == [("Manual > Setup", True)]
    table = read(formats.xlsx([["item", "price", None], ["nut", 1, None]]), "prices.xlsx")
    assert table == [Piece("prices.xlsx > Prices\n\n| item | price |\n|---|---|\n| nut | 1 |", "prices.xlsx > Prices")]
    assert [piece.heading for piece in read(formats.slides("One", "Two"), "s")] == [
        "s > One",
        "s > Two",
    ]


@pytest.mark.parametrize(
    ("content", "name", "text"),
    [
        (formats.pdf(["Hello"]), "a.txt", "Hello"),
        (b" <!-- x -->\n<HTML><body><p>Hello there", "a.pdf", "Hello there"),
        (b"Hello", "a.docx", "Hello"),
        (b"Hello", "a.html", "Hello"),
        (b"<p>Hello there", "a.html", "Hello there"),
    ],
)
def test_the_content_says_what_a_document_is(read: Read, content: bytes, name: str, text: str) -> None:
    assert (read(content, name))[0].text.endswith(text)


def test_the_media_type_counts_where_the_name_says_nothing(read: Read) -> None:
    assert (read(b"<p>Hello <b>there", "page", "text/html; charset=utf-8"))[0].text == "page\n\nHello there"


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "encrypted": (lambda: formats.pdf(["x"], password="secret"), "is encrypted"),
    "scanned": (lambda: formats.pdf(["", ""]), "contains no text; scanned pages require OCR"),
    "truncated PDF": (lambda: formats.pdf(["x"])[:200], "is a damaged PDF"),
    "PDF of junk": (lambda: b"%PDF-1.7\n" + os.urandom(20_000), "is a damaged PDF"),
    "pages in a circle": (lambda: formats.raw_pdf(b"").replace(b"[3 0 R]", b"[2 0 R]"), "is a damaged PDF"),
    "PDF bomb": (formats.pdf_bomb, "unpacks to more|is a damaged PDF"),
    "truncated archive": (
        lambda: formats.archive("[Content_Types].xml", "word/document.xml")[:-30],
        "is a damaged Office file",
    ),
    "empty Word file": (lambda: formats.archive("[Content_Types].xml", "word/document.xml"), "is a damaged docx"),
    "zip bomb": (lambda: formats.archive("[Content_Types].xml", "xl/a", claimed=2**31), "unpacks to more than 256 MiB"),
    "archive": (lambda: formats.archive("a.txt"), "is an archive"),
    "binary": (lambda: os.urandom(50_000), "is a binary file"),
    "image": (lambda: b"\x89PNG\r\n\x1a\n" + b"\0" * 99, "is an image"),
    "old Word file": (lambda: b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 99, "save it as docx"),
    "empty": (lambda: b"", "contains no text"),
    "blank": (lambda: b" \n\t\n", "contains no text"),
    "a million elements": (lambda: b"<!doctype html><body>" + b"<div>" * 1_000_000, "contains no text"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_cannot_be_read_is_named_with_its_reason(read: Read, what: str) -> None:
    made, reason = HOSTILE[what]
    content = made()
    with pytest.raises(Unreadable, match=reason):
        read(content, "a")
    assert read(b"Text.", "a") == [Piece("a\n\nText.", "a")]


@pytest.mark.parametrize("kind", ["fifo", "folder", "missing", "device"])
def test_only_regular_files_are_read(run: Read, tmp_path: Path, kind: str) -> None:
    file = Path("/dev/zero") if kind == "device" else tmp_path / kind
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    with pytest.raises(Unreadable, match=r"is not a regular file|cannot be opened") as refused:
        run(lambda reader: reader.read(file, "a"))
    assert str(tmp_path) not in str(refused.value)
