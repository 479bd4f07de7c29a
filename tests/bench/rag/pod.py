"""Perl's documentation format as Markdown. Source: perlpod."""

from __future__ import annotations

import html
import re

_CODE = re.compile(r"([A-Z])<(?:<+\s+((?:(?!\s>>).)*?)\s+>+|([^<>]*))>", re.DOTALL)
_NAMED = {"lt": "<", "gt": ">", "verbar": "|", "sol": "/"}
_LESS, _GREATER = "\x01", "\x02"
"""For angle brackets of texts, until all codes are replaced."""


def as_markdown(pod: str) -> str:
    """The paragraphs of `pod`: headings, lists, and code that is indented."""
    return "\n\n".join(filter(None, map(_paragraph, re.split(r"\n\s*\n", pod))))


def inline(text: str) -> str:
    """One paragraph without formatting codes, from the innermost one on."""
    before = ""
    while before != text:
        before, text = text, _CODE.sub(_code, text)
    return text.replace(_LESS, "<").replace(_GREATER, ">")


def _paragraph(text: str) -> str:
    if text.startswith((" ", "\t")):
        return text.rstrip()
    command = re.match(r"=(\w+)\s*(.*)", text, re.DOTALL)
    if command is None:
        return inline(text).strip()
    kind, rest = command[1], inline(command[2]).strip()
    if kind in ("head1", "head2", "head3", "head4"):
        return f"{'#' * int(kind[-1])} {' '.join(rest.split())}"
    return f"- {rest}" if kind == "item" else ""


def _code(match: re.Match[str]) -> str:
    kind, text = match[1], match[2] if match[2] is not None else match[3]
    if kind == "E":
        text = _NAMED.get(text) or html.unescape(f"&{text};")
    elif kind == "L":
        text = text.partition("|")[0] if "|" in text else text.strip("/").replace("/", ": ").replace('"', "")
    elif kind in "XZ":
        text = ""
    elif kind == "C":
        text = f"`{text}`"
    return text.replace("<", _LESS).replace(">", _GREATER)
