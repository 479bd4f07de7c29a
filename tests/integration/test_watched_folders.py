"""Folders that are watched: their documents are in a collection as they are on the disk."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from llama_smart_proxy.proxy.knowledge import watch
from llama_smart_proxy.proxy.knowledge.base import Member, Status
from tests.integration.test_knowledge import Stage, staged
from tests.support.embedding import embedding_server, settings
from tests.support.harness import until

pytest.importorskip("numpy", reason="needs the extra rag")


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    """A proxy that watches the folder `docs`."""
    docs = tmp_path / "docs"
    docs.mkdir()
    knowledge = {"watch": [{"path": str(docs), "collection": "manuals"}]}
    async with embedding_server() as server, staged(server, tmp_path / "state", knowledge=knowledge) as stage:
        yield stage


async def members(stage: Stage) -> dict[str, Member]:
    """Those of the collection, by name; none are in progress."""
    if not await stage.library.collections():
        return {}
    found = await stage.library.members("manuals")
    if any(member.status is Status.IN_PROGRESS for member in found):
        return {}
    return {member.document.name: member for member in found}


async def seen(stage: Stage, **states: Status) -> dict[str, Member]:
    """The members, once exactly these are there, in these states."""

    async def there() -> bool:
        return {name: member.status for name, member in (await members(stage)).items()} == wanted

    wanted = {f"{name}.md": status for name, status in states.items()}
    await until(there, what=str(wanted))
    return await members(stage)


async def test_files_are_added_changed_and_removed_as_on_the_disk(stage: Stage, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    (docs / "sub").mkdir()
    (docs / "a.md").write_text("about apples")
    (docs / "sub" / "b.md").write_text("about bananas")
    await seen(stage, a=Status.COMPLETED, b=Status.COMPLETED)
    (docs / "a.md").write_text("about apricots")
    (docs / "sub" / "b.md").unlink()
    (docs / "c.md").write_text("about cherries")
    await seen(stage, a=Status.COMPLETED, c=Status.COMPLETED)

    async def replaced() -> bool:
        result = await stage.library.search("about", ["manuals"])
        texts = sorted(passage.text.rpartition(" ")[2] for passage in result.passages)
        return texts == ["apricots", "cherries"]

    await until(replaced)
    assert len(stage.kept) == 2


async def test_odd_entries_of_a_folder_stop_nothing(stage: Stage, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    (docs / "loop").symlink_to(docs, target_is_directory=True)
    (tmp_path / "outside.md").write_text("a secret")
    (docs / "link.md").symlink_to(tmp_path / "outside.md")
    (docs / "broken.md").symlink_to(tmp_path / "nothing")
    os.mkfifo(docs / "pipe.md")
    (docs / ".hidden.md").write_text("hidden")
    (docs / "half.part").write_text("half")
    (docs / "empty.md").write_text("")
    (docs / "good.md").write_text("good")
    (docs / os.fsdecode(b"caf\xe9.md")).write_text("coffee")
    await seen(stage, empty=Status.FAILED, good=Status.COMPLETED, **{"caf\\udce9": Status.COMPLETED})


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
async def test_a_file_without_the_right_to_read_it_has_failed_until_it_can_be_read(
    stage: Stage, tmp_path: Path
) -> None:
    (file := tmp_path / "docs" / "a.md").write_text("about apples")
    file.chmod(0)
    assert "Permission denied" in (await seen(stage, a=Status.FAILED))["a.md"].error
    file.chmod(0o600)
    await seen(stage, a=Status.COMPLETED)


async def test_a_reload_changes_which_folders_are_watched(stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "docs" / "a.md").write_text("about apples")
    await seen(stage, a=Status.COMPLETED)
    (other := tmp_path / "other").mkdir()
    (other / "b.md").write_text("about bananas")
    knowledge = {"watch": [{"path": str(other), "collection": "manuals"}], "max_file_mib": 1}
    config = settings(stage.server, stage.folder, knowledge=knowledge)
    await stage.app.apply(await stage.app.prepared(config))
    await seen(stage, a=Status.COMPLETED, b=Status.COMPLETED)
    (other / "c.md").write_text("x" * (2**20 + 1))
    found = await seen(stage, a=Status.COMPLETED, b=Status.COMPLETED, c=Status.FAILED)
    assert "knowledge.max_file_mib" in found["c.md"].error


async def test_a_folder_that_is_gone_takes_no_documents_with_it(stage: Stage, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    (docs / "a.md").write_text("about apples")
    await seen(stage, a=Status.COMPLETED)
    docs.rename(tmp_path / "elsewhere")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "b.md").write_text("about bananas")
    watched = [{"path": str(tmp_path / name), "collection": "manuals"} for name in ("docs", "b")]
    config = settings(stage.server, stage.folder, knowledge={"watch": watched})
    await stage.app.apply(await stage.app.prepared(config))
    await seen(stage, a=Status.COMPLETED, b=Status.COMPLETED)


def test_below_a_folder_that_cannot_be_read_no_file_is_missing() -> None:
    found = watch.Seen({"/d/a": watch.Found("/d/a", 1, "1")}, {"/d/sub": "Permission denied"})
    missing = [path for path in ("/d/a", "/d/b", "/d/sub/c", "/d/subway") if found.misses(path)]
    assert missing == ["/d/b", "/d/subway"]
