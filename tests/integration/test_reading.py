"""Documents are read in a process with limits, which no document outlives."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from llama_smart_proxy.proxy.knowledge.base import Chunking, Piece, Unreadable
from llama_smart_proxy.proxy.knowledge.reading.reader import DocumentReader

MANUAL = "# Manual\n\nIntroduction.\n\n## Setup\n\n" + "Run the installer and restart. " * 10
SETUP = "Manual > Setup"


@pytest.fixture
async def reader() -> AsyncIterator[DocumentReader]:
    reader = DocumentReader()
    yield reader
    await reader.close()


async def test_a_document_becomes_pieces_that_begin_with_their_headings(reader: DocumentReader, tmp_path: Path) -> None:
    file = tmp_path / "manual"
    file.write_text(MANUAL)
    pieces = await reader.read(file, "manual.md", chunking=Chunking(300))
    assert [piece.heading for piece in pieces] == ["Manual", SETUP, SETUP]
    assert all(piece.text.startswith(f"{piece.heading}\n\n") and len(piece.text) <= 300 for piece in pieces)
    assert isinstance(pieces[0], Piece)


async def test_a_page_is_read_from_memory(reader: DocumentReader) -> None:
    pieces = await reader.page(MANUAL.encode(), "https://example.org/manual", "text/markdown")
    assert [piece.heading for piece in pieces] == ["Manual"]


async def test_what_cannot_be_read_gives_the_reason_and_the_next_is_read(
    reader: DocumentReader, tmp_path: Path
) -> None:
    with pytest.raises(Unreadable, match="cannot be opened: No such file"):
        await reader.read(tmp_path / "missing", "missing.md")
    assert await reader.page(b"Text.", "a.txt") == [Piece("a.txt\n\nText.", "a.txt")]
