"""Makes sections from PDF, by its bookmarks."""

from __future__ import annotations

import logging
from io import BytesIO

from llama_smart_proxy.proxy.knowledge.base import Unreadable
from llama_smart_proxy.proxy.knowledge.reading.parsed import Parsed, Section, missing
from llama_smart_proxy.proxy.knowledge.reading.text import cleaned


def parse(content: bytes) -> Parsed:
    """The sections of a PDF. Raises: Unreadable."""
    try:
        import pypdf
        from pypdf.errors import PyPdfError
    except ImportError as exc:
        raise missing("rag", "PDF") from exc
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    try:
        file = pypdf.PdfReader(BytesIO(content))
        sections = [Section((), cleaned(page.extract_text()).strip()) for page in file.pages]
    except PyPdfError as exc:
        raise Unreadable(f"is not a valid PDF: {exc}") from exc
    if not any(section.text for section in sections):
        raise Unreadable("contains no text; scanned pages require OCR")
    return Parsed("", [section for section in sections if section.text])
