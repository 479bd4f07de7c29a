"""Makes sections from HTML: trafilatura finds what is content, the blocks of the page keep their structure.

trafilatura alone loses headings, code blocks and, on pages of references, most of the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import groupby
from typing import TYPE_CHECKING

from llama_smart_proxy.proxy.knowledge.base import Unreadable
from llama_smart_proxy.proxy.knowledge.reading import headings
from llama_smart_proxy.proxy.knowledge.reading.blocks import Block, blocks_of
from llama_smart_proxy.proxy.knowledge.reading.headings import Heading
from llama_smart_proxy.proxy.knowledge.reading.parsed import Parsed, Section, missing
from llama_smart_proxy.proxy.knowledge.reading.text import cleaned, decoded

if TYPE_CHECKING:
    from lxml.html import HtmlElement

TAG = re.compile(r"<[a-zA-Z!/][^<>]{0,2000}>")
WORD = re.compile(r"[^\W\u3040-\u30ff\u3400-\u9fff]+|[\u3040-\u30ff\u3400-\u9fff]")
RUN = 3
"""A block is compared by its runs of so many words."""
COVERED = 0.5
"""A block is content if so much of it has been found; and what has been found is believed if it is so much of all text
outside of links."""

CONTENTS = 8
"""So many blocks of links in a row are a table of contents: it would be found for each question and answer none."""


def parse(content: bytes) -> Parsed:
    """The sections of a page, by its headings. Raises: Unreadable."""
    try:
        import trafilatura
    except ImportError as exc:
        raise missing("rag", "HTML") from exc
    tree: HtmlElement | None = trafilatura.load_html(content)
    if tree is None:  # only a part of a page, or none
        text = decoded(content)
        if not TAG.search(text):
            return Parsed("", [Section((), text.strip())])
        tree = trafilatura.load_html(f"<html><body>{text}</body></html>")
    if tree is None:
        raise Unreadable("contains no HTML")
    title = " ".join(cleaned(tree.findtext(".//title") or "").split())[: headings.MAX_HEADING]
    blocks = blocks_of(tree)
    found = ""
    with suppress(Exception):  # of any kind, for odd pages: all blocks are content then
        found = trafilatura.extract(tree, output_format="txt", include_comments=False, favor_recall=True) or ""
    document = _document(_content(blocks, found))
    return Parsed(title or document.title, document.sections)


def _content(blocks: Sequence[Block], found: str) -> list[Block]:
    """The headings and those blocks that are in `found`; if too little of the text is, all but links; all, if there is
    nothing but links."""
    known = set(_runs(WORD.findall(found.casefold())))
    states = [_is_found(block, known) for block in blocks]
    prose = kept = 0
    chosen: list[Block] = []
    before = False  # the state of the block before that has enough words for one
    for block, state, after in zip(blocks, states, _following(states), strict=True):
        before = before if state is None else state
        is_content = before or (state is None and after and not block.is_links)
        words = 0 if block.level or block.is_links else len(block.text)
        prose += words
        if block.level or is_content:
            kept += words
            chosen.append(block)
    if prose == 0:  # an index
        return list(blocks)
    if kept < COVERED * prose:
        return [block for block in blocks if block.level or not block.is_links]
    groups = [(links, list(group)) for links, group in groupby(chosen, lambda block: block.is_links)]
    return [block for links, group in groups if not links or len(group) < CONTENTS for block in group]


def _is_found(block: Block, known: set[tuple[str, ...]]) -> bool | None:
    """Whether the block is in the text with these runs of words; None if it has too few words, or is a heading."""
    runs = [] if block.level else _runs(WORD.findall(block.text.casefold()))
    return sum(run in known for run in runs) >= COVERED * len(runs) if runs else None


def _following(states: Sequence[bool | None]) -> list[bool]:
    """For each block, the state of the next one that has one."""
    found: list[bool] = []
    after = False
    for state in reversed(states):
        found.append(after)
        after = after if state is None else state
    return found[::-1]


def _runs(words: Sequence[str]) -> list[tuple[str, ...]]:
    return list(zip(*(words[start:] for start in range(RUN)), strict=False))


def _document(blocks: Iterable[Block]) -> Parsed:
    lines: list[str] = []
    found: list[Heading] = []
    for block in blocks:
        if block.level:
            found.append(Heading(block.level, block.text.rstrip(" #¶§"), len(lines), len(lines) + 1))
            lines.append(block.text)
        else:
            if lines and not block.continues:
                lines.append("")
            lines += block.text.split("\n")
    return headings.parsed(lines, found, is_markdown=True)
