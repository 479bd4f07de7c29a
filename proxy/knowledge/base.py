"""What the parts of the knowledge base have in common: its records, and the interfaces between its parts.

- `reading` makes pieces of text from a file (`Reader`), in a process with limits.
- `catalogue` keeps collections, files, pieces and vectors in a database; it is what survives.
- `ingestion` reads, embeds (`Embedder`) and stores what was added, a file at a time.
- `index` finds pieces by vector and by text (`Index`); it can always be made again from the catalogue.
- `library` is all that as one client sees it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vector = NDArray[np.float32]
    """Shape (dimensions,), of length 1."""
    Vectors = NDArray[np.float32]
    """Shape (texts, dimensions), each row of length 1."""


class Status(StrEnum):
    """The state of a file in a collection. Source: OpenAI API reference, vector store file object."""

    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Piece(NamedTuple):
    """A part of a document: its text, which begins with the path of its headings, and that path ("A > B")."""

    text: str
    heading: str = ""


class Unreadable(Exception):
    """A document cannot be read; the message is the reason, for users, without a path of this machine."""


@dataclass(frozen=True, slots=True)
class Chunking:
    """How a document is split: characters per piece at most, and how many of them are repeated from the one before."""

    characters: int = 900
    overlap: int = 0


class Reader(Protocol):
    """Makes pieces from documents."""

    async def read(self, file: Path, name: str, media_type: str = "", chunking: Chunking = Chunking()) -> list[Piece]:
        """The pieces of `file`, which is called `name` and whose type follows from that, from `media_type` and from its
        first bytes. Raises: Unreadable."""

    async def page(
        self, content: bytes, name: str, media_type: str = "", chunking: Chunking = Chunking()
    ) -> list[Piece]:
        """The pieces of a document that has been fetched, such as a web page, while a person waits: as `read`, and not
        behind the documents of that. Raises: Unreadable."""

    async def close(self) -> None:
        """End its processes."""


class Embedder(Protocol):
    """Makes vectors from texts, with the configured embedding model."""

    async def identity(self) -> str:
        """What vectors depend on: the model and its file. Vectors of another identity are not comparable."""

    async def embed(self, texts: Sequence[str], *, background: bool = False) -> Vectors:
        """One vector per text. In the `background` it yields to the questions of people. Raises: ProxyError."""


class Ranker(Embedder, Protocol):
    """An embedder that may have a reranking model as well."""

    @property
    def reranks(self) -> bool:
        """Whether one is configured."""

    async def rerank(self, query: str, texts: Sequence[str]) -> list[float]:
        """The score of each text for `query`, the higher the better, without bounds. Raises: ProxyError."""


class Row(NamedTuple):
    """A piece in the index: its number in the catalogue, its file's id, its text, and its vector."""

    piece: int
    file: str
    text: str
    vector: Vector


class Hit(NamedTuple):
    """A piece that was found. `dense` is the cosine with the query, `lexical` its BM25 score, each None where only the
    other search has found it; `score` is the fused one, 0 to 1."""

    piece: int
    score: float
    dense: float | None = None
    lexical: float | None = None


class Index(Protocol):
    """The pieces of all collections, to be searched. It may be made again from the catalogue at any time.

    All methods may be called while others run; changes of a collection that was dropped do nothing. Raises:
    UpstreamFailed, where a server is used and cannot be reached.
    """

    async def open(self, collection: str, dimensions: int, stamp: str) -> bool:
        """Prepare a collection. False if it has to be filled again by `add`: it is empty, or was filled from another
        state of the catalogue than `stamp` (a text that changes with the collection's content)."""

    async def add(self, collection: str, rows: Sequence[Row]) -> None:
        """Add pieces. A piece that is there already is replaced."""

    async def remove(self, collection: str, pieces: Sequence[int]) -> None:
        """Remove pieces; those that are not there are ignored."""

    async def settle(self, collection: str, stamp: str) -> None:
        """All changes up to this state of the catalogue have been made: later searches must find them."""

    async def drop(self, collection: str) -> None:
        """Remove a collection."""

    async def search(
        self, collection: str, query: str, vector: Vector, limit: int, files: frozenset[str] | None = None
    ) -> list[Hit]:
        """The best pieces first, at most `limit`, of these files (None: of all)."""

    async def close(self) -> None:
        """Release what it holds."""


@dataclass(frozen=True, slots=True)
class Counts:
    """How many files of a collection are in each state."""

    in_progress: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0

    @property
    def total(self) -> int:
        return self.in_progress + self.completed + self.failed + self.cancelled


@dataclass(frozen=True, slots=True)
class Collection:
    """A set of files that are searched together: OpenAI's vector store. `owner` is the name of the API key that made
    it, empty for the operator's. `days` of disuse after which it is removed, None for never."""

    id: str
    name: str
    created_s: float
    owner: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    days: int | None = None
    used_s: float = 0.0
    bytes: int = 0
    counts: Counts = Counts()


@dataclass(frozen=True, slots=True)
class Document:
    """A file that was added: OpenAI's file object. `source` is where it came from, a path or a URL, empty for an
    upload; `digest` the SHA-256 of its content in hexadecimal."""

    id: str
    name: str
    bytes: int
    created_s: float
    digest: str
    owner: str = ""
    purpose: str = "assistants"
    media_type: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a collection: OpenAI's vector store file. `error` says why it is `FAILED`."""

    document: Document
    collection: str
    status: Status
    created_s: float
    error: str = ""
    pieces: int = 0
    attributes: Mapping[str, Any] = field(default_factory=dict)
    chunking: Chunking = Chunking()
    batch: str = ""
    """The id that `attach` was called with, for files that were added together."""


class Addition(NamedTuple):
    """A document that is to be added to a collection; None: as before, or the defaults."""

    document: str
    attributes: Mapping[str, Any] | None = None
    chunking: Chunking | None = None


@dataclass(frozen=True, slots=True)
class Viewer:
    """Who uses the knowledge base: `client` owns what it makes there, and is empty for the operator; `is_admin` may see
    and change all; `collections` are names or patterns (* and ?) of those of the operator that it may search (None: all
    of them). Those of other clients do not exist for it."""

    client: str = ""
    is_admin: bool = True
    collections: tuple[str, ...] | None = None

    def may_change(self, owner: str) -> bool:
        """Whether it may change what `owner` has made."""
        return self.is_admin or owner == self.client

    def may_search(self, owner: str, name: str) -> bool:
        """Whether the collection `name` of `owner` exists for it."""
        if self.may_change(owner):
            return True
        allowed = self.collections is None or any(fnmatchcase(name, pattern) for pattern in self.collections)
        return not owner and allowed
