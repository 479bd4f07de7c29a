"""Adds what came from paths and URLs."""

from __future__ import annotations

from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from llama_smart_proxy.backends.threads import run_in_thread
from llama_smart_proxy.proxy.knowledge import catalogue
from llama_smart_proxy.proxy.knowledge.contents import Spooled
from llama_smart_proxy.proxy.knowledge.tables import Kept
from llama_smart_proxy.proxy.store import Sql

if TYPE_CHECKING:
    from llama_smart_proxy.proxy.knowledge.knowledge import Opened


async def add_source(opened: Opened, kept: Kept, source: str, file: Path, media_type: str, *, move: bool) -> str:
    """Add or replace what came to a collection from `source`; `file` is copied, or moved. Returns the document's id;
    empty if its content is the same as before. Raises: OSError."""
    spooled = await run_in_thread(partial(opened.contents.take, file, move=move))
    async with opened.writing:
        before = await opened.database.run(partial(catalogue.from_source, collection=kept.serial, source=source))
        if before is not None and before[1].digest == spooled.digest:
            await run_in_thread(partial(spooled.file.unlink, missing_ok=True))
            return ""
        await run_in_thread(partial(opened.contents.keep, spooled))
        document = await opened.database.run(
            partial(_added, kept=kept, source=source, spooled=spooled, kind=media_type)
        )
        if before is not None:
            await opened.remove([before[1].digest])
    opened.added()
    return document


def _added(sql: Sql, kept: Kept, source: str, spooled: Spooled, kind: str) -> str:
    before = catalogue.from_source(sql, kept.serial, source)
    if before is not None:
        serial, document = before
        catalogue.replace_document(sql, serial, spooled.size, spooled.digest, kind)
        return document.id
    serial, document = catalogue.add_document(
        sql, name_of(source), spooled.size, spooled.digest,
        owner=kept.collection.owner, media_type=kind, source=source, collection=kept.serial,
    )  # fmt: skip
    catalogue.attach(sql, kept.serial, serial, None, None)
    return document.id


def name_of(source: str) -> str:
    """The name of a document: the last part of its path, or the host of its URL."""
    parts = urlsplit(source)
    if parts.scheme in ("http", "https"):
        return PurePosixPath(unquote(parts.path)).name or parts.netloc
    return Path(source).name or source
