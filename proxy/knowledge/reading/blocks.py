"""The blocks of a page of HTML, as Markdown: headings, paragraphs, list items, rows of tables, code."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from llama_smart_proxy.proxy.knowledge.reading.text import cleaned

if TYPE_CHECKING:
    from lxml.html import HtmlElement

SKIPPED = {"head", "script", "style", "noscript", "template", "nav", "footer", "aside", "form", "button", "select"}
SKIPPED |= {"dialog", "iframe", "object", "svg", "canvas"}
HEADINGS = {f"h{level}": level for level in range(1, 7)}
BREAKING = {"address", "article", "blockquote", "body", "br", "caption", "center", "dd", "details", "div", "dl", "dt"}
BREAKING |= {"fieldset", "figcaption", "figure", "header", "hr", "html", "li", "main", "ol", "p", "pre", "section"}
BREAKING |= {"summary", "table", "tbody", "td", "tfoot", "th", "thead", "tr", "ul", *HEADINGS}
NO_CELLS = ("ul", "ol", "table", "pre", "blockquote", *HEADINGS)
"""A table with such elements is there for the layout."""
MOSTLY_LINKS = 0.5


class Block(NamedTuple):
    """A part of a page: its Markdown; the level of a heading, which has no mark in the text, else 0; whether it is
    mostly links; whether it is in one list or table with the block before."""

    text: str
    level: int = 0
    is_links: bool = False
    continues: bool = False


def blocks_of(tree: HtmlElement) -> list[Block]:
    """The blocks of a page, in order."""
    from lxml import etree

    walk = _Walk()
    events = etree.iterwalk(tree, events=("start", "end"))
    for event, element in events:
        tag = element.tag
        if event == "start":
            if not isinstance(tag, str) or tag in SKIPPED:  # comments have a function for a tag
                events.skip_subtree()
            elif tag == "pre":
                walk.code("".join(element.itertext()))
                events.skip_subtree()
            else:
                walk.begin(tag, element)
        else:
            if isinstance(tag, str) and tag not in SKIPPED and tag != "pre":
                walk.end(tag)
            walk.text(element.tail)
    walk.flush()
    return walk.blocks


class _Walk:
    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self._text: list[str] = []
        self._linked = 0  # characters in links
        self._links = 0  # links that are open
        self._level = 0
        self._lists: list[str] = []  # the tags of lists that are open
        self._mark = ""  # of the list item that begins
        self._tables: list[bool] = []  # whether the rows of the tables that are open are lines
        self._cells: list[str] = []
        self._heads = False  # whether one of them is a heading
        self._had: set[str] = set()  # what the block before was part of

    def text(self, text: str | None) -> None:
        if text:
            self._text.append(text)
            if self._links:
                self._linked += len(text)

    def begin(self, tag: str, element: HtmlElement) -> None:
        if tag in BREAKING and not self._in_row:
            self.flush()
        elif tag in BREAKING:
            self._text.append(" ")
        if tag == "a":
            self._links += 1
        elif tag in HEADINGS:
            self._level = HEADINGS[tag]
        elif tag in ("ul", "ol"):
            self._lists.append(tag)
        elif tag == "li":
            self._mark = "- "
        elif tag == "table":
            self._tables.append(next(element.iterdescendants(*NO_CELLS), None) is None)
        self.text(element.text)

    def end(self, tag: str) -> None:
        if self._in_row and tag in ("td", "th"):
            self._cells.append(" ".join("".join(self._text).split()).replace("|", "\\|"))
            self._text = []
            self._heads = self._heads or tag == "th"
        elif self._in_row and tag == "tr":
            self._row()
        elif tag in BREAKING and (not self._in_row or tag == "table"):
            self.flush()
        if tag == "a":
            self._links -= 1
        elif tag in HEADINGS:
            self._level = 0
        elif tag in ("ul", "ol") and self._lists:
            self._lists.pop()
        elif tag == "table" and self._tables:
            self._tables.pop()

    def code(self, text: str) -> None:
        """A block of code, as it is."""
        self.flush()
        text = cleaned(text).strip("\n")
        if text.strip():
            fence = "~~~~" if "```" in text else "```"
            self._add(Block(f"{fence}\n{text}\n{fence}"), "")

    def flush(self) -> None:
        """The block that has been collected ends."""
        text = " ".join(cleaned("".join(self._text)).split())
        links = self._linked > MOSTLY_LINKS * max(1, len(text))
        self._text, self._linked = [], 0
        if not text:
            return
        if self._level:
            self._add(Block(text, self._level), "")
            return
        indent = "  " * (len(self._lists) - 1)
        mark = indent + self._mark if self._mark else "  " + indent if self._lists else ""
        self._mark = ""
        self._add(Block(mark + text, 0, links), "list" if self._lists else "")

    @property
    def _in_row(self) -> bool:
        return bool(self._tables) and self._tables[-1]

    def _row(self) -> None:
        cells, self._cells = self._cells, []
        links = self._linked > MOSTLY_LINKS * max(1, sum(map(len, cells)))
        self._text, self._linked = [], 0
        if any(cells):
            line = f"| {' | '.join(cells)} |"
            if self._heads and "table" not in self._had:
                line += "\n" + "|---" * len(cells) + "|"
            self._add(Block(line, 0, links), "table")
        self._heads = False

    def _add(self, block: Block, part_of: str) -> None:
        self.blocks.append(block._replace(continues=bool(part_of) and part_of in self._had))
        self._had = {part_of} if part_of else set()
