"""The index in the process: what is found is what comparing with every piece finds."""

from __future__ import annotations

import asyncio
import re
from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray

from llama_smart_proxy.proxy.knowledge.base import Row
from llama_smart_proxy.proxy.knowledge.index import matrix, postings
from llama_smart_proxy.proxy.knowledge.index.fusion import fuse
from llama_smart_proxy.proxy.knowledge.index.local import LocalIndex
from llama_smart_proxy.proxy.knowledge.index.words import stem, terms

SUBJECTS = ["anchor", "bridge", "candle", "desert", "engine", "forest", "garden", "harbour", "island", "jacket"]


def unit_rows(count: int, dimensions: int, seed: int = 1, near: float = 0.8) -> NDArray[np.float32]:
    """Vectors in clusters, as those of texts are."""
    random = np.random.default_rng(seed)
    centres = random.standard_normal((max(1, count // 50), dimensions), dtype=np.float32)
    rows = near * centres[random.integers(0, len(centres), count)]
    rows += random.standard_normal((count, dimensions), dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)  # type: ignore[no-any-return]


def pieces(count: int, dimensions: int = 32, first: int = 1) -> list[Row]:
    vectors = unit_rows(count, dimensions, seed=first)
    return [
        Row(first + at, f"file-{at % 7}", f"{SUBJECTS[at % 10]} number{first + at} is described here", vectors[at])
        for at in range(count)
    ]


@pytest.mark.parametrize(
    ("exact", "recall"), [(10**9, 1.0), (0, 0.9)], ids=["all cosines", "signs first, then the likely"]
)
@pytest.mark.parametrize("dimensions", [384, 100], ids=str)
def test_the_nearest_vectors_are_found(
    monkeypatch: pytest.MonkeyPatch, exact: int, recall: float, dimensions: int
) -> None:
    monkeypatch.setattr(matrix, "EXACT", exact)
    vectors = unit_rows(matrix.BLOCK + 1000, dimensions)
    kept = matrix.Matrix(dimensions)
    for part in np.array_split(vectors, 7):
        kept.add(part)
    allowed = np.arange(len(vectors)) % 3 > 0
    found = []
    for query in unit_rows(8, dimensions, seed=2):
        rows, cosines = kept.snapshot().nearest(query, 10, allowed)
        expected = np.argsort(-(vectors @ query) + 9 * ~allowed)[:10]
        found.append(len({*rows} & {*expected}) / 10)
        assert np.allclose(cosines, vectors[rows] @ query, atol=2e-4) and allowed[rows].all()
    assert np.mean(found) >= recall


def brute_bm25(texts: list[str], query: str) -> list[float]:
    found = [Counter(terms(text)) for text in texts]
    mean = sum(sum(each.values()) for each in found) / len(found)
    scores = [0.0] * len(texts)
    for word in terms(query):
        containing = sum(word in each for each in found)
        rarity = np.log(1 + (len(texts) - containing + 0.5) / (containing + 0.5))
        for at, each in enumerate(found):
            norm = 1.2 * (0.25 + 0.75 * sum(each.values()) / mean)
            scores[at] += rarity * each[word] * 2.2 / (each[word] + norm)
    return scores


def scores(kept: postings.Postings, query: str) -> NDArray[np.float32]:
    found = kept.snapshot()
    return found.scores(found.entries(query), np.arange(len(found.lengths)))


def test_the_score_of_a_text_is_bm25_in_segments_of_any_size_and_after_removals() -> None:
    texts = [" ".join(SUBJECTS[: at % 9]) + f" x{at} engine" * (at % 3) for at in range(1, 400)]
    kept = postings.Postings()
    for part in np.array_split(np.arange(len(texts)), [1, 2, 50, 51, 52, 300]):
        kept.add([texts[at] for at in part])
    for query in ("engine forest forest", "the x17 of bridge", "", "absent"):
        assert np.allclose(scores(kept, query), brute_bm25(texts, query), rtol=1e-4)
    some = kept.rows(np.arange(0, len(texts), 3))
    assert np.allclose(scores(some, "engine x9"), brute_bm25(texts[::3], "engine x9"), rtol=1e-4)


@pytest.mark.parametrize("scanned", [10**9, 50], ids=["all words", "rare words first"])
def test_the_best_texts_are_found(monkeypatch: pytest.MonkeyPatch, scanned: int) -> None:
    monkeypatch.setattr(postings, "SCANNED", scanned)
    texts = [f"the {SUBJECTS[at % 10]} of x{at % 97} " * (1 + at % 2) for at in range(2000)]
    kept = postings.Postings()
    kept.add(texts)
    query = "the garden of x40"
    allowed = np.arange(len(texts)) % 4 > 0
    snapshot = kept.snapshot()
    found = snapshot.best(snapshot.entries(query), 15, allowed)
    expected = np.where(allowed, brute_bm25(texts, query), 0)
    assert sorted(expected[found]) == pytest.approx(sorted(expected)[-15:], rel=1e-4)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("files", "file"), ("running", "run"), ("stopped", "stop"), ("copies", "copy"), ("hashes", "hash"),
        ("calling", "call"), ("named", "name"), ("naming", "name"), ("Boxes", "box"), ("Größen", "größen"),
    ],
)  # fmt: skip
def test_forms_of_a_word_are_one_term(one: str, other: str) -> None:
    assert terms(one) == terms(other)


@pytest.mark.parametrize(("one", "other"), [("bus", "bu"), ("class", "clas"), ("basis", "basi"), ("ring", "r")])
def test_words_that_only_look_like_forms_are_not(one: str, other: str) -> None:
    assert stem(one.encode()) != stem(other.encode())


def test_scripts_without_spaces_are_searched_by_pairs_of_characters() -> None:
    kept = postings.Postings()
    kept.add(["東京都の天気は晴れです", "大阪の天気", "weather in Tokyo"])
    first, second, third = scores(kept, "東京の天気")
    assert first > second > third == 0


NAN = float("nan")


@pytest.mark.parametrize(
    ("dense", "lexical", "order"),
    [
        ([0.9, 0.5, NAN, 0.1], [8, NAN, 9, 1], [0, 1, 2, 3]),
        ([0.60, 0.55, 0.40], [1, 9, 0], [1, 0, 2]),
        ([0.60, 0.55, 0.40], [0, 0, 9], [0, 1, 2]),
        ([0.3, 0.2], [0, 0], [0, 1]),
        ([NAN, NAN], [1, 2], [1, 0]),
        ([-0.3, -0.2, -0.9], [1, NAN, NAN], [0, 1, 2]),
        ([1.0], [7], [0]),
        ([], [], []),
    ],
    ids=["best of both", "text decides", "far is far", "no text", "text alone", "no likeness", "one", "none"],
)
def test_the_fused_score_ranks_and_stays_between_0_and_1(
    dense: list[float], lexical: list[float], order: list[int]
) -> None:
    fused = fuse(np.array(dense, np.float32), np.array(lexical, np.float32))
    assert np.argsort(-fused, kind="stable").tolist() == order
    assert ((fused >= 0) & (fused <= 1)).all()


async def test_a_piece_takes_two_bytes_for_a_component_one_bit_for_its_sign_and_five_bytes_for_a_word() -> None:
    index = LocalIndex()
    await index.open("c", 64, "")
    texts = [" ".join(f"w{at * 7 + word}" for word in range(20)) for at in range(matrix.BLOCK)]
    vectors = unit_rows(matrix.BLOCK, 64)
    await index.add("c", [Row(1 + at, "f", text, vectors[at]) for at, text in enumerate(texts)])
    different = 7 * matrix.BLOCK + 20
    needed = matrix.BLOCK * (64 * 2 + 64 // 8 + 20 * 5) + different * 12
    assert needed <= index.bytes <= needed + matrix.BLOCK * 24


async def test_what_is_removed_often_takes_no_memory() -> None:
    index = LocalIndex()
    await index.open("c", 32, "")
    sizes = []
    for turn in range(12):
        rows = pieces(300, first=1 + turn * 300)
        await index.add("c", rows)
        await index.settle("c", str(turn))
        sizes.append(index.bytes)
        await index.remove("c", [row.piece for row in rows])
    assert max(sizes[3:]) <= max(sizes[:3])


async def test_searches_are_answered_while_pieces_come_and_go() -> None:
    index = LocalIndex()
    await index.open("c", 32, "")
    stays = pieces(50)
    await index.add("c", stays)

    async def change(first: int) -> None:
        for turn in range(10):
            rows = pieces(300, first=first + turn * 300)
            await index.add("c", rows)
            await index.remove("c", [row.piece for row in rows])
            await index.settle("c", "")

    async def ask() -> None:
        for row in stays * 4:
            words = re.findall(r"number\d+", row.text)[0]
            assert row.piece in [hit.piece for hit in await index.search("c", words, row.vector, 3)]

    await asyncio.gather(change(1000), change(100_000), ask(), ask())
    found = await index.search("c", "garden", stays[0].vector, 1000)
    assert sorted(hit.piece for hit in found) == [row.piece for row in stays]
