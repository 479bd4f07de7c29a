"""The knowledge base as one client sees it: the one way in, for the HTTP API, the command line and agents."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_smart_proxy.backends.threads import run_in_thread
from llama_smart_proxy.proxy.chat.passage import Found
from llama_smart_proxy.proxy.errors import BadRequest, NotFound, Overloaded
from llama_smart_proxy.proxy.knowledge import catalogue
from llama_smart_proxy.proxy.knowledge.base import Addition, Chunking, Collection, Document, Member, Status, Viewer
from llama_smart_proxy.proxy.knowledge.searching import Searching
from llama_smart_proxy.proxy.knowledge.sources import add_source
from llama_smart_proxy.proxy.knowledge.tables import Kept, KeptMember
from llama_smart_proxy.proxy.store import Sql

if TYPE_CHECKING:
    from llama_smart_proxy.proxy.knowledge.knowledge import Knowledge, Opened

CHANGES_S = 0.2
"""Shortest time in seconds between two reports of `Library.changes`."""


class Library:
    """All operations raise `NotFound` (a ProxyError) for what does not exist for the viewer, `BadRequest` for invalid
    values. Collections are given by id or by name. Lists are sorted by time of creation, the newest first."""

    def __init__(self, knowledge: Knowledge, viewer: Viewer) -> None:
        self._knowledge = knowledge
        self._viewer = viewer

    def seen_by(self, viewer: Viewer) -> Library:
        """The same for another client."""
        return Library(self._knowledge, viewer)

    async def incoming(self) -> Path:
        """The folder for files that are being received, to be passed to `upload` or `add_source`. It is on the same
        disk as the documents, and emptied before the first use of the knowledge base."""
        return (await self._opened()).contents.incoming

    # -- collections ---------------------------------------------------------------------------------------------------

    async def create(
        self, name: str, *, metadata: Mapping[str, Any] | None = None, days: int | None = None
    ) -> Collection:
        """A new, empty collection; its name need not be new."""
        work = partial(
            catalogue.create, name=name, owner=self._viewer.client, metadata=metadata or {}, days=_checked(days)
        )
        return (await (await self._opened()).database.run(work)).collection

    async def collections(self) -> list[Collection]:
        """Those that the viewer may search."""
        found = await (await self._opened()).database.run(catalogue.collections)
        return [kept.collection for kept in found if self._may_search(kept.collection)]

    async def collection(self, collection: str) -> Collection:
        """One of them."""
        return (await self._seen(collection)).collection

    async def update(
        self,
        collection: str,
        *,
        name: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        days: int | None = None,
    ) -> Collection:
        """Change what is not None. Requires that the viewer made it, or is admin; so do all changes below."""
        kept = await self._own(collection)
        given = {"name": name, "metadata": metadata, "days": _checked(days)}
        fields = {field: value for field, value in given.items() if value is not None}
        await (await self._opened()).database.run(partial(catalogue.update, serial=kept.serial, fields=fields))
        return await self.collection(kept.collection.id)

    async def delete(self, collection: str) -> None:
        """Remove a collection with its pieces; documents stay, but for those that came by `add_source`."""
        kept = await self._own(collection)
        await (await self._opened()).delete(kept)

    # -- documents -----------------------------------------------------------------------------------------------------

    async def upload(self, file: Path, name: str, *, purpose: str = "assistants", media_type: str = "") -> Document:
        """Keep a document. `file` is moved into the knowledge base."""
        opened = await self._opened()
        with _keeping():
            spooled = await run_in_thread(partial(opened.contents.take, file, move=True))
        work = partial(
            catalogue.add_document, name=name, size=spooled.size, digest=spooled.digest,
            owner=self._viewer.client, purpose=purpose, media_type=media_type,
        )  # fmt: skip
        async with opened.writing:
            await run_in_thread(partial(opened.contents.keep, spooled))
            return (await opened.database.run(work))[1]

    async def documents(self, purpose: str = "") -> list[Document]:
        """The viewer's documents."""
        owner = None if self._viewer.is_admin else self._viewer.client
        return await (await self._opened()).database.run(partial(catalogue.documents, owner=owner, purpose=purpose))

    async def document(self, document: str) -> Document:
        """One of them, by id."""
        return (await self._document(document))[1]

    async def content(self, document: str) -> Path:
        """The file with its content."""
        found = await self.document(document)
        if not found.digest:
            raise NotFound(f"the content of {found.name!r} could not be read", param="file_id")
        return self._knowledge.contents.path(found.digest)

    async def delete_document(self, document: str) -> None:
        """Remove a document, also from all collections."""
        opened = await self._opened()
        serial, found = await self._document(document)
        await opened.delete_document(serial, found.digest)

    # -- members -------------------------------------------------------------------------------------------------------

    async def attach(
        self,
        collection: str,
        document: str,
        *,
        attributes: Mapping[str, Any] | None = None,
        chunking: Chunking | None = None,
    ) -> Member:
        """Add a document to a collection; it is read, embedded and indexed later, without the caller."""
        await self.attach_all(collection, [Addition(document, attributes, chunking)])
        return await self.member(collection, document)

    async def attach_all(self, collection: str, additions: Sequence[Addition], batch: str = "") -> None:
        """Add documents to a collection, or none of them if one does not exist. `batch` is any id, by which `members`
        and `cancel` find them."""
        kept, opened = await self._own(collection), await self._opened()

        def work(sql: Sql) -> None:
            if not catalogue.named(sql, kept.collection.id):  # it has just been deleted
                raise _no_collection(collection)
            for name, attributes, chunking in additions:
                serial, _ = self._visible(catalogue.document(sql, name), name)
                catalogue.attach(sql, kept.serial, serial, attributes, chunking, batch)

        async def attach() -> None:
            await opened.database.run(work)
            opened.added()

        await opened.finish(attach())
        await opened.use([kept.serial])

    async def add_source(self, collection: str, source: str, file: Path, media_type: str = "") -> Member | None:
        """Add or replace what came from the path or URL `source`, whose content `file` has; None if its content is
        the same as before."""
        kept = await self._own(collection)
        opened = await self._opened()
        with _keeping():
            document = await add_source(
                opened, kept, source, file, media_type, move=file.parent == opened.contents.incoming
            )
        return await self.member(kept.collection.id, document) if document else None

    async def members(self, collection: str, status: Status | None = None, batch: str = "") -> list[Member]:
        """The files of a collection, or of a batch in it."""
        kept = await self._seen(collection)
        work = partial(catalogue.members, collection=kept.serial, status=status, batch=batch)
        return [found.member for found in await (await self._opened()).database.run(work)]

    async def cancel(self, collection: str, batch: str) -> None:
        """Stop adding those of a batch that are in progress; they are `CANCELLED` then."""
        kept, opened = await self._own(collection), await self._opened()
        await opened.database.run(partial(catalogue.cancel, collection=kept.serial, batch=batch))
        opened.step()

    async def member(self, collection: str, document: str) -> Member:
        """One of them."""
        return (await self._member(await self._seen(collection), document)).member

    async def update_member(self, collection: str, document: str, attributes: Mapping[str, Any]) -> Member:
        """Replace its attributes."""
        found = await self._member(await self._own(collection), document)
        work = partial(catalogue.set_attributes, member=found.serial, attributes=attributes)
        await (await self._opened()).database.run(work)
        return await self.member(collection, document)

    async def detach(self, collection: str, document: str) -> None:
        """Remove a document from a collection, or stop adding it."""
        opened = await self._opened()
        found = await self._member(await self._own(collection), document)
        await opened.detach(found)

    async def pieces(self, collection: str, document: str) -> list[str]:
        """The texts of its pieces, in order."""
        found = await self._member(await self._seen(collection), document)
        return await (await self._opened()).database.run(partial(catalogue.texts, version=found.version))

    async def changes(self, collection: str) -> AsyncIterator[Collection]:
        """The collection now, and after each change of its counts, until no file is in progress any more."""
        opened, before = await self._opened(), None
        while True:
            stepped = opened.next_step
            found = await self.collection(collection)
            if found.counts != before:
                yield found
                before = found.counts
            if not found.counts.in_progress:
                return
            await stepped.wait()
            await asyncio.sleep(CHANGES_S)

    async def problem(self) -> str:
        """Why nothing that is in progress is added for now; empty if it is."""
        return (await self._opened()).ingestion.problem

    # -- searches ------------------------------------------------------------------------------------------------------

    async def search(
        self,
        query: str,
        collections: Sequence[str],
        *,
        limit: int = 10,
        documents: frozenset[str] | None = None,
        rerank: bool | None = None,
    ) -> Found:
        """The passages that answer `query` best, of these collections (at least one) and documents (None: all).
        `rerank` by the configured model, if there is one and None or True is given."""
        found = {kept.serial: kept for kept in [await self._seen(name) for name in collections]}
        opened = await self._opened()
        await opened.use(list(found))
        searching = Searching(opened, self._knowledge.embedder)
        return await searching.search(query, list(found.values()), limit, documents, rerank=rerank is not False)

    async def grade(self, query: str, texts: Sequence[str]) -> list[float]:
        """The relevance of any texts (strips of passages, web pages) for `query`, as `Passage.relevance`."""
        return await Searching(await self._opened(), self._knowledge.embedder).grade(query, texts)

    # -- what the viewer may -------------------------------------------------------------------------------------------

    async def _opened(self) -> Opened:
        return await self._knowledge.opened()

    def _may_search(self, collection: Collection) -> bool:
        return self._viewer.may_search(collection.owner, collection.name)

    def _may_name(self, collection: Collection, name: str) -> bool:
        """Those of other clients are not meant by their name, also by who may see them: anyone could make one that is
        called as the operator's is."""
        return name == collection.id or collection.owner in ("", self._viewer.client)

    async def _seen(self, name: str) -> Kept:
        """The collection that the viewer may search: of several with this name its own, or the newest."""
        rows = await (await self._opened()).database.run(partial(catalogue.named, name=name))
        found = [kept for kept in rows if self._may_search(kept.collection) and self._may_name(kept.collection, name)]
        if not found:
            raise _no_collection(name)
        own = [kept for kept in found if kept.collection.owner == self._viewer.client]
        return found[0] if found[0].collection.id == name or not own else own[0]

    async def _own(self, name: str) -> Kept:
        """The collection that the viewer may change."""
        kept = await self._seen(name)
        if not self._viewer.may_change(kept.collection.owner):
            raise BadRequest(
                f"the collection {kept.collection.name!r} is the operator's: it can be searched, not changed",
                status=403,
                code="insufficient_scope",
            )
        return kept

    async def _document(self, name: str) -> tuple[int, Document]:
        found = await (await self._opened()).database.run(partial(catalogue.document, name=name))
        return self._visible(found, name)

    def _visible(self, found: tuple[int, Document] | None, name: str) -> tuple[int, Document]:
        if found is None or not self._viewer.may_change(found[1].owner):
            raise NotFound(f"there is no file {name!r}", param="file_id")
        return found

    async def _member(self, kept: Kept, document: str) -> KeptMember:
        def work(sql: Sql) -> KeptMember | None:
            return catalogue.member(sql, kept.serial, document)

        found = await (await self._opened()).database.run(work)
        if found is None:
            raise NotFound(f"there is no file {document!r} in the collection {kept.collection.name!r}", param="file_id")
        return found


def _no_collection(name: str) -> NotFound:
    return NotFound(f"there is no collection {name!r}", param="collection")


@contextmanager
def _keeping() -> Iterator[None]:
    """Raises: Overloaded if the disk does not take a content."""
    try:
        yield
    except OSError as exc:
        raise Overloaded(f"the document cannot be kept: {exc.strerror}", code="not_kept") from exc


def _checked(days: int | None) -> int | None:
    if days is not None and not 1 <= days <= 36500:
        raise BadRequest("a collection is kept for 1 to 36500 days of disuse", param="expires_after")
    return days
