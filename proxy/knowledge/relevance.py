"""Estimates: whether a passage answers a question, and whether a collection has an answer at all.

Cosines of different embedding models are not comparable: so each collection is measured (`measured`), without a model
for language. Its passages give questions about its subject, their own passages left out (`near`); questions about other
things give the cosine of what is not there at all (`off`). On that scale the weights below were fitted, by one half of
the questions of `make eval-rag`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp
from statistics import fmean, median
from typing import TYPE_CHECKING, NamedTuple, Protocol

from llama_smart_proxy.proxy.knowledge.base import Embedder, Hit
from llama_smart_proxy.proxy.knowledge.index.words import question_terms, terms

if TYPE_CHECKING:
    from llama_smart_proxy.proxy.knowledge.base import Vector

COMPARED = 10
"""How many of the best passages `confidence` compares."""
SAMPLED = 60
"""Passages that a collection is measured by."""
LEAST_GAP = 0.05
"""`near` is at least so far above `off`, also in a collection with few passages."""
ADJACENT = 2
"""Passages before and after one that may have been cut from the same sentence."""
LONGEST = 200
"""Characters of a sentence that is used as a question."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """The usual best cosine for a question about something else (`off`), and for one about the subject of a collection
    that has no answer to it (`near`). The defaults are those of MiniLM in technical documentation."""

    off: float = 0.24
    near: float = 0.54

    def scaled(self, cosine: float) -> float:
        """A cosine on the scale that has `off` at 0 and `near` at 1."""
        return (cosine - self.off) / (self.near - self.off)


class Evidence(NamedTuple):
    """What is known of a passage: its cosine with the question, and how much of the question's words it has, 0 to 1."""

    cosine: float
    coverage: float


def evidence(question: str, text: str, cosine: float) -> Evidence:
    """The evidence of a passage with this text and cosine."""
    asked = set(question_terms(question))
    return Evidence(cosine, len(asked & set(terms(text))) / len(asked) if asked else 0.0)


def relevance(found: Evidence, calibration: Calibration = Calibration()) -> float:
    """The probability that a passage, one of the best of a search, answers the question."""
    scaled = calibration.scaled(found.cosine)
    return _topical(scaled) * _sigmoid(-2.9 + 0.7 * scaled + 1.6 * found.coverage)


def confidence(found: Sequence[Evidence], calibration: Calibration = Calibration()) -> float:
    """The probability that the answer is among the passages of a search, of which at least `COMPARED` should be given.
    It is high where the best one stands out among those that follow, and none if there are none."""
    if not found:
        return 0.0
    cosines = sorted((calibration.scaled(each.cosine) for each in found), reverse=True)[:COMPARED]
    margin = cosines[0] - fmean(cosines[1:]) if len(cosines) > 1 else 0.0
    coverage = max(each.coverage for each in found[: COMPARED // 2])
    return _topical(cosines[0]) * _sigmoid(-2.8 + 0.6 * cosines[0] + 3.8 * margin + 1.1 * coverage)


def _topical(scaled: float) -> float:
    """The probability that something of this cosine is about the subject of the question at all."""
    return _sigmoid(12 * (scaled - 0.45))


def _sigmoid(value: float) -> float:
    return 1 / (1 + exp(-max(-60.0, min(60.0, value))))


# -- the measurement of a collection -----------------------------------------------------------------------------------


class Searched(Protocol):
    """The part of an `Index` that a measurement uses."""

    async def search(self, collection: str, query: str, vector: Vector, limit: int) -> list[Hit]:
        """As `Index.search`."""


class Sample(NamedTuple):
    """A piece of a collection: its number, the path of its headings, its text."""

    piece: int
    heading: str
    text: str


async def measured(index: Searched, collection: str, embedder: Embedder, samples: Sequence[Sample]) -> Calibration:
    """The calibration of a collection, by up to `SAMPLED` of its pieces, taken by chance. Raises: ProxyError."""
    asked = [(sample.piece, text) for sample in samples[:SAMPLED] if (text := question_of(sample))]
    other = [(-ADJACENT - 1, question) for question in OTHER]  # of no piece
    off, near = [await _best(index, collection, embedder, questions) for questions in (other, asked)]
    return calibrated(off, near)


def calibrated(off: Sequence[float], near: Sequence[float]) -> Calibration:
    """The calibration by the best cosines of questions about other things, and about the subject."""
    low = median(off) if off else Calibration().off
    return Calibration(low, max(median(near) if near else low + 0.3, low + LEAST_GAP))


def question_of(sample: Sample) -> str:
    """What could be asked about a piece: its heading, else its first sentence."""
    heading = sample.heading.rpartition(" > ")[2].strip()
    if len(heading.split()) > 1:
        return heading
    body = sample.text.removeprefix(sample.heading).strip()
    return " ".join(re.split(r"(?<=[.!?])\s", body, maxsplit=1)[0].split())[:LONGEST]


async def _best(index: Searched, collection: str, embedder: Embedder, asked: Sequence[tuple[int, str]]) -> list[float]:
    """For each piece and its question the best cosine of the other pieces, if there are any."""
    vectors = await embedder.embed([question for _, question in asked], background=True) if asked else ()
    found = []
    for (piece, question), vector in zip(asked, vectors, strict=True):
        hits = await index.search(collection, question, vector, COMPARED + 2 * ADJACENT + 1)
        found.append([hit.dense for hit in hits if hit.dense is not None and abs(hit.piece - piece) > ADJACENT])
    return [max(cosines) for cosines in found if cosines]


OTHER = (
    "How do I remove a coffee stain from a sofa?",
    "Which river flows through Vienna?",
    "How long does a goose egg take to hatch?",
    "Who composed the Brandenburg Concertos?",
    "What helps against a sore throat?",
    "How do I sharpen a kitchen knife?",
    "When is the best season to plant tulips?",
    "Which languages are spoken in Switzerland?",
    "How do I fold a paper crane?",
    "What should a puppy eat in its first weeks?",
    "Who was the first emperor of China?",
    "How far is the moon from the earth?",
    "How do I tie a bow tie?",
    "What does a mortgage broker do?",
    "Which muscles does rowing train?",
    "How is cheese made from milk?",
    "What is the offside rule in football?",
    "How do I repaint a wooden window frame?",
    "Why do whales sing?",
    "What are the ingredients of a good curry?",
    "How do I cope with jet lag?",
    "Which trees keep their leaves in winter?",
    "What is a sonnet?",
    "How do I choose a tent for camping?",
)
"""Questions about everyday life. Of a collection about one of these subjects the median is still that of the others."""
