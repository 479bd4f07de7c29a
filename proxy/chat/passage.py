"""Pieces of documents and web pages that an answer can be based on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of a document. `text` begins with the path of its headings, if it has any, which is also `heading`
    ("Manual > Setup"). `number` is its position in the document; `url` where that came from, empty for an upload.

    `score` ranks the passages of one search, 0 to 1. `relevance` is the estimated probability that the passage answers
    the query, calibrated for its collection, so that it can be compared over searches.
    """

    text: str
    document: str
    heading: str = ""
    number: int = 0
    collection: str = ""
    document_id: str = ""
    url: str = ""
    score: float = 0.0
    relevance: float = 0.0
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Found:
    """The result of a search: the best passages first, and `confidence`, the estimated probability that the searched
    collections contain the answer at all (the CRAG trigger)."""

    passages: Sequence[Passage] = ()
    confidence: float = 0.0
