"""Makes sections from Word, PowerPoint and Excel files, by markitdown."""

from __future__ import annotations

import re
import zipfile
from io import BytesIO

from llama_smart_proxy.proxy.knowledge.base import Unreadable
from llama_smart_proxy.proxy.knowledge.reading import headings
from llama_smart_proxy.proxy.knowledge.reading.kinds import Kind
from llama_smart_proxy.proxy.knowledge.reading.parsed import Parsed, missing
from llama_smart_proxy.proxy.knowledge.reading.text import cleaned

MAX_UNPACKED_MIB = 256
MAX_FILES = 20_000
EMPTY_CELL = re.compile(r"(?<=\|) (?:NaN|Unnamed: \d+)(?= \|)")
COMMENT = re.compile(r"<!--.{0,200}?-->\n?")
IMAGE = re.compile(r"!\[([^\]\n]{0,300})\]\([^)\n]{0,2000}\)")


def parse(content: bytes, kind: Kind) -> Parsed:
    """The sections of a file of one of these kinds. Raises: Unreadable."""
    _check_size(content)
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
    text = IMAGE.sub(r"\1", COMMENT.sub("", cleaned(found.markdown)))
    return headings.markdown(EMPTY_CELL.sub(" ", text))


def _check_size(content: bytes) -> None:
    """Unpacking ends at the size that the archive says."""
    with zipfile.ZipFile(BytesIO(content)) as archive:
        files = archive.infolist()
    if sum(file.file_size for file in files) > MAX_UNPACKED_MIB * 1024 * 1024 or len(files) > MAX_FILES:
        raise Unreadable(f"unpacks to more than {MAX_UNPACKED_MIB} MiB")
    if any(file.flag_bits & 1 for file in files):
        raise Unreadable("is encrypted; a copy without a password can be read")
