"""The tables of the knowledge base, and the records that their rows are.

A member is a document in a collection. Its pieces belong to a version of it: one is read, embedded and stored while the
one before is still found, and takes its place in one transaction.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import orjson

from llama_smart_proxy.proxy.knowledge.base import Chunking, Collection, Counts, Document, Member, Status
from llama_smart_proxy.proxy.store import Schema

SCHEMA = Schema(
    "knowledge.db",
    "llama_smart_proxy_knowledge",
    (
        """
        CREATE TABLE collections (
            serial INTEGER PRIMARY KEY, id TEXT, name TEXT, owner TEXT, created_s REAL, used_s REAL, metadata TEXT,
            days INTEGER, stamp INTEGER
        );
        CREATE UNIQUE INDEX collections_by_id ON collections (id);
        CREATE TABLE documents (
            serial INTEGER PRIMARY KEY, id TEXT, name TEXT, bytes INTEGER, created_s REAL, digest TEXT, owner TEXT,
            purpose TEXT, media_type TEXT, source TEXT, collection INTEGER,
            stamp TEXT
        );
        CREATE UNIQUE INDEX documents_by_id ON documents (id);
        CREATE INDEX documents_by_digest ON documents (digest);
        CREATE INDEX documents_by_source ON documents (collection, source);
        CREATE TABLE members (
            serial INTEGER PRIMARY KEY, collection INTEGER, document INTEGER, status TEXT, error TEXT, created_s REAL,
            pieces INTEGER, bytes INTEGER, attributes TEXT, characters INTEGER, overlap INTEGER, version INTEGER,
            identity TEXT, batch TEXT
        );
        CREATE UNIQUE INDEX members_by_document ON members (collection, document);
        CREATE INDEX members_of_document ON members (document);
        CREATE INDEX members_by_status ON members (status, serial);
        CREATE INDEX members_by_version ON members (collection, version);
        CREATE TABLE versions (serial INTEGER PRIMARY KEY, member INTEGER, key TEXT);
        CREATE INDEX versions_by_member ON versions (member);
        CREATE TABLE chunks (
            id INTEGER PRIMARY KEY, version INTEGER, number INTEGER, heading TEXT, text TEXT, vector BLOB
        );
        CREATE UNIQUE INDEX chunks_by_version ON chunks (version, number);
        """,
        """
        CREATE TABLE calibrations (collection TEXT PRIMARY KEY, identity TEXT, pieces INTEGER, off REAL, near REAL);
        """,
    ),
    memory=False,
)
"""`documents.collection` is the one that a document came to by `source`, 0 for an upload, and `documents.stamp` changes
with a watched file. `members.version` is the one
that is found, 0 for none, and `identity` that of its vectors. `versions.key` is what its pieces depend on. `stamp`
counts the changes of what is found in a collection. Vectors are of 16-bit floats, the lowest byte first."""

COLLECTION = "c.serial, c.id, c.name, c.owner, c.created_s, c.used_s, c.metadata, c.days, c.stamp"
DOCUMENT = "d.serial, d.id, d.name, d.bytes, d.created_s, d.digest, d.owner, d.purpose, d.media_type, d.source"
MEMBER = (
    "m.serial, c.id, m.status, m.error, m.created_s, m.pieces, m.attributes, m.characters, m.overlap, m.batch, "
    "m.version, " + DOCUMENT
)
MEMBERS = "members m JOIN documents d ON d.serial = m.document JOIN collections c ON c.serial = m.collection"


class Kept(NamedTuple):
    """A collection, its number in the database, and how often what is found in it has changed."""

    serial: int
    collection: Collection
    stamp: int


class KeptMember(NamedTuple):
    """A member, its number in the database, and that of the version which is found."""

    serial: int
    member: Member
    version: int


def kept_of(row: tuple[Any, ...], states: Iterable[tuple[str, int, int]]) -> Kept:
    """From a row of `COLLECTION`; `states` are status, number of files, and bytes."""
    serial, name, title, owner, created_s, used_s, metadata, days, stamp = row
    counts, size = {}, 0
    for status, files, taken in states:
        counts[str(status)] = int(files)
        size += int(taken)
    found = orjson.loads(metadata)
    return Kept(
        serial, Collection(name, title, created_s, owner, found, days, used_s, size, Counts(**counts)), int(stamp)
    )


def document_of(row: tuple[Any, ...]) -> Document:
    """From a row of `DOCUMENT`."""
    _, name, title, size, created_s, digest, owner, purpose, media_type, source = row
    return Document(name, title, size, created_s, digest, owner, purpose, media_type, source)


def member_of(row: tuple[Any, ...]) -> KeptMember:
    """From a row of `MEMBER`."""
    serial, collection, status, error, created_s, pieces, attributes, characters, overlap, batch, version = row[:11]
    member = Member(
        document_of(row[11:]), collection, Status(status), created_s, error, pieces, orjson.loads(attributes),
        Chunking(characters, overlap), batch,
    )  # fmt: skip
    return KeptMember(serial, member, version)
