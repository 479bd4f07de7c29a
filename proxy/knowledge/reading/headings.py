"""Finds the headings of Markdown, reStructuredText and POD, and makes sections of what is between them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from llama_smart_proxy.proxy.knowledge.reading.parsed import Parsed, Section

FRONT_MATTER = re.compile(
    r"\A(?:---[ \t]*\n(.*?)^(?:---|\.\.\.)[ \t]*$\n?|\+\+\+[ \t]*\n(.*?)^\+\+\+[ \t]*$\n?)", re.M | re.S
)
TITLE = re.compile(r"^title[ \t]*+[:=](.*)", re.M | re.I)
FENCE = re.compile(r" {0,3}(`{3,}|~{3,})(.*)")
ATX = re.compile(r" {0,3}(#{1,6})(?:[ \t](.*))?")
SETEXT = re.compile(r" {0,3}(=+|-+)[ \t]*")
RULED = re.compile(r"([!-/:-@\[-`{-~])\1{2,}[ \t]*")
POD_HEADING = re.compile(r"=head([1-6])[ \t]+(.*)")
POD_MARKUP = re.compile(r"[A-Z]<([^<>]*)>")
NOT_TITLES = re.compile(r"[ \t]*(?:[-*+>|]|\d+[.)]|$)")
"""Starts of lines that are no headings, also if a line of `-` follows."""
MARKUP = re.compile(r"!?\[([^\]\[]*)\]\([^()\s]*(?:\s[^()]*)?\)|<[^<>\n]{1,200}>|[*`]+|\{#[^{}]*\}")
MAX_HEADING = 300


class Heading(NamedTuple):
    """A heading: its level from 1, its text, and the lines that it has."""

    level: int
    text: str
    start: int
    end: int


def markdown(text: str) -> Parsed:
    """The sections of a Markdown text, without its front matter."""
    front = FRONT_MATTER.match(text)
    title = ""
    if front:
        found = TITLE.search(front[1] or front[2] or "")
        title = found[1].strip() if found else ""
        title = title[1:-1].strip() if title[:1] in ("'", '"') and title[:1] == title[-1:] else title
        text = text[front.end() :]
    lines = text.split("\n")
    return parsed(lines, _markdown_headings(lines), title, is_markdown=True)


def restructured(text: str) -> Parsed:
    """The sections of a text in reStructuredText."""
    lines = text.split("\n")
    return parsed(lines, _ruled_headings(lines))


def pod(text: str) -> Parsed:
    """The sections of a text in Perl's POD. If it begins with "NAME", that section has the title."""
    lines = text.split("\n")
    found = [
        Heading(int(match[1]), plain(POD_MARKUP.sub(r"\1", match[2])), number, number + 1)
        for number, line in enumerate(lines)
        if (match := POD_HEADING.fullmatch(line))
    ]
    title = ""
    if found and found[0].text == "NAME":
        title = " ".join(next((line for line in lines[found[0].end :] if line.strip()), "").split())[:MAX_HEADING]
    return parsed(lines, found, title)


def plain(heading: str) -> str:
    """The text of a heading without markup, on one line."""
    return " ".join(MARKUP.sub(lambda match: match[1] or "", heading[: 4 * MAX_HEADING]).split())[:MAX_HEADING]


def parsed(lines: list[str], headings: Iterable[Heading], title: str = "", is_markdown: bool = False) -> Parsed:
    """A document from its lines and headings. Without a `title`, the only heading of the first level is that,
    if it is the first."""
    headings = [heading for heading in headings if heading.text]
    if not title and headings and headings[0].level == 1 and all(heading.level > 1 for heading in headings[1:]):
        title = headings[0].text
    sections: list[Section] = []
    path: list[Heading] = []
    start = 0
    for heading in (*headings, None):
        text = "\n".join(lines[start : heading.start if heading else len(lines)]).strip("\n")
        if text.strip():
            sections.append(Section(tuple(above.text for above in path), text.rstrip(), is_markdown))
        if heading:
            while path and path[-1].level >= heading.level:
                path.pop()
            path.append(heading)
            start = heading.end
    return Parsed(title, sections)


def _markdown_headings(lines: list[str]) -> Iterator[Heading]:
    fence = ""
    for number, line in enumerate(lines):
        if match := FENCE.fullmatch(line):
            mark = match[1]
            if not fence and not (mark[0] == "`" and "`" in match[2]):
                fence = mark
            elif fence and mark.startswith(fence) and not match[2].strip():
                fence = ""
        elif not fence and (found := ATX.fullmatch(line)):
            yield Heading(len(found[1]), plain(_unclosed(found[2] or "")), number, number + 1)
        elif not fence and number and (found := SETEXT.fullmatch(line)) and _is_title(lines, number - 1):
            yield Heading(1 if "=" in line else 2, plain(lines[number - 1]), number - 1, number + 1)


def _unclosed(text: str) -> str:
    """The text of a heading without the row of `#` that may close it."""
    text = text.strip()
    opened = text.rstrip("#")
    return opened.rstrip() if not opened or opened[-1].isspace() else text


def _is_title(lines: list[str], number: int) -> bool:
    """Whether a line is a paragraph of its own that may be a heading."""
    line = lines[number]
    alone = number == 0 or not lines[number - 1].strip()
    return alone and not line.startswith(("    ", "\t")) and not NOT_TITLES.match(line) and not ATX.fullmatch(line)


def _ruled_headings(lines: list[str]) -> Iterator[Heading]:
    """Titles with a line of punctuation below, or above and below. Their levels are in the order of appearance."""
    levels: list[tuple[str, bool]] = []
    end = 0
    for number in range(1, len(lines)):
        line, rule = lines[number - 1].rstrip(), lines[number].rstrip()
        if number <= end or not line.strip() or not RULED.fullmatch(rule) or RULED.fullmatch(line):
            continue
        over = number >= 2 and lines[number - 2].rstrip() == rule and number - 2 >= end
        alone = over or number < 2 or not lines[number - 2].strip()
        if not alone or (not over and line[0].isspace()) or len(rule) < len(line.strip()):
            continue
        style = (rule[0], over)
        if style not in levels:
            levels.append(style)
        yield Heading(levels.index(style) + 1, plain(line), number - 2 if over else number - 1, number + 1)
        end = number + 1
