"""Recognises what a document is: by its first bytes, then by its name, then by its media type."""

from __future__ import annotations

import re
import zipfile
from enum import Enum, auto
from io import BytesIO
from pathlib import PurePath

from llama_smart_proxy.proxy.knowledge.base import Unreadable


class Kind(Enum):
    """How a document is read."""

    TEXT = auto()
    MARKDOWN = auto()
    RST = auto()
    POD = auto()
    HTML = auto()
    PDF = auto()
    DOCX = auto()
    PPTX = auto()
    XLSX = auto()


SUFFIXES = {
    "md": Kind.MARKDOWN,
    "markdown": Kind.MARKDOWN,
    "mdown": Kind.MARKDOWN,
    "mkd": Kind.MARKDOWN,
    "mdx": Kind.MARKDOWN,
    "rst": Kind.RST,
    "pod": Kind.POD,
    "html": Kind.HTML,
    "htm": Kind.HTML,
    "xhtml": Kind.HTML,
}
MEDIA_TYPES = {
    "text/markdown": Kind.MARKDOWN,
    "text/x-rst": Kind.RST,
    "text/html": Kind.HTML,
    "application/xhtml+xml": Kind.HTML,
}
HTML_START = re.compile(
    rb"(?:\xef\xbb\xbf)?(?:\s|<\?xml[^>]{0,300}>|<!--.{0,2000}?-->)*<(?:!doctype\s+html|html[\s>])",
    re.IGNORECASE | re.DOTALL,
)
POD_START = re.compile(rb"^=(?:pod|head1|encoding)\b", re.MULTILINE)
HEAD_BYTES = 4096
PARTS = {"word/": Kind.DOCX, "ppt/": Kind.PPTX, "xl/": Kind.XLSX}
"""Folders in an Office file that say what it is. Source: ECMA-376, part 1, annex A."""
REFUSED = {
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "a file of an old Office version; save it as docx, pptx or xlsx",
    b"{\\rtf": "RTF; save it as docx, PDF or text",
    b"%!PS": "PostScript; convert it to PDF",
    b"\x1f\x8b": "compressed (gzip)",
    b"BZh": "compressed (bzip2)",
    b"\xfd7zXZ\x00": "compressed (xz)",
    b"\x28\xb5\x2f\xfd": "compressed (zstd)",
    b"7z\xbc\xaf\x27\x1c": "an archive (7z)",
    b"Rar!\x1a\x07": "an archive (RAR)",
    b"\x89PNG\r\n": "an image",
    b"\xff\xd8\xff": "an image",
    b"GIF8": "an image",
    b"\x7fELF": "a program",
    b"SQLite format 3\x00": "a database",
    b"GGUF": "a model",
}
"""First bytes of what is never text, and what to call it."""


def kind_of(content: bytes, name: str, media_type: str = "") -> Kind:
    """What `content` is. Raises: Unreadable, for what is recognised and not supported."""
    head = content[:HEAD_BYTES]
    if b"%PDF-" in head[:1024]:
        return Kind.PDF
    if head.startswith(b"PK\x03\x04"):
        return _kind_of_archive(content)
    for start, what in REFUSED.items():
        if head.startswith(start):
            raise Unreadable(f"is {what}")
    if HTML_START.match(head):
        return Kind.HTML
    kind = SUFFIXES.get(PurePath(name).suffix.lower().lstrip("."))
    kind = kind or MEDIA_TYPES.get(media_type.partition(";")[0].strip().lower())
    if kind is None and POD_START.match(head):
        return Kind.POD
    return kind or Kind.TEXT


def _kind_of_archive(content: bytes) -> Kind:
    try:
        with zipfile.ZipFile(BytesIO(content)) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as exc:
        raise Unreadable("is a damaged Office file or archive") from exc
    for folder, kind in PARTS.items():
        if "[Content_Types].xml" in names and any(name.startswith(folder) for name in names):
            return kind
    raise Unreadable("is an archive (zip) and no Word, PowerPoint or Excel file")
