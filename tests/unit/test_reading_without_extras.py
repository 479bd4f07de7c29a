"""Without the packages of the extras, plain text is read, and all else names what to install."""

from __future__ import annotations

import sys

import pytest

from llama_smart_proxy.proxy.knowledge.base import Chunking, Piece, Unreadable
from llama_smart_proxy.proxy.knowledge.reading import splitting
from llama_smart_proxy.proxy.knowledge.reading.documents import pieces_of
from tests.support import formats

PACKAGES = ("trafilatura", "pypdf", "markitdown", "semantic_text_splitter", "charset_normalizer")


@pytest.fixture(autouse=True)
def no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in PACKAGES:
        monkeypatch.setitem(sys.modules, package, None)
    splitting._splitter.cache_clear()


def read(content: bytes) -> list[Piece]:
    return list(pieces_of(content, "a", "", Chunking()))


@pytest.mark.parametrize(
    ("content", "extra"),
    [
        (b"<!doctype html><p>Hello", "rag"),
        (formats.raw_pdf(b""), "rag"),
        (b"Words of a long text. " * 99, "rag"),
        (formats.archive("[Content_Types].xml", "word/document.xml"), "office"),
    ],
)
def test_what_requires_a_package_names_it(content: bytes, extra: str) -> None:
    with pytest.raises(Unreadable, match=rf"pip install 'llama-smart-proxy\[{extra}\]'"):
        read(content)


@pytest.mark.parametrize("content", [b"Text.", "Gr\u00fc\u00dfe".encode("latin-1"), b"# a\n\nText."])
def test_plain_text_requires_none(content: bytes) -> None:
    assert read(content)[0].text.startswith("a\n\n")
