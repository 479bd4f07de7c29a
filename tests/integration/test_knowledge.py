"""The knowledge base in the process of the test: what is added is read, embedded, stored and found."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from llama_smart_proxy.proxy.app import App
from llama_smart_proxy.proxy.errors import BadRequest, NotFound, Overloaded
from llama_smart_proxy.proxy.knowledge import catalogue
from llama_smart_proxy.proxy.knowledge.base import Addition, Collection, Status, Viewer
from llama_smart_proxy.proxy.knowledge.library import Library
from tests.support.embedding import EmbeddingServer, embedding_server, running_app, settings
from tests.support.harness import until
from tests.support.postgres import Server
from tests.support.postgres import postgres as postgres

pytest.importorskip("numpy", reason="needs the extra rag")
ZEBRA = "# Server\n\n## Ports\n\nThe zebra listens on port 11555.\n"
WALRUS = "# Install\n\nInstall the walrus with the walrus wizard.\n"


class Stage(NamedTuple):
    """A proxy, and its embedding server."""

    app: App
    library: Library
    server: EmbeddingServer
    folder: Path

    @property
    def kept(self) -> list[str]:
        """The names of all files with contents."""
        return [file.name for file in (self.folder / "knowledge").iterdir() if file.is_file()]


@asynccontextmanager
async def staged(server: EmbeddingServer, folder: Path, **sections: Any) -> AsyncIterator[Stage]:
    async with running_app(settings(server, folder, **sections)) as app:
        assert app.proxy.library is not None
        yield Stage(app, app.proxy.library, server, folder)


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    async with embedding_server() as server, staged(server, tmp_path / "state") as stage:
        yield stage


async def done(library: Library, collection: str) -> Collection:
    """The collection, once nothing of it is in progress."""
    seen = [found async for found in library.changes(collection)]
    return seen[-1]


async def uploaded(library: Library, name: str, text: str) -> str:
    """The id of a new document."""
    file = await library.incoming() / f"{name}.part"
    file.write_text(text)
    return (await library.upload(file, name)).id


async def attached(library: Library, collection: str, **texts: str) -> list[str]:
    """The ids of new documents in a collection."""
    ids = [await uploaded(library, f"{name}.md", text) for name, text in texts.items()]
    for document in ids:
        await library.attach(collection, document)
    return ids


async def found(library: Library, query: str, *collections: str) -> list[str]:
    """The texts that a search returns, the best first."""
    return [passage.text for passage in (await library.search(query, collections)).passages]


async def is_found(library: Library, query: str, collection: str) -> bool:
    return any(query in text for text in await found(library, query, collection))


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
async def test_what_was_attached_is_found_also_after_a_restart(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    store = {}
    if kind == "postgres":
        postgres: Server = request.getfixturevalue("postgres")
        store = {"store": await asyncio.to_thread(postgres.database)}
    async with embedding_server() as server:
        async with staged(server, tmp_path, **store) as stage:
            library = stage.library
            collection = await library.create("manuals", metadata={"a": "b"}, days=7)
            for name, text in (("zebra.md", ZEBRA), ("walrus.md", WALRUS)):
                await library.attach(collection.id, await uploaded(library, name, text), attributes={"name": name})
            counts = (await done(library, "manuals")).counts
            assert (counts.completed, counts.total) == (2, 2)
            await check(library, collection.id)
            embedded = len(server.texts)
        async with staged(server, tmp_path, **store) as stage:
            await check(stage.library, collection.id)
            assert len(server.texts) == embedded + 1, "only the query is embedded again"
            (again,) = await stage.library.collections()
            assert (again.metadata, again.days, again.bytes) == ({"a": "b"}, 7, len(ZEBRA) + len(WALRUS))
            await stage.library.delete("manuals")
            assert await stage.library.collections() == [] and len(await stage.library.documents()) == 2


async def check(library: Library, collection: str) -> None:
    result = await library.search("which port does the zebra have", ["manuals"])
    best = result.passages[0]
    assert (best.document, best.heading, best.collection) == ("zebra.md", "Server > Ports", collection)
    assert "11555" in best.text and best.attributes == {"name": "zebra.md"} and 0 < result.confidence <= 1
    assert await library.pieces("manuals", best.document_id) == [best.text]
    assert {member.status for member in await library.members("manuals")} == {Status.COMPLETED}


async def test_a_file_that_is_replaced_is_found_in_its_old_version_until_the_new_one_is_complete(
    stage: Stage, tmp_path: Path
) -> None:
    library, source = stage.library, "https://example.com/manual/zebra.md"
    await library.create("m")
    for text in ("# Z\n\nThe old zebra.", "# Z\n\nThe new walrus."):
        (file := tmp_path / "page").write_text(text)
        stage.server.gate.clear() if "new" in text else None
        member = await library.add_source("m", source, file)
        assert member is not None and member.document.name == "zebra.md" and member.document.source == source
        if "old" in text:
            await done(library, "m")
    opened = await stage.app.lasting.knowledge.opened()
    await until(lambda: stage.server.waiting)
    (kept,) = await opened.database.run(partial(catalogue.named, name="m"))
    assert kept.collection.counts.in_progress == 1
    assert member is not None
    assert await library.pieces("m", member.document.id) == ["Z\n\nThe old zebra."]
    stage.server.gate.set()
    await done(library, "m")
    assert await found(library, "zebra", "m") == ["Z\n\nThe new walrus."]
    assert await library.add_source("m", source, tmp_path / "page") is None, "its content is the same"
    assert len(stage.kept) == 1


async def test_a_file_that_cannot_be_read_has_failed_with_its_reason_and_stops_no_other(stage: Stage) -> None:
    library = stage.library
    await library.create("m")
    stage.server.refuses = "forbidden"
    await attached(library, "m", empty="", bad="This is forbidden.", good=ZEBRA, other=WALRUS)
    counts = (await done(library, "m")).counts
    assert (counts.failed, counts.completed) == (2, 2)
    errors = {member.document.name: member.error for member in await library.members("m", Status.FAILED)}
    assert errors["empty.md"] and "bad input" in errors["bad.md"]
    assert await is_found(library, "zebra", "m") and await is_found(library, "walrus", "m")


async def test_an_embedding_model_that_is_down_fails_no_file(stage: Stage) -> None:
    library = stage.library
    await library.create("m")
    stage.server.fails = 503
    await attached(library, "m", zebra=ZEBRA)
    await until(lambda: stage.server.failed > 1)
    assert (await library.collection("m")).counts.in_progress == 1
    stage.server.fails = 0
    assert (await done(library, "m")).counts.completed == 1


async def test_a_model_that_refuses_every_text_fails_no_file(stage: Stage) -> None:
    library = stage.library
    await library.create("m")
    stage.server.refuses = ""
    await attached(library, "m", zebra=ZEBRA)
    await until(lambda: stage.server.refused > 3)
    assert (await library.collection("m")).counts.in_progress == 1
    stage.server.refuses = "walrus"
    assert (await done(library, "m")).counts.completed == 1


@pytest.mark.parametrize("requests", [1, 2, 3])
async def test_a_model_that_recovers_at_any_moment_fails_no_file(stage: Stage, requests: int) -> None:
    await stage.library.create("m")
    stage.server.refuses_first = requests
    await attached(stage.library, "m", zebra=ZEBRA)
    assert (await done(stage.library, "m")).counts.completed == 1 and stage.server.refused == requests


async def test_what_has_failed_is_tried_again_when_it_is_added_again(stage: Stage, tmp_path: Path) -> None:
    library = stage.library
    await library.create("m")
    stage.server.refuses = "zebra"
    (file := tmp_path / "zebra.md").write_text(ZEBRA)
    assert await library.add_source("m", "/zebra.md", file) is not None
    assert (await done(library, "m")).counts.failed == 1
    stage.server.refuses = "walrus"
    assert await library.add_source("m", "/zebra.md", file) is not None
    assert (await done(library, "m")).counts.completed == 1
    assert await library.add_source("m", "/zebra.md", file) is None


async def test_one_proxy_at_a_time_has_the_knowledge_base_open(tmp_path: Path) -> None:
    async with embedding_server() as server:
        async with staged(server, tmp_path) as first, staged(server, tmp_path) as second:
            await first.library.create("m")
            with pytest.raises(Overloaded, match="another proxy"):
                await second.library.create("m")
        async with staged(server, tmp_path) as third:
            assert len(await third.library.collections()) == 1


async def test_pieces_are_embedded_in_batches_of_eight_at_most_over_files(stage: Stage) -> None:
    library = stage.library
    await library.create("m")
    long = "\n\n".join(f"# Part {number}\n\n" + f"word{number} " * 100 for number in range(20))
    stage.server.gate.clear()
    await attached(library, "m", long=long, **{f"f{number}": f"file {number}" for number in range(16)})
    stage.server.gate.set()
    assert (await done(library, "m")).counts.completed == 17
    assert max(stage.server.batches) == 8 and len(stage.server.batches) < 12
    assert sum(stage.server.batches) == sum(member.pieces for member in await library.members("m"))


async def test_another_embedding_model_embeds_everything_again(stage: Stage) -> None:
    library, app = stage.library, stage.app
    await library.create("m")
    await attached(library, "m", zebra=ZEBRA, walrus=WALRUS)
    await done(library, "m")
    stage.server.texts.clear()
    await app.apply(
        await app.prepared(settings(stage.server, stage.folder, knowledge={"embedding_model": "other-words"}))
    )
    await until(lambda: len(stage.server.texts) >= 2)
    await done(library, "m")
    assert sorted(stage.server.texts) == sorted(await found(library, "zebra", "m")), "none is embedded twice"
    assert await is_found(library, "zebra", "m")


async def test_a_content_is_kept_once_and_until_its_last_document_is_removed(stage: Stage) -> None:
    library = stage.library
    first, second = [await uploaded(library, name, ZEBRA) for name in ("a.md", "b.md")]
    (digest,) = stage.kept
    file = stage.folder / "knowledge" / digest
    assert file.stat().st_mode & 0o777 == 0o600 and file.parent.stat().st_mode & 0o777 == 0o700
    assert (await library.content(first)).read_text() == ZEBRA
    await library.delete_document(first)
    assert stage.kept == [digest]
    await library.delete_document(second)
    assert stage.kept == [] and await library.documents() == []


async def test_what_a_crash_has_left_behind_is_removed(tmp_path: Path) -> None:
    async with embedding_server() as server:
        async with staged(server, tmp_path) as stage:
            await uploaded(stage.library, "zebra.md", ZEBRA)
            before = stage.kept
            for name in ("0" * 64, "abc.new", "incoming/half"):
                (tmp_path / "knowledge" / name).write_text("x")
        async with staged(server, tmp_path) as stage:
            await stage.library.documents()
            assert stage.kept == before and list((await stage.library.incoming()).iterdir()) == []


async def test_a_batch_that_is_cancelled_and_a_collection_that_is_deleted_are_not_added(stage: Stage) -> None:
    library = stage.library
    for name in ("a", "b", "c"):
        await library.create(name)
    stage.server.gate.clear()
    documents = [await uploaded(library, f"{name}.md", ZEBRA) for name in "abc"]
    for name, document in zip("abc", documents, strict=True):
        await library.attach_all(name, [Addition(document)], "batch")
    await until(lambda: stage.server.waiting)
    await library.cancel("a", "batch")
    await library.delete("b")
    await library.detach("c", documents[2])
    stage.server.gate.set()
    assert (await done(library, "a")).counts.cancelled == 1 and (await done(library, "c")).counts.total == 0
    await library.attach("c", documents[0])
    assert (await done(library, "c")).counts.completed == 1
    assert await found(library, "zebra", "a") == []
    opened = await stage.app.lasting.knowledge.opened()
    assert await opened.database.run(lambda sql: sql.execute("SELECT count(*) FROM chunks")) == [(1,)]
    with pytest.raises(NotFound):
        await library.members("b")


async def test_several_collections_are_searched_together_and_reranked_by_the_configured_model(
    stage: Stage, tmp_path: Path
) -> None:
    library, app = stage.library, stage.app
    for name, text in (("a", ZEBRA), ("b", WALRUS), ("c", "# Z\n\nA zebra.")):
        await library.create(name)
        await attached(library, name, text=text)
        await done(library, name)
    assert (await found(library, "walrus wizard", "a", "b"))[0].endswith("wizard.")
    assert ["zebra" in text for text in await found(library, "zebra", "a", "b", "c")] == [True, True, False]
    reranker = {"reranker": "judge"}
    await app.apply(await app.prepared(settings(stage.server, stage.folder, knowledge=reranker)))
    assert (await found(library, "walrus wizard", "a", "b", "c"))[0] == "Z\n\nA zebra."
    unranked = await library.search("walrus wizard", ["a", "b", "c"], rerank=False, limit=1)
    assert len(unranked.passages) == 1 and "wizard" in unranked.passages[0].text
    related, unrelated = await library.grade("the walrus wizard", ["a wizard and a walrus", "nothing like it"])
    assert 1 >= related > unrelated >= 0


async def test_clients_see_their_own_and_the_operators_collections(stage: Stage) -> None:
    admin, alice = stage.library, stage.library.seen_by(Viewer("alice", False))
    await admin.create("shared")
    mine = await alice.create("mine")
    document = await uploaded(alice, "zebra.md", ZEBRA)
    bob = admin.seen_by(Viewer("bob", False, ("none",)))
    assert [found.name for found in await alice.collections()] == ["mine", "shared"]
    assert await bob.collections() == [] and await bob.documents() == []
    for refused in (bob.collection(mine.id), bob.document(document), bob.search("x", ["shared"]), bob.delete("mine")):
        with pytest.raises(NotFound):
            await refused
    with pytest.raises(BadRequest, match="not changed"):
        await alice.attach("shared", document)
    with pytest.raises(NotFound):  # others could call theirs as the operator's is called
        await admin.attach("mine", document)
    await admin.attach(mine.id, document)


async def test_a_collection_out_of_use_is_removed_after_its_days(tmp_path: Path) -> None:
    async with embedding_server() as server:
        async with staged(server, tmp_path) as stage:
            await stage.library.create("old", days=1)
            await stage.library.create("kept")
            opened = await stage.app.lasting.knowledge.opened()
            long_ago = time.time() - 2 * 86400
            await opened.database.run(partial(catalogue.use, serials=[1, 2], now_s=long_ago))
        async with staged(server, tmp_path) as stage:

            async def names() -> bool:
                return [found.name for found in await stage.library.collections()] == ["kept"]

            await until(names)


async def test_what_is_not_used_is_not_opened(tmp_path: Path) -> None:
    async with embedding_server() as server, staged(server, tmp_path) as stage:
        assert stage.app.proxy.library is not None
        tasks = [task.get_name() for task in asyncio.all_tasks()]
        assert "ingestion of documents" not in tasks and "looks at watched folders" not in tasks
        assert not {"knowledge", "knowledge.db"} & set(os.listdir(tmp_path))


async def test_the_index_follows_a_removal_whose_client_has_gone(stage: Stage) -> None:
    collection = (await stage.library.create("kept")).id
    zebras = "\n\n".join(f"## Zebra {number}\n\nThe zebra listens on port {number}." for number in range(40))
    herd, _ = await attached(stage.library, collection, herd=zebras, other=WALRUS)
    await done(stage.library, collection)
    assert any("zebra" in text for text in await found(stage.library, "zebra port", collection))
    opened = await stage.library._opened()
    async with opened.shelves._shelves[collection].lock:  # as while another change is followed
        removal = asyncio.create_task(stage.library.delete_document(herd))
        while len(await stage.library.documents()) > 1:
            pass
        removal.cancel()
        await asyncio.wait([removal])
    await asyncio.gather(*opened._finishing)
    assert await found(stage.library, "zebra port", collection)


async def test_a_document_is_read_although_the_client_that_added_it_has_gone(stage: Stage) -> None:
    collection = (await stage.library.create("kept")).id
    document = await uploaded(stage.library, "zebra.md", ZEBRA)
    opened = await stage.library._opened()
    for steps in range(100):  # of the event loop, before its client goes
        adding = asyncio.create_task(stage.library.attach(collection, document))
        for _ in range(steps):
            await asyncio.sleep(0)
        adding.cancel()
        await asyncio.wait([adding])
        await opened.database.run(lambda sql: None)  # behind what was begun
        if (await stage.library.collection(collection)).counts.total:
            break
    await done(stage.library, collection)
    assert await found(stage.library, "zebra", collection)
