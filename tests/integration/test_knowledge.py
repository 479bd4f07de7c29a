"""The knowledge base in the process of the test: what is added is read, embedded, stored and found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llama_smart_proxy.proxy.knowledge.base import Collection, Status
from llama_smart_proxy.proxy.knowledge.library import Library
from tests.support.embedding import embedding_server, running_app, settings

pytest.importorskip("numpy", reason="needs the extra rag")
ZEBRA = "# Server\n\n## Ports\n\nThe zebra listens on port 11555.\n"
WALRUS = "# Install\n\nInstall the walrus with the walrus wizard.\n"


async def done(library: Library, collection: str) -> Collection:
    """The collection, once nothing of it is in progress."""
    last = None
    async for last in library.changes(collection):
        pass
    assert last is not None
    return last


async def uploaded(library: Library, name: str, text: str) -> str:
    """The id of a new document."""
    file = await library.incoming() / f"{name}.part"
    file.write_text(text)
    return (await library.upload(file, name)).id


@pytest.fixture
async def library(tmp_path: Path) -> Any:
    """A library with an embedding server."""
    async with embedding_server() as server, running_app(settings(server, tmp_path / "state")) as app:
        assert app.proxy.library is not None
        yield app.proxy.library


async def test_what_was_attached_is_found_with_its_heading_and_its_document(library: Library) -> None:
    collection = await library.create("manuals")
    for name, text in (("zebra.md", ZEBRA), ("walrus.md", WALRUS)):
        await library.attach(collection.id, await uploaded(library, name, text), attributes={"name": name})
    counts = (await done(library, "manuals")).counts
    assert (counts.completed, counts.total) == (2, 2)
    found = await library.search("which port does the zebra have", ["manuals"])
    best = found.passages[0]
    assert best.document == "zebra.md" and best.heading == "Server > Ports" and "11555" in best.text
    assert best.attributes == {"name": "zebra.md"} and best.collection == collection.id
    assert 0 < found.confidence <= 1
    members = await library.members("manuals")
    assert {member.status for member in members} == {Status.COMPLETED}
    assert await library.pieces("manuals", best.document_id) == [best.text]
