"""What is still to be read and embedded, in the database. Each function is done within one transaction.

A file that is replaced, cancelled or removed while it is read has no version there any more, or one of another key:
what is stored for it then is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from llama_smart_proxy.proxy.knowledge.base import Chunking, Document, Status
from llama_smart_proxy.proxy.knowledge.catalogue import Change, changed, drop_versions, pieces_of
from llama_smart_proxy.proxy.knowledge.tables import DOCUMENT, MEMBERS, document_of
from llama_smart_proxy.proxy.store import Sql

_JOB = f"m.serial, c.id, m.characters, m.overlap, {DOCUMENT}"


class Job(NamedTuple):
    """A member that is to be read."""

    member: int
    collection: str
    chunking: Chunking
    document: Document

    def key(self, identity: str) -> str:
        """What its pieces and their vectors depend on."""
        return f"{self.document.digest} {self.chunking.characters} {self.chunking.overlap} {identity}"


class Staged(NamedTuple):
    """A piece of a version that is not complete: version, number, heading, text, vector."""

    version: int
    number: int
    heading: str
    text: str
    vector: bytes


def jobs(sql: Sql, limit: int) -> list[Job]:
    """The next members that are to be read."""
    query = f"SELECT {_JOB} FROM {MEMBERS} WHERE m.status = ? ORDER BY m.serial LIMIT ?"
    return [_job(row) for row in sql.execute(query, (Status.IN_PROGRESS.value, limit))]


def _job(row: tuple[Any, ...]) -> Job:
    return Job(row[0], row[1], Chunking(row[2], row[3]), document_of(row[4:]))


def begin(sql: Sql, job: Job, identity: str) -> tuple[int, int]:
    """The version that a member's pieces are stored in, and how many of them are there: an earlier run may have begun
    it. Version 0: the member is not to be read any more."""
    rows = sql.execute("SELECT version, status FROM members WHERE serial = ?", (job.member,))
    if not rows or rows[0][1] != Status.IN_PROGRESS:
        return 0, 0
    found, key = rows[0][0], job.key(identity)
    for serial, its in sql.execute(
        "SELECT serial, key FROM versions WHERE member = ? AND serial <> ?", (job.member, found)
    ):
        if its == key:
            ((count,),) = sql.execute("SELECT count(*) FROM chunks WHERE version = ?", (serial,))
            return serial, count
    drop_versions(sql, job.member, found)
    query = "INSERT INTO versions (member, key) VALUES (?, ?) RETURNING serial"
    return sql.execute(query, (job.member, key))[0][0], 0


def store(sql: Sql, rows: Sequence[Staged]) -> None:
    """Store pieces, of versions that are still there."""
    versions = sorted({row.version for row in rows})
    query = f"SELECT serial FROM versions WHERE serial IN ({', '.join('?' * len(versions))})"
    there = {serial for (serial,) in sql.execute(query, versions)} if versions else set()
    insert = "INSERT INTO chunks (version, number, heading, text, vector) VALUES (?, ?, ?, ?, ?)"
    sql.many(insert, [row for row in rows if row.version in there])


def complete(sql: Sql, job: Job, version: int, identity: str) -> Change | None:
    """Let the pieces of `version` be found, and no longer those of the version before. None if that is not the
    member's content any more."""
    query = f"SELECT {_JOB}, m.version, m.status, m.collection FROM {MEMBERS} WHERE m.serial = ?"
    rows = sql.execute(query, (job.member,))
    if not rows or rows[0][-2] != Status.IN_PROGRESS or _job(rows[0][:-3]).key(identity) != job.key(identity):
        return None
    before, collection = rows[0][-3], rows[0][-1]
    removed = pieces_of(sql, before)
    drop_versions(sql, job.member, version)
    ((count,),) = sql.execute("SELECT count(*) FROM chunks WHERE version = ?", (version,))
    sql.execute(
        "UPDATE members SET version = ?, pieces = ?, identity = ?, status = ?, error = '' WHERE serial = ?",
        (version, count, identity, Status.COMPLETED.value, job.member),
    )
    return Change(job.collection, changed(sql, collection), job.document.id, version, removed)


def fail(sql: Sql, job: Job, reason: str) -> None:
    """A member cannot be read. The version before, if there is one, is still found."""
    rows = sql.execute(
        "UPDATE members SET status = ?, error = ? WHERE serial = ? AND status = ? RETURNING version",
        (Status.FAILED.value, reason, job.member, Status.IN_PROGRESS.value),
    )
    if rows:
        drop_versions(sql, job.member, rows[0][0])


def outdate(sql: Sql, identity: str) -> int:
    """Let everything be embedded again that has vectors of another model. Returns the number of files."""
    query = "UPDATE members SET status = ? WHERE status = ? AND identity <> ? RETURNING serial"
    return len(sql.execute(query, (Status.IN_PROGRESS.value, Status.COMPLETED.value, identity)))


def waiting(sql: Sql) -> int:
    """How many members are to be read."""
    ((count,),) = sql.execute("SELECT count(*) FROM members WHERE status = ?", (Status.IN_PROGRESS.value,))
    return int(count)


def page(sql: Sql, collection: str, identity: str, after: tuple[int, int], limit: int) -> list[tuple[Any, ...]]:
    """Pieces of a collection that are found, with vectors of this identity: number in the catalogue, document's id,
    text, vector, version, and number in the version; those behind `after`, a version and a number."""
    query = (
        "SELECT k.id, d.id, k.text, k.vector, k.version, k.number FROM members m "
        "JOIN documents d ON d.serial = m.document JOIN chunks k ON k.version = m.version "
        "WHERE m.collection = (SELECT serial FROM collections WHERE id = ?) AND m.version >= ? AND m.identity = ? "
        "AND (k.version > ? OR k.number > ?) ORDER BY m.version, k.number LIMIT ?"
    )
    return sql.execute(query, (collection, after[0], identity, after[0], after[1], limit))


def version_page(sql: Sql, version: int, after: int, limit: int) -> list[tuple[Any, ...]]:
    """Pieces of a version behind number `after`: number in the catalogue, text, vector, and number in the version."""
    query = "SELECT id, text, vector, number FROM chunks WHERE version = ? AND number > ? ORDER BY number LIMIT ?"
    return [
        (piece, text, vector, number) for piece, text, vector, number in sql.execute(query, (version, after, limit))
    ]
