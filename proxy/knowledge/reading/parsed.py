"""What the formats have in common: a document as its title and its sections, and the error for a missing package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from llama_smart_proxy.proxy.knowledge.base import Unreadable


class Section(NamedTuple):
    """The text between two headings, and the headings above it from the outermost inwards, without the title."""

    path: tuple[str, ...]
    text: str
    is_markdown: bool = False


class Parsed(NamedTuple):
    """A document; its title is empty if it has none."""

    title: str
    sections: Sequence[Section]


def missing(extra: str, what: str) -> Unreadable:
    """The error for a document that requires packages which are not installed."""
    return Unreadable(f"{what} requires a package that is not installed: pip install 'llama-smart-proxy[{extra}]'")
