"""Makes sections from HTML: trafilatura finds the content, without menus and the like."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from llama_smart_proxy.proxy.knowledge.base import Unreadable
from llama_smart_proxy.proxy.knowledge.reading import headings
from llama_smart_proxy.proxy.knowledge.reading.parsed import Parsed, missing
from llama_smart_proxy.proxy.knowledge.reading.text import cleaned

if TYPE_CHECKING:
    from lxml.html import HtmlElement

HEADING = re.compile(r"^#{1,6} ", re.M)


def parse(content: bytes) -> Parsed:
    """The sections of a page, by its headings. Raises: Unreadable."""
    try:
        import trafilatura
    except ImportError as exc:
        raise missing("rag", "HTML") from exc
    tree: HtmlElement | None = trafilatura.load_html(content)
    if tree is None:
        raise Unreadable("contains no HTML")
    title = " ".join((tree.findtext(".//title") or "").split())
    found = trafilatura.extract(content, output_format="markdown", include_comments=False, favor_recall=True) or ""
    document = headings.markdown(cleaned(found))
    return Parsed(title or document.title, document.sections)
