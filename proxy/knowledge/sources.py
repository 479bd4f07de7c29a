"""Adds and removes what came from paths and URLs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote, urlsplit

from llama_smart_proxy.backends.threads import run_in_thread
from llama_smart_proxy.proxy.knowledge import catalogue
from llama_smart_proxy.proxy.knowledge.base import Document, Status
from llama_smart_proxy.proxy.knowledge.catalogue import Change
from llama_smart_proxy.proxy.knowledge.tables import Kept
from llama_smart_proxy.proxy.store import Sql

if TYPE_CHECKING:
    from llama_smart_proxy.proxy.knowledge.knowledge import Opened

REMOVED_AT_ONCE = 100
"""Documents that are removed in one transaction."""


async def add_source(
    opened: Opened, kept: Kept, source: str, file: Path, media_type: str, *, move: bool, stamp: str = ""
) -> str:
    """Add or replace what came to a collection from `source`; `file` is copied, or moved, and `stamp` its state.
    Returns the document's id; empty if its content is the same as before. Raises: OSError."""
    spooled = await run_in_thread(partial(opened.contents.take, file, move=move))

    def work(sql: Sql) -> _Outcome:
        content = _Content(spooled.size, spooled.digest, media_type, stamp)
        before, again = _unchanged(sql, kept, source, content)
        if before is not None and before.digest == spooled.digest:
            spooled.file.unlink(missing_ok=True)
            return _Outcome(before.id if again else "")
        opened.contents.keep(spooled)
        return _Outcome(_added(sql, kept, source, content), before.digest if before is not None else "")

    async def add() -> str:
        async with opened.writing:
            outcome = await opened.database.run(work)
            await opened.remove([outcome.replaced])
        if outcome.document:
            opened.added()
        return outcome.document

    return await opened.finish(add())


async def fail_source(opened: Opened, kept: Kept, source: str, size: int, reason: str, stamp: str) -> None:
    """Note that what is to come from `source` cannot be read; what came from it before stays."""

    def work(sql: Sql) -> str:
        before = catalogue.from_source(sql, kept.serial, source)
        digest = before[1].digest if before is not None else ""
        document = _added(sql, kept, source, _Content(size, digest, "", stamp))
        catalogue.set_status(sql, kept.serial, document, Status.FAILED, reason)
        return document

    async with opened.writing:
        await opened.database.run(work)
    opened.ingestion.count_failed(name_of(source), reason)
    opened.step()


async def remove_sources(opened: Opened, documents: Sequence[str]) -> None:
    """Remove documents, by id, from wherever they are."""
    for at in range(0, len(documents), REMOVED_AT_ONCE):
        some = documents[at : at + REMOVED_AT_ONCE]
        async with opened.writing:
            changes, digests = await opened.database.run(partial(_removed, documents=some))
            await opened.remove(digests)
        await opened.changed(changes)


def _removed(sql: Sql, documents: Sequence[str]) -> tuple[list[Change], list[str]]:
    found = [known for name in documents if (known := catalogue.document(sql, name)) is not None]
    changes = [change for serial, _ in found for change in catalogue.delete_document(sql, serial)]
    return changes, [document.digest for _, document in found]


class _Outcome(NamedTuple):
    """The id of the document that is added now, and the digest of the content that it had before, each if there is."""

    document: str
    replaced: str = ""


def _unchanged(sql: Sql, kept: Kept, source: str, content: _Content) -> tuple[Document | None, bool]:
    """What came from `source` before. If it has the same content, its stamp is noted, and one that has failed is tried
    again: then True."""
    found = catalogue.from_source(sql, kept.serial, source)
    if found is None or found[1].digest != content.digest:
        return (found[1] if found is not None else None), False
    serial, document = found
    catalogue.set_stamp(sql, kept.serial, source, content.stamp)
    known = catalogue.member(sql, kept.serial, document.id)
    again = known is None or known.member.status in (Status.FAILED, Status.CANCELLED)
    if again:
        catalogue.attach(sql, kept.serial, serial, None, None)
    return document, again


class _Content(NamedTuple):
    size: int
    digest: str
    media_type: str
    stamp: str


def _added(sql: Sql, kept: Kept, source: str, content: _Content) -> str:
    before = catalogue.from_source(sql, kept.serial, source)
    if before is not None:
        catalogue.replace_document(sql, before[0], *content)
        return before[1].id
    serial, document = catalogue.add_document(
        sql, name_of(source), content.size, content.digest, owner=kept.collection.owner,
        media_type=content.media_type, source=source, collection=kept.serial, stamp=content.stamp,
    )  # fmt: skip
    catalogue.attach(sql, kept.serial, serial, None, None)
    return document.id


def name_of(source: str) -> str:
    """The name of a document: the last part of its path, or the host of its URL."""
    parts = urlsplit(source)
    if parts.scheme in ("http", "https"):
        return PurePosixPath(unquote(parts.path)).name or parts.netloc
    return Path(source).name or source
