"""The knowledge base as one client sees it: the one way in, for the HTTP API, the command line and agents."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from llama_smart_proxy.proxy.chat.passage import Found
from llama_smart_proxy.proxy.knowledge.base import Chunking, Collection, Document, Member, Status, Viewer


class Library(Protocol):
    """All operations raise `NotFound` (a ProxyError) for what does not exist for the viewer, `BadRequest` for invalid
    values. Collections are given by id or by name. Lists are sorted by time of creation, the newest first."""

    def seen_by(self, viewer: Viewer) -> Library:
        """The same for another client."""

    @property
    def incoming(self) -> Path:
        """The folder for files that are being received, to be passed to `upload` or `add_source`. It is on the same
        disk as the documents, and emptied at start."""

    async def create(
        self, name: str, *, metadata: Mapping[str, Any] | None = None, days: int | None = None
    ) -> Collection:
        """A new, empty collection; its name need not be new."""

    async def collections(self) -> list[Collection]:
        """Those that the viewer may search."""

    async def collection(self, collection: str) -> Collection:
        """One of them."""

    async def update(
        self,
        collection: str,
        *,
        name: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        days: int | None = None,
    ) -> Collection:
        """Change what is not None. Requires that the viewer made it, or is admin; so do all changes below."""

    async def delete(self, collection: str) -> None:
        """Remove a collection with its pieces; documents stay, but for those that came by `add_source`."""

    async def upload(self, file: Path, name: str, *, purpose: str = "assistants", media_type: str = "") -> Document:
        """Keep a document. `file` is moved into the knowledge base."""

    async def documents(self, purpose: str = "") -> list[Document]:
        """The viewer's documents."""

    async def document(self, document: str) -> Document:
        """One of them, by id."""

    async def content(self, document: str) -> Path:
        """The file with its content."""

    async def delete_document(self, document: str) -> None:
        """Remove a document, also from all collections."""

    async def attach(
        self,
        collection: str,
        document: str,
        *,
        attributes: Mapping[str, Any] | None = None,
        chunking: Chunking | None = None,
        batch: str = "",
    ) -> Member:
        """Add a document to a collection; it is read, embedded and indexed later, without the caller. `batch` is any
        id, by which `members` and `cancel` find it."""

    async def add_source(self, collection: str, source: str, file: Path, media_type: str = "") -> Member | None:
        """Add or replace what came from the path or URL `source`, whose content `file` has; None if its content is
        the same as before."""

    async def members(self, collection: str, status: Status | None = None, batch: str = "") -> list[Member]:
        """The files of a collection, or of a batch in it."""

    async def cancel(self, collection: str, batch: str) -> None:
        """Stop adding those of a batch that are in progress; they are `CANCELLED` then."""

    async def member(self, collection: str, document: str) -> Member:
        """One of them."""

    async def update_member(self, collection: str, document: str, attributes: Mapping[str, Any]) -> Member:
        """Replace its attributes."""

    async def detach(self, collection: str, document: str) -> None:
        """Remove a document from a collection, or stop adding it."""

    async def pieces(self, collection: str, document: str) -> list[str]:
        """The texts of its pieces, in order."""

    async def changes(self, collection: str) -> AsyncIterator[Collection]:
        """The collection now, and after each change of its counts, until no file is in progress any more."""

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

    async def grade(self, query: str, texts: Sequence[str]) -> list[float]:
        """The relevance of any texts (strips of passages, web pages) for `query`, as `Passage.relevance`."""
