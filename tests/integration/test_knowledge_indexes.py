"""The contract of an index, the same for that in the process and for servers: `Index` in proxy/knowledge/base.py."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import count
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llama_smart_proxy.proxy.errors import UpstreamFailed
from llama_smart_proxy.proxy.knowledge.base import Hit, Index, Row
from llama_smart_proxy.proxy.knowledge.index import make_index, postgres
from llama_smart_proxy.proxy.knowledge.index import qdrant as qdrant_index
from tests.fakes import qdrant as qdrants
from tests.support.harness import free_port
from tests.support.postgres import Server, pgvector
from tests.support.toxic import raw_upstream

_ = pgvector
DIMENSIONS = 24
SUBJECTS = ["anchor", "bridge", "candle", "desert", "engine", "forest", "garden", "harbour"]
_names = count(1)


def vector(number: int, dimensions: int = DIMENSIONS) -> NDArray[np.float32]:
    found = np.random.default_rng(number).standard_normal(dimensions, dtype=np.float32)
    return found / np.linalg.norm(found)


def row(number: int, text: str = "", dimensions: int = DIMENSIONS) -> Row:
    subject = SUBJECTS[number % 8]
    return Row(number, f"file-{number % 4}", text or f"The {subject} of {number}", vector(number, dimensions))


def rows(*numbers: int) -> list[Row]:
    return [row(number) for number in numbers]


def numbers(hits: list[Hit]) -> list[int]:
    return [hit.piece for hit in hits]


class Place:
    """Where the pieces are: `index` is the one under test, `again` another at the same place, as after a restart."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.is_server = bool(url)
        self.index = make_index(url)
        self.name = f"vs_{next(_names)}"

    def again(self) -> Index:
        return make_index(self._url)

    async def filled(self, rows: list[Row], stamp: str = "1") -> Index:
        await self.index.open(self.name, DIMENSIONS, stamp)
        await self.index.add(self.name, rows)
        await self.index.settle(self.name, stamp)
        return self.index

    async def found(self, number: int, limit: int = 10, **options: Any) -> list[int]:
        query = options.pop("query", f"{number}")
        return numbers(await self.index.search(self.name, query, vector(number), limit, **options))


@pytest.fixture(scope="module")
def qdrant() -> Iterator[qdrants.Server]:
    server = qdrants.Server(free_port())
    server.start()
    yield server
    server.stop()


def real_qdrant() -> str:
    if (url := os.environ.get("QDRANT_URL")) is None:
        pytest.skip("needs a Qdrant server: QDRANT_URL=qdrant://KEY@host:6333")
    return url


@pytest.fixture(params=["local", "postgres", "qdrant", "qdrant-real"])
async def place(request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    makers: dict[str, Callable[[], str]] = {
        "local": lambda: "",
        "postgres": lambda: request.getfixturevalue("pgvector").url("postgres"),
        "qdrant": lambda: request.getfixturevalue("qdrant").url,
        "qdrant-real": real_qdrant,
    }
    found = Place(makers[request.param]())
    yield found
    await found.index.drop(found.name)
    await found.index.close()


async def test_the_best_are_first_with_their_cosines(place: Place) -> None:
    index = await place.filled(rows(*range(1, 200)))
    found = await index.search(place.name, "harbour 15", vector(15), 7)
    assert found[0].piece == 15 and len(found) == 7
    assert [hit.score for hit in found] == sorted((hit.score for hit in found), reverse=True)
    assert all(0 <= hit.score <= 1 for hit in found)
    for hit in found:
        assert hit.dense == pytest.approx(float(vector(15) @ vector(hit.piece)), abs=1e-3)
    assert (found[0].lexical or 0) > 0


async def test_a_rare_word_finds_what_is_far_by_its_vector(place: Place) -> None:
    far = Row(1000, "f", "The zygomorphic one", -vector(3))
    index = await place.filled([*rows(*range(1, 400)), far])
    found = await index.search(place.name, "what is zygomorphic", vector(3), 400)
    (hit,) = [hit for hit in found if hit.piece == 1000]
    assert hit.lexical is not None and hit.dense == pytest.approx(-1, abs=1e-3)


async def test_a_piece_that_is_added_again_is_replaced(place: Place) -> None:
    index = await place.filled(rows(1, 2, 3))
    await index.add(place.name, [Row(2, "other", "quite new", vector(77)), Row(2, "other", "the newest", vector(78))])
    await index.settle(place.name, "2")
    found = await index.search(place.name, "newest", vector(78), 10)
    assert sorted(numbers(found)) == [1, 2, 3] and found[0].piece == 2
    assert found[0].dense == pytest.approx(1, abs=1e-3)
    assert await place.found(2, files=frozenset({"other"})) == [2]


async def test_what_is_removed_is_not_found_and_the_rest_is(place: Place) -> None:
    index = await place.filled(rows(*range(1, 700)))
    await index.remove(place.name, [*range(1, 690), 777])
    await index.remove(place.name, [])
    await index.settle(place.name, "2")
    assert sorted(await place.found(5, 10, query="anything")) == [*range(690, 700)]
    await index.add(place.name, rows(5))
    await index.settle(place.name, "3")
    assert (await place.found(5))[0] == 5


async def test_only_the_files_asked_for_are_searched(place: Place) -> None:
    index = await place.filled([*rows(*range(1, 300)), Row(500, "lonely", "The anchor of 500", -vector(8))])
    assert {number % 4 for number in await place.found(8, 20, files=frozenset({"file-1", "file-2"}))} == {1, 2}
    assert await place.found(8, files=frozenset({"lonely", "absent"})) == [500]
    assert await place.found(8, files=frozenset({"absent"})) == []
    assert await place.found(8, files=frozenset()) == []
    await index.remove(place.name, [500])
    await index.settle(place.name, "2")
    assert await place.found(8, files=frozenset({"lonely"})) == []


async def test_collections_are_apart_and_gone_when_they_are_dropped(place: Place) -> None:
    index = await place.filled(rows(1, 2))
    other = f"{place.name}'; -- ä/.."
    await index.open(other, 7, "1")
    await index.add(other, [row(9, dimensions=7)])
    await index.settle(other, "1")
    assert numbers(await index.search(other, "9", vector(9, 7), 10)) == [9]
    assert sorted(await place.found(1)) == [1, 2]
    await index.drop(other)
    await index.drop(other)
    assert await index.search(other, "9", vector(9, 7), 10) == []
    await index.add(other, [row(10, dimensions=7)])
    await index.remove(other, [9])
    await index.settle(other, "2")
    assert await index.search(other, "9", vector(9, 7), 10) == []
    assert sorted(await place.found(1)) == [1, 2]
    assert await index.search("never-opened", "9", vector(9), 10) == []


async def test_an_index_of_the_same_state_is_used_again_and_another_is_filled_anew(place: Place) -> None:
    assert await place.index.open(place.name, DIMENSIONS, "1") is False
    await place.filled(rows(1, 2))
    assert await place.index.open(place.name, DIMENSIONS, "1") is True
    again = place.again()
    try:
        assert await again.open(place.name, DIMENSIONS, "1") is place.is_server
    finally:
        await again.close()
    assert sorted(await place.found(1)) == [1, 2]
    for dimensions, stamp in ((DIMENSIONS, "2"), (DIMENSIONS + 1, "1")):
        await place.filled(rows(1, 2))
        assert await place.index.open(place.name, dimensions, stamp) is False
        assert await place.index.search(place.name, "1", vector(1, dimensions), 5) == []


@pytest.mark.parametrize("change", ["add", "remove"])
async def test_what_was_changed_and_not_settled_is_of_no_state(place: Place, change: str) -> None:
    index = await place.filled(rows(1, 2))
    await (index.add(place.name, rows(3)) if change == "add" else index.remove(place.name, [1]))
    assert await index.open(place.name, DIMENSIONS, "1") is False


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "a\0b",
        "\ud800",
        'it\'s "quoted" \\',
        "a & | ! ( ) : * <->",
        "東京の天気",
        "\U0001f600",
        "'; DROP",
        "x" * 5000,
    ],
    ids=ascii,
)
async def test_any_text_can_be_stored_and_asked(place: Place, text: str) -> None:
    index = await place.filled([Row(1, "f", text, vector(1)), row(2)])
    assert numbers(await index.search(place.name, text, vector(1), 5)) == [1, 2]


async def test_searches_see_whole_pieces_while_others_come_and_go(place: Place) -> None:
    index = await place.filled(rows(*range(1, 20)))

    async def change(first: int) -> None:
        for turn in range(4):
            some = rows(*range(first + turn * 50, first + turn * 50 + 50))
            await index.add(place.name, some)
            await index.remove(place.name, [each.piece for each in some])

    async def ask() -> None:
        for number in range(1, 20):
            assert (await place.found(number, 3))[0] == number

    await asyncio.gather(change(1000), change(5000), ask(), ask())
    await index.settle(place.name, "2")
    assert sorted(await place.found(1, 100)) == [*range(1, 20)]


# -- servers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["postgresql", "qdrant"])
async def test_a_server_that_is_away_is_named_with_the_setting(scheme: str) -> None:
    index = make_index(f"{scheme}://user:very-secret@127.0.0.1:{free_port()}/db")
    with pytest.raises(UpstreamFailed, match=r"127\.0\.0\.1.*knowledge\.index") as failure:
        await index.search("c", "q", vector(1), 5)
    assert "very-secret" not in failure.value.message
    await index.close()


@pytest.mark.parametrize(("scheme", "module"), [("postgresql", postgres), ("qdrant", qdrant_index)])
async def test_a_server_that_does_not_answer_is_waited_for_until_a_limit(
    monkeypatch: pytest.MonkeyPatch, scheme: str, module: Any
) -> None:
    monkeypatch.setattr(module, "CONNECT_S", 0.3)
    monkeypatch.setattr(module, "COMMAND_S", 0.3)
    async with raw_upstream() as server:
        index = make_index(f"{scheme}://user@127.0.0.1:{server.port}/db")
        with pytest.raises(UpstreamFailed, match="not answer in time") as failure:
            await index.search("c", "q", vector(1), 5)
        assert failure.value.status == 504
        await index.close()


async def test_a_postgres_that_was_restarted_is_used_again(pgvector: Server) -> None:
    place = Place(pgvector.url("postgres"))
    index = await place.filled(rows(1, 2, 3))
    pgvector.stop()
    with pytest.raises(UpstreamFailed):
        await place.found(1)
    pgvector.start()
    assert (await place.found(1))[0] == 1
    await index.close()


async def test_a_qdrant_that_was_restarted_is_used_again(qdrant: qdrants.Server) -> None:
    place = Place(qdrant.url)
    await place.filled(rows(1, 2, 3))
    qdrant.stop()
    with pytest.raises(UpstreamFailed):
        await place.found(1)
    qdrant.start()
    assert await place.found(1) == []
    await place.filled(rows(1, 2, 3))
    assert (await place.found(1))[0] == 1
    await place.index.close()


async def test_a_refused_key_is_reported_with_the_words_of_the_server(qdrant: qdrants.Server) -> None:
    index = make_index(qdrant.url.replace(qdrants.KEY, "another"))
    with pytest.raises(UpstreamFailed, match="status 403: Must provide an API key"):
        await index.open("c", 3, "")
    await index.close()


async def test_a_postgres_without_pgvector_is_refused_with_what_is_missing(pgvector: Server) -> None:
    index = make_index(pgvector.url("no_such_database"))
    with pytest.raises(UpstreamFailed, match="no_such_database"):
        await index.open("c", 3, "")
    await index.close()
