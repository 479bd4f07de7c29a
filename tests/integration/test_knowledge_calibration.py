"""A collection is measured when it is searched, and what was measured is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_smart_proxy.proxy.knowledge.library import Library
from llama_smart_proxy.proxy.knowledge.relevance import OTHER
from tests.support.embedding import embedding_server, running_app, settings
from tests.support.harness import until

pytest.importorskip("numpy", reason="needs the extra rag")
SECTION = "## Valve {0}\n\nThe valve {0} of the pump closes at {0} bar. Its spring is made of steel.\n\n"


async def filled(library: Library, sections: int) -> None:
    collection = await library.create("pumps")
    for file in range(0, sections, 10):
        part = await library.incoming() / "part"
        part.write_text("# Pumps\n\n" + "".join(SECTION.format(number) for number in range(file, file + 10)))
        await library.attach(collection.id, (await library.upload(part, f"pumps-{file}.md")).id)
    async for _ in library.changes(collection.id):
        pass


@pytest.mark.parametrize("sections", [400, 10])
async def test_a_collection_of_some_size_is_measured_once_and_its_measure_is_kept(
    tmp_path: Path, sections: int
) -> None:
    async with embedding_server() as server:
        async with running_app(settings(server, tmp_path)) as app:
            library = app.proxy.library
            assert library is not None
            await filled(library, sections)
            before = await library.search("At how many bar does valve 7 close?", ["pumps"])
            assert before.confidence > 0 and before.passages[0].relevance > 0
            if sections > 100:
                await until(lambda: set(OTHER) <= set(server.texts))
                while (await library.search("At how many bar does valve 7 close?", ["pumps"])) == before:
                    pass
        asked = len(server.texts)
        async with running_app(settings(server, tmp_path)) as app:
            library = app.proxy.library
            assert library is not None
            again = await library.search("At how many bar does valve 7 close?", ["pumps"])
            assert len(server.texts) == asked + 1, "only the query"
            assert (again == before) == (sections < 100)
