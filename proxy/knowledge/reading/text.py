"""Makes text from bytes of an unknown encoding."""

from __future__ import annotations

import codecs
import re

from llama_smart_proxy.proxy.knowledge.base import Unreadable

MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
SAMPLE_BYTES = 64 * 1024
"""So much of a text is examined where its encoding is not known: the examination is slow."""
CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")
MOST_CONTROLS = 0.02
"""A larger part of control characters is not text."""
BROKEN = re.compile(r"[\ud800-\udfff]")


def decoded(content: bytes) -> str:
    """The text, with line ends `\\n` and without control characters. Raises: Unreadable, if it is not text."""
    text = _decoded(content)
    sample = text[:SAMPLE_BYTES]
    if len(CONTROLS.findall(sample)) > MOST_CONTROLS * len(sample):
        raise Unreadable("is a binary file")
    return cleaned(text)


def cleaned(text: str) -> str:
    """`text` with line ends `\\n`, without control characters and lone surrogates."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\f", "\n\n")
    return BROKEN.sub("\ufffd", CONTROLS.sub("", text).lstrip("\ufeff"))


def _decoded(content: bytes) -> str:
    for mark, encoding in MARKS:
        if content.startswith(mark):
            return content[len(mark) :].decode(encoding, "replace")
    if b"\0" in content[:SAMPLE_BYTES]:
        return content.decode(_wide(content[:SAMPLE_BYTES]), "replace")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return _mended(content)


def _wide(sample: bytes) -> str:
    """The encoding of a text with zero bytes and without a mark: UTF-16, if every other byte is nearly always zero."""
    for encoding, zeros, others in (("utf-16-le", sample[1::2], sample[::2]), ("utf-16-be", sample[::2], sample[1::2])):
        if zeros.count(0) > 0.7 * len(zeros) and others.count(0) < 0.05 * len(others):
            return encoding
    raise Unreadable("is a binary file")


def _mended(content: bytes) -> str:
    """What is UTF-8 but for a few bytes keeps them as U+FFFD; all else is decoded by its most probable encoding."""
    text = content.decode("utf-8", "replace")
    wrong = text.count("\ufffd")
    if wrong * 10 < sum(1 for char in text[: 16 * SAMPLE_BYTES] if char > "\x7f"):
        return text
    try:
        from charset_normalizer import from_bytes
    except ImportError:
        return content.decode("latin-1")
    best = from_bytes(content[:SAMPLE_BYTES]).best()
    return content.decode(best.encoding if best else "latin-1", "replace")
