"""Makes sections from Word and PowerPoint files, by markitdown, and from Excel files."""

from __future__ import annotations

import re
import zipfile
from io import BytesIO
from typing import TYPE_CHECKING

from llama_smart_proxy.proxy.knowledge.base import Unreadable
from llama_smart_proxy.proxy.knowledge.reading import headings
from llama_smart_proxy.proxy.knowledge.reading.kinds import Kind
from llama_smart_proxy.proxy.knowledge.reading.parsed import Parsed, Section, missing
from llama_smart_proxy.proxy.knowledge.reading.text import cleaned

if TYPE_CHECKING:
    from openpyxl.worksheet._read_only import ReadOnlyWorksheet

MAX_UNPACKED_MIB = 256
MAX_FILES = 20_000
COMMENT = re.compile(r"<!--.{0,200}?-->\n?")
IMAGE = re.compile(r"!\[([^\]\n]{0,300})\]\([^)\n]{0,2000}\)")


def parse(content: bytes, kind: Kind) -> Parsed:
    """The sections of a file of one of these kinds. Raises: Unreadable."""
    _check_size(content)
    if kind is Kind.XLSX:
        return _workbook(content)
    try:
        from markitdown import MarkItDown, StreamInfo
        from markitdown._exceptions import (
            FileConversionException,
            MissingDependencyException,
            UnsupportedFormatException,
        )
    except ImportError as exc:
        raise missing("office", "An Office file") from exc
    suffix = f".{kind.name.lower()}"
    try:
        found = MarkItDown(enable_plugins=False).convert_stream(
            BytesIO(content), stream_info=StreamInfo(extension=suffix)
        )
    except MissingDependencyException as exc:
        raise missing("office", f"A {kind.name.lower()} file") from exc
    except (FileConversionException, UnsupportedFormatException) as exc:
        raise Unreadable(f"is a damaged {kind.name.lower()} file") from exc
    return headings.markdown(IMAGE.sub(r"\1", COMMENT.sub("", cleaned(found.markdown))))


def _workbook(content: bytes) -> Parsed:
    """A section with a table for each sheet. markitdown requires a hundred times the memory for it."""
    try:
        import openpyxl
    except ImportError as exc:
        raise missing("office", "An Office file") from exc
    try:
        book = openpyxl.load_workbook(BytesIO(content), read_only=True, data_only=True)
        sections = [
            Section((" ".join(cleaned(sheet.title).split()),), _table(sheet), True) for sheet in book.worksheets
        ]
    except MemoryError:
        raise
    except Exception as exc:  # of many kinds, for damaged files
        raise Unreadable("is a damaged xlsx file") from exc
    return Parsed("", [section for section in sections if section.text])


def _table(sheet: ReadOnlyWorksheet) -> str:
    sheet.reset_dimensions()  # which may be any
    lines: list[str] = []
    for row in sheet.iter_rows(values_only=True):
        cells = ["" if cell is None else " ".join(cleaned(str(cell)).split()).replace("|", "\\|") for cell in row]
        while cells and not cells[-1]:
            cells.pop()
        if cells:
            lines.append(f"| {' | '.join(cells)} |")
            if len(lines) == 1:
                lines.append("|---" * len(cells) + "|")
    return "\n".join(lines)


def _check_size(content: bytes) -> None:
    """Unpacking ends at the size that the archive says."""
    with zipfile.ZipFile(BytesIO(content)) as archive:
        files = archive.infolist()
    if sum(file.file_size for file in files) > MAX_UNPACKED_MIB * 1024 * 1024 or len(files) > MAX_FILES:
        raise Unreadable(f"unpacks to more than {MAX_UNPACKED_MIB} MiB")
    if any(file.flag_bits & 1 for file in files):
        raise Unreadable("is encrypted; a copy without a password can be read")
