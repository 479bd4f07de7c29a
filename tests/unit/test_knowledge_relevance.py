"""How relevance and confidence follow from what a search has found, and how a collection is measured."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from llama_smart_proxy.proxy.knowledge.base import Row
from llama_smart_proxy.proxy.knowledge.index.local import LocalIndex
from llama_smart_proxy.proxy.knowledge.index.words import terms
from llama_smart_proxy.proxy.knowledge.relevance import (
    OTHER,
    Calibration,
    Evidence,
    Sample,
    calibrated,
    confidence,
    evidence,
    measured,
    question_of,
    relevance,
)


def falling(best: float, rest: float, coverage: float = 0.5) -> list[Evidence]:
    return [Evidence(best, coverage)] + [Evidence(rest - at * 0.005, coverage / 2) for at in range(9)]


def test_no_passages_are_no_answer() -> None:
    assert confidence([]) == 0


@pytest.mark.parametrize("calibration", [Calibration(), Calibration(0.62, 0.74)], ids=["MiniLM", "a narrow model"])
def test_the_same_places_between_off_and_near_have_the_same_confidence(calibration: Calibration) -> None:
    def at(*places: float) -> list[Evidence]:
        gap = calibration.near - calibration.off
        return [Evidence(calibration.off + place * gap, 0.5) for place in places]

    assert confidence(at(1.5, *[0.9] * 9), calibration) > 0.7
    assert 0.1 < confidence(at(1.0, *[0.85] * 9), calibration) < 0.5
    assert confidence(at(0.1, *[0.0] * 9), calibration) < 0.02
    assert relevance(at(0.1)[0], calibration) < 0.02 < relevance(at(1.2)[0], calibration)


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        (falling(0.7, 0.5), falling(0.6, 0.5)),
        (falling(0.6, 0.45), falling(0.6, 0.58)),
        (falling(0.6, 0.5, coverage=1.0), falling(0.6, 0.5, coverage=0.1)),
        (falling(0.6, 0.5), falling(0.25, 0.1)),
    ],
    ids=["nearer", "stands out", "more of the words", "not another subject"],
)
def test_what_speaks_for_an_answer_raises_the_confidence(better: list[Evidence], worse: list[Evidence]) -> None:
    assert confidence(better) > confidence(worse)


def test_relevance_grows_with_the_cosine_and_with_the_words_of_the_question() -> None:
    assert relevance(Evidence(0.7, 0.5)) > relevance(Evidence(0.5, 0.5)) > relevance(Evidence(0.5, 0.1))


def test_the_words_that_only_make_a_question_do_not_count_as_covered() -> None:
    assert evidence("How do I sort a hash?", "You can do what I do", 0.5).coverage == 0
    assert evidence("How do I sort a hash?", "Sorting hashes", 0.5).coverage == 1
    assert evidence("", "text", 0.5).coverage == 0


@pytest.mark.parametrize(
    ("sample", "question"),
    [
        (Sample(1, "Manual > Sorting hashes", "Manual > Sorting hashes\n\nText."), "Sorting hashes"),
        (Sample(1, "Manual > Sorting", "Manual > Sorting\n\nKeys come first. Then values."), "Keys come first."),
        (Sample(1, "", "One line"), "One line"),
        (Sample(1, "", " \n"), ""),
    ],
)
def test_a_piece_is_asked_about_by_its_heading_or_its_first_sentence(sample: Sample, question: str) -> None:
    assert question_of(sample) == question


@pytest.mark.parametrize(
    ("off", "near", "expected"),
    [
        ([0.1, 0.2, 0.9], [0.5, 0.6, 0.7], (0.2, 0.6)),
        ([0.3, 0.3], [0.2, 0.2], (0.3, 0.35)),
        ([], [], (0.24, 0.54)),
        ([0.5], [], (0.5, 0.8)),
    ],
    ids=["medians", "never the wrong way round", "nothing known", "one piece"],
)
def test_a_calibration_is_usable_by_whatever_was_measured(
    off: list[float], near: list[float], expected: tuple[float, float]
) -> None:
    found = calibrated(off, near)
    assert (found.off, found.near) == pytest.approx(expected)


class WordVectors:
    """An embedder: a vector for each word, by chance, and their sum for a text."""

    async def identity(self) -> str:
        return "words"

    async def embed(self, texts: Sequence[str], *, background: bool = False) -> NDArray[np.float32]:
        assert background
        found = [sum((self.word(term) for term in terms(text)), np.full(64, 1e-3)) for text in texts]
        return np.array([vector / np.linalg.norm(vector) for vector in found], np.float32)

    def word(self, term: int) -> NDArray[np.float64]:
        return np.random.default_rng(zlib.crc32(str(term).encode())).standard_normal(64)


async def test_a_collection_is_measured_by_questions_from_itself_without_their_own_passages() -> None:
    index, embedder = LocalIndex(), WordVectors()
    texts = [f"Valve {at % 9} of pump {at % 7} is closed. Pressure of valve {at % 9} falls." for at in range(120)]
    vectors = await embedder.embed(texts, background=True)
    await index.open("c", 64, "")
    await index.add("c", [Row(1 + at, "f", text, vectors[at]) for at, text in enumerate(texts)])
    found = await measured(index, "c", embedder, [Sample(1 + at, "", text) for at, text in enumerate(texts)])
    assert found.near > found.off + 0.3
    assert len(set(OTHER)) >= 20
    alone = await measured(index, "never-filled", embedder, [])
    assert alone.near > alone.off
