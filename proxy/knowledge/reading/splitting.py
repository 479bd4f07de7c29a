"""Makes pieces from the sections of a document.

Every piece begins with its headings ("Manual > Setup"), as these say what its text is about: it is found by them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from llama_smart_proxy.proxy.knowledge.base import Chunking, Piece
from llama_smart_proxy.proxy.knowledge.reading.parsed import Parsed, Section, missing
from llama_smart_proxy.proxy.knowledge.reading.tables import long_tables

if TYPE_CHECKING:
    from semantic_text_splitter import MarkdownSplitter, TextSplitter

SEPARATOR = " > "
GAP = "\n\n"
MAX_PART = 80
"""Characters of one heading in a path."""
TITLE_PARTS = re.compile(r" [|\u00b7\u2013\u2014-] |: ")
LONG_ENOUGH = 8
"""A heading that is one of these parts of the title ("Setup | Manual") is not repeated, nor is one of so many
characters anywhere in it."""
TINY = 5
"""A piece of less than this fraction of the limit is joined with its neighbours."""
TOKENS = 440
"""Tokens of a piece at most, by an estimate. Embedding models such as MiniLM read 512, with their marks; what is most
dense has some more than estimated."""
SLAB = 20_000
"""Characters that are split at a time: a paragraph takes time in proportion to the square of its length."""
FENCE = re.compile(r"^ {0,3}(?:```|~~~)", re.MULTILINE)
SINGLE = re.compile(r"[^\w\s]|[^\x00-\u024f\u1e00-\u1eff\s]|_")
"""Characters that are a token each: punctuation, and letters that are not Latin."""
HANGUL = re.compile(r"[\uac00-\ud7a3]")
"""Syllables that are split in two or three letters, with a token each."""
DENSE = re.compile(r"\d|[bcdfghjklmnpqrstvwxz]{4}", re.IGNORECASE)
ANY_WORD = re.compile(r"[^\W_]")
NOT_WORDS = re.compile(r"[\W_]+")
WORD = re.compile(r"[0-9A-Za-z\u00c0-\u024f\u1e00-\u1eff]+")


def pieces(document: Parsed, name: str, chunking: Chunking) -> Iterator[Piece]:
    """The pieces of a document that is called `name`."""
    title = document.title or name
    for path, text, is_markdown in _joined(document.sections, chunking.characters // TINY, chunking.characters):
        heading = heading_path(title, path, chunking.characters // 3)
        prefix = heading + GAP if heading else ""
        room = max(1, chunking.characters - len(prefix))
        limit = max(TOKENS, chunking.characters * TOKENS // 900) - tokens(prefix)
        for part in _parts(text, room, min(chunking.overlap, room // 2), limit, is_markdown):
            if ANY_WORD.search(part):
                yield Piece(prefix + part, heading)


def heading_path(title: str, path: Sequence[str], room: int) -> str:
    """The title and the headings below it, on one line of at most `room` characters; the outer ones are left out first,
    but for the title."""
    title = " ".join(title.split())
    while path and _repeats(path[0], title):
        path = path[1:]
    parts = [_shortened(part, MAX_PART) for part in (title, *path) if part]
    text = SEPARATOR.join(parts)
    while len(text) > room and len(parts) > 2:
        del parts[1]
        text = SEPARATOR.join([parts[0], "…", *parts[1:]])
    if len(text) > room and len(parts) > 1:
        text = SEPARATOR.join(_shortened(part, (room - len(SEPARATOR)) // 2) for part in parts)
    return _shortened(text, room)


def _repeats(heading: str, title: str) -> bool:
    one, other = _words(heading), _words(title)
    return one in map(_words, TITLE_PARTS.split(title)) or (len(one) >= LONG_ENOUGH and f" {one} " in f" {other} ")


def _words(text: str) -> str:
    return " ".join(NOT_WORDS.sub(" ", text.casefold()).split())


def _shortened(text: str, room: int) -> str:
    return text if len(text) <= room else text[: max(0, room - 1)].rstrip() + "…"


def tokens(text: str) -> int:
    """An upper estimate of the tokens that an embedding model with a vocabulary of English makes of `text`."""
    words = sum(map(_word_tokens, WORD.findall(text)))
    return words + len(SINGLE.findall(text)) + 3 * len(HANGUL.findall(text)) // 2


def _word_tokens(word: str) -> int:
    if DENSE.search(word):  # it is no word, and has a token for one or two characters
        if len(word) < 8 and not word.isdigit():
            return len(word)
        return (3 * len(word) + 3) // 4 - (1 < len(word) < 4)
    return 1 + (len(word) - 1) // (4 if word.isascii() else 2)


def _joined(sections: Iterable[Section], tiny: int, limit: int) -> Iterator[Section]:
    """The sections; tiny ones are joined with the next below the same heading, so that neither stands alone."""
    held: Section | None = None
    for section in sections:
        if held is None:
            held = section
            continue
        joined = _join(held, section) if min(len(held.text), len(section.text)) < tiny else None
        if joined and len(joined.text) + len(SEPARATOR.join(joined.path)) < limit * 3 // 4:
            held = joined
        else:
            yield held
            held = section
    if held is not None:
        yield held


def _join(one: Section, other: Section) -> Section | None:
    """Both, below the headings that they have in common, each after the headings that it has alone; None if the first
    headings differ."""
    common = 0
    for a, b in zip(one.path, other.path, strict=False):
        if a != b:
            break
        common += 1
    if common == 0 and one.path and other.path:
        return None
    texts = [GAP.join([*section.path[common:], section.text]) for section in (one, other)]
    return Section(one.path[:common], GAP.join(texts), one.is_markdown)


def _parts(text: str, room: int, overlap: int, limit: int, is_markdown: bool) -> Iterator[str]:
    """`text` in parts of at most `room` characters and `limit` tokens."""
    for slab in _slabs(text, max(SLAB, 8 * room)):
        for segment, head in long_tables(slab, room) if is_markdown else [(slab, "")]:
            for part in _split(segment, room - len(head), overlap, is_markdown):
                for small in _parts_by_tokens(part, limit - tokens(head), is_markdown):
                    yield head + small


def _split(text: str, room: int, overlap: int, is_markdown: bool) -> Sequence[str]:
    return [text] if len(text) <= room else _splitter(is_markdown, room, overlap).chunks(text)


def _slabs(text: str, size: int) -> Iterator[str]:
    """`text` in large parts, which end with a paragraph if possible, and not inside of a block of code."""
    start = 0
    while len(text) - start > size:
        middle, end = start + size // 2, start + size
        fences = [fence.start() for fence in FENCE.finditer(text, start, end)]
        if len(fences) % 2 and fences[-1] > middle:
            end = fences[-1]
        else:
            places = (text.rfind(mark, middle, end) + len(mark) for mark in ("\n\n", "\n", " "))
            end = next((place for place in places if place > middle), end)
        yield text[start:end]
        start = end
    yield text[start:]


def _parts_by_tokens(text: str, limit: int, is_markdown: bool) -> Iterator[str]:
    """Most texts are one part. Others are split at about the characters that the limit leaves them."""
    count = tokens(text) if 3 * len(text) > limit else 0
    if count <= limit or len(text) == 1:
        yield text
        return
    room = max(1, min(len(text) * limit // count, len(text) - 1))
    for part in _split(text, room, 0, is_markdown):
        yield from _parts_by_tokens(part, limit, is_markdown)


@lru_cache(256)
def _splitter(is_markdown: bool, room: int, overlap: int) -> MarkdownSplitter | TextSplitter:
    try:
        from semantic_text_splitter import MarkdownSplitter, TextSplitter
    except ImportError as exc:  # what fits in one piece requires nothing
        raise missing("rag", "A document of more than one piece") from exc
    return MarkdownSplitter(room, overlap) if is_markdown else TextSplitter(room, overlap)
