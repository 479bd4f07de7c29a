"""Makes sections from PDF, by its bookmarks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from io import BytesIO
from typing import TYPE_CHECKING, NamedTuple

from llama_smart_proxy.proxy.knowledge.base import Unreadable
from llama_smart_proxy.proxy.knowledge.reading.headings import MAX_HEADING
from llama_smart_proxy.proxy.knowledge.reading.parsed import Parsed, Section, missing
from llama_smart_proxy.proxy.knowledge.reading.text import cleaned

if TYPE_CHECKING:
    from pypdf import PdfReader

MAX_DEPTH = 16
"""Of bookmarks below bookmarks."""
HYPHEN = re.compile(r"(?<=[a-zà-ÿ])[-\u00ad\u2010]\n(?=[a-zà-ÿ])")
NOT_ALPHANUMERIC = re.compile(r"[\W_]+")
DIGITS = re.compile(r"\d+|\b[ivxlc]+\b")
NO_TITLE = re.compile(r"(?:untitled|.{0,3}|.*\.(?:docx?|tex|dvi|indd|pdf|qxd|odt|ps|rtf|txt|html?))", re.I | re.S)
PROGRAM = re.compile(r"(?:Microsoft Word|Microsoft PowerPoint|PowerPoint Presentation) - ")
REPEATED = 0.3
"""A first or last line that so many pages have is none of the text, but a page header or footer."""
FEWEST_PAGES = 5


class Bookmark(NamedTuple):
    """A title in the outline: its page from 0, and its level from 0."""

    page: int
    level: int
    title: str


def parse(content: bytes) -> Parsed:
    """The sections of a PDF. Raises: Unreadable."""
    try:
        import pypdf
        from pypdf.errors import LimitReachedError, PyPdfError
    except ImportError as exc:
        raise missing("rag", "PDF") from exc
    try:
        file = pypdf.PdfReader(BytesIO(content))
        if file.is_encrypted and not _opened(file):
            raise Unreadable("is encrypted; a copy without a password can be read")
        pages = _without_margins([page.split("\n") for page in _texts(file)])
    except LimitReachedError as exc:
        raise Unreadable("unpacks to more than the PDF reader accepts") from exc
    except PyPdfError as exc:
        raise Unreadable("is a damaged PDF") from exc
    if not any(line.strip() for page in pages for line in page):
        raise Unreadable("contains no text; scanned pages require OCR")
    return Parsed(_title(file), list(_sections(pages, _bookmarks(file))))


def _opened(file: PdfReader) -> bool:
    """Whether an empty password opens it: many are encrypted only against printing."""
    with suppress(Exception):  # a package for its algorithm is missing, or its keys are damaged
        return bool(file.decrypt(""))
    return False


def _texts(file: PdfReader) -> Iterator[str]:
    failed: Exception | None = None
    readable = False
    for page in file.pages:
        try:
            text = page.extract_text()
            readable = True
        except MemoryError:
            raise
        except Exception as exc:  # one page of many is damaged
            failed, text = exc, ""
        yield cleaned(text).strip()
    if failed and not readable:
        raise Unreadable("is a damaged PDF") from failed


def _title(file: PdfReader) -> str:
    with suppress(Exception):
        title = " ".join(cleaned(str((file.metadata and file.metadata.title) or "")).split())
        title = PROGRAM.sub("", title)
        return "" if NO_TITLE.fullmatch(title) else title[:MAX_HEADING]
    return ""


def _bookmarks(file: PdfReader) -> list[Bookmark]:
    """The outline, by page; empty if it is damaged."""
    found: list[Bookmark] = []
    with suppress(Exception):
        waiting: list[tuple[int, Iterator[object]]] = [(0, iter(file.outline))]
        while waiting:
            level, items = waiting[-1]
            item = next(items, None)
            if item is None:
                waiting.pop()
            elif isinstance(item, list):
                if len(waiting) <= MAX_DEPTH:
                    waiting.append((level + 1, iter(item)))
            else:
                page = file.get_destination_page_number(item)  # type: ignore[arg-type]
                title = " ".join(cleaned(str(getattr(item, "title", ""))).split())[:MAX_HEADING]
                if page is not None and title:
                    found.append(Bookmark(page, level, title))
    return sorted(found, key=lambda bookmark: bookmark.page)


def _without_margins(pages: list[list[str]]) -> list[list[str]]:
    """The lines of the pages without page headers, footers and numbers."""
    often = max(FEWEST_PAGES, int(REPEATED * len(pages)))
    for edge, rest in ((0, slice(1, None)), (-1, slice(-1))):
        count = Counter(_form(page[edge]) for page in pages)
        pages = [page[rest] if len(page) > 1 and count[_form(page[edge])] >= often else page for page in pages]
    return pages


def _form(line: str) -> str:
    return DIGITS.sub("0", line.strip().casefold())


def _sections(pages: Sequence[Sequence[str]], bookmarks: Sequence[Bookmark]) -> Iterator[Section]:
    path: list[Bookmark] = []
    lines: list[str] = []
    following = 0
    for number, page in enumerate(pages):
        start = 0
        while following < len(bookmarks) and bookmarks[following].page <= number:
            bookmark = bookmarks[following]
            following += 1
            place, end = _place(page, bookmark.title, start)
            lines += page[start:place]
            yield from _section(path, lines)
            lines = []
            start = end
            while path and path[-1].level >= bookmark.level:
                path.pop()
            path.append(bookmark)
        lines += page[start:]
    yield from _section(path, lines)


def _section(path: Sequence[Bookmark], lines: Sequence[str]) -> Iterator[Section]:
    text = HYPHEN.sub("", "\n".join(lines)).strip()
    if text:
        yield Section(tuple(bookmark.title for bookmark in path), text)


def _place(page: Sequence[str], title: str, start: int) -> tuple[int, int]:
    """The lines from `start` on that are the title, on one line or two, or else none at `start`."""
    sought = NOT_ALPHANUMERIC.sub("", title.casefold())
    for number in range(start, len(page)):
        one = NOT_ALPHANUMERIC.sub("", page[number].casefold())
        if not one or len(one) > len(sought) + 12:
            continue
        if one.endswith(sought) or (sought.endswith(one) and len(one) > 3 and len(one) * 2 > len(sought)):
            return number, number + 1
        two = one + NOT_ALPHANUMERIC.sub("", page[number + 1].casefold()) if number + 1 < len(page) else ""
        if two.endswith(sought) and len(two) <= len(sought) + 12:
            return number, number + 2
    return start, start
