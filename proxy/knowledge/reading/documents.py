"""Makes pieces from the content of one document of any kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from llama_smart_proxy.proxy.knowledge.base import Chunking, Piece, Unreadable
from llama_smart_proxy.proxy.knowledge.reading import headings, splitting
from llama_smart_proxy.proxy.knowledge.reading.kinds import Kind, kind_of
from llama_smart_proxy.proxy.knowledge.reading.parsed import Parsed, Section
from llama_smart_proxy.proxy.knowledge.reading.text import decoded


def pieces_of(content: bytes, name: str, media_type: str, chunking: Chunking) -> Iterator[Piece]:
    """The pieces of a document, at least one. Raises: Unreadable."""
    document = PARSERS[kind_of(content, name, media_type)](content)
    found = False
    for piece in splitting.pieces(document, name, chunking):
        found = True
        yield piece
    if not found:
        raise Unreadable("contains no text")


def _html(content: bytes) -> Parsed:
    from llama_smart_proxy.proxy.knowledge.reading import html

    return html.parse(content)


def _pdf(content: bytes) -> Parsed:
    from llama_smart_proxy.proxy.knowledge.reading import pdf

    return pdf.parse(content)


def _office(kind: Kind) -> Callable[[bytes], Parsed]:
    def parse(content: bytes) -> Parsed:
        from llama_smart_proxy.proxy.knowledge.reading import office

        return office.parse(content, kind)

    return parse


PARSERS: dict[Kind, Callable[[bytes], Parsed]] = {
    Kind.TEXT: lambda content: Parsed("", [Section((), decoded(content).strip())]),
    Kind.MARKDOWN: lambda content: headings.markdown(decoded(content)),
    Kind.RST: lambda content: headings.restructured(decoded(content)),
    Kind.POD: lambda content: headings.pod(decoded(content)),
    Kind.HTML: _html,
    Kind.PDF: _pdf,
    Kind.DOCX: _office(Kind.DOCX),
    Kind.PPTX: _office(Kind.PPTX),
    Kind.XLSX: _office(Kind.XLSX),
}
"""What makes sections from each kind; heavy packages are imported where they are used."""
