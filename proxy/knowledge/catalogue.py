"""Collections, documents and members in the database. Each function is done within one transaction."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import orjson

from llama_smart_proxy.proxy.knowledge.base import Chunking, Document, Status
from llama_smart_proxy.proxy.knowledge.tables import (
    COLLECTION,
    DOCUMENT,
    MEMBER,
    MEMBERS,
    Kept,
    KeptMember,
    document_of,
    kept_of,
    member_of,
)
from llama_smart_proxy.proxy.store import Sql

DEFAULT_CHUNKING = (Chunking().characters, Chunking().overlap)
_STATES = "SELECT collection, status, count(*), coalesce(sum(bytes), 0) FROM members"


class Change(NamedTuple):
    """A change of what is found in a collection: the version that is found now (0: none), of `file`, in place of the
    pieces `removed`. `stamp` is how many changes there have been."""

    collection: str
    stamp: int
    file: str
    version: int
    removed: Sequence[int]


class Source(NamedTuple):
    """A document that came from a path or URL: its id, the state of the file, and why it is not readable."""

    document: str
    stamp: str
    error: str


class Taken(NamedTuple):
    """A piece that was found, as it is in the catalogue."""

    text: str
    heading: str
    number: int
    collection: str
    document: str
    document_id: str
    source: str
    attributes: Mapping[str, Any]


# -- collections -------------------------------------------------------------------------------------------------------


def create(sql: Sql, name: str, owner: str, metadata: Mapping[str, Any], days: int | None) -> Kept:
    """A new collection."""
    now = time.time()
    values = (f"vs_{secrets.token_hex(12)}", name, owner, now, now, _json(metadata), days, 0)
    query = "INSERT INTO collections (id, name, owner, created_s, used_s, metadata, days, stamp) VALUES "
    ((serial,),) = sql.execute(f"{query} (?, ?, ?, ?, ?, ?, ?, ?) RETURNING serial", values)
    return kept_of((serial, *values), ())


def collections(sql: Sql) -> list[Kept]:
    """All, the newest first."""
    states: dict[int, list[tuple[str, int, int]]] = {}
    for serial, *state in sql.execute(f"{_STATES} GROUP BY collection, status"):
        states.setdefault(serial, []).append((state[0], state[1], state[2]))
    rows = sql.execute(f"SELECT {COLLECTION} FROM collections c ORDER BY c.serial DESC")
    return [kept_of(row, states.get(row[0], ())) for row in rows]


def named(sql: Sql, name: str) -> list[Kept]:
    """Those whose id or name this is: that with the id first, then the newest."""
    query = f"SELECT {COLLECTION} FROM collections c WHERE c.id = ? OR c.name = ? ORDER BY c.serial DESC"
    rows = sorted(sql.execute(query, (name, name)), key=lambda row: bool(row[1] != name))
    return [kept_of(row, _states(sql, row[0])) for row in rows]


def of_operator(sql: Sql, name: str) -> Kept:
    """The operator's collection of this name, which is made if there is none."""
    found = [kept for kept in named(sql, name) if not kept.collection.owner]
    return found[0] if found else create(sql, name, "", {}, None)


def _states(sql: Sql, serial: int) -> list[tuple[str, int, int]]:
    rows = sql.execute(f"{_STATES} WHERE collection = ? GROUP BY collection, status", (serial,))
    return [(status, files, size) for _, status, files, size in rows]


def update(sql: Sql, serial: int, fields: Mapping[str, Any]) -> None:
    """Change these columns."""
    for column, value in fields.items():
        value = _json(value) if isinstance(value, Mapping) else value
        sql.execute(f"UPDATE collections SET {column} = ? WHERE serial = ?", (value, serial))


def delete(sql: Sql, serial: int) -> list[str]:
    """Remove a collection with its members and with the documents that came to it by their source. Returns the digests
    of those."""
    sql.execute(
        "DELETE FROM chunks WHERE version IN (SELECT v.serial FROM versions v JOIN members m ON m.serial = v.member "
        "WHERE m.collection = ?)",
        (serial,),
    )
    sql.execute("DELETE FROM versions WHERE member IN (SELECT serial FROM members WHERE collection = ?)", (serial,))
    sql.execute("DELETE FROM members WHERE collection = ?", (serial,))
    rows = sql.execute("DELETE FROM documents WHERE collection = ? RETURNING digest", (serial,))
    query = "DELETE FROM calibrations WHERE collection = (SELECT id FROM collections WHERE serial = ?)"
    sql.execute(query, (serial,))
    sql.execute("DELETE FROM collections WHERE serial = ?", (serial,))
    return [digest for (digest,) in rows]


def use(sql: Sql, serials: Sequence[int], now_s: float) -> None:
    """Collections have been used."""
    for serial in serials:
        sql.execute("UPDATE collections SET used_s = ? WHERE serial = ?", (now_s, serial))


def expired(sql: Sql, now_s: float) -> list[Kept]:
    """The collections that have been out of use for longer than they are kept."""
    query = f"SELECT {COLLECTION} FROM collections c WHERE c.days IS NOT NULL AND c.used_s + c.days * 86400.0 < ?"
    return [kept_of(row, ()) for row in sql.execute(query, (now_s,))]


# -- documents ---------------------------------------------------------------------------------------------------------


def add_document(
    sql: Sql, name: str, size: int, digest: str, *, owner: str = "", purpose: str = "assistants",
    media_type: str = "", source: str = "", collection: int = 0, stamp: str = "",
) -> tuple[int, Document]:  # fmt: skip
    """A new document, and its number."""
    values = (f"file-{secrets.token_hex(12)}", name, size, time.time(), digest, owner, purpose, media_type, source)
    query = (
        "INSERT INTO documents (id, name, bytes, created_s, digest, owner, purpose, media_type, source, "
        "collection, stamp) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING serial"
    )
    ((serial,),) = sql.execute(query, (*values, collection, stamp))
    return serial, document_of((serial, *values))


def documents(sql: Sql, owner: str | None, purpose: str) -> list[Document]:
    """Those of an owner (None: all) for this purpose (empty: any), the newest first."""
    query, values = f"SELECT {DOCUMENT} FROM documents d WHERE TRUE", []
    if owner is not None:
        query, values = f"{query} AND d.owner = ?", [owner]
    if purpose:
        query, values = f"{query} AND d.purpose = ?", [*values, purpose]
    return [document_of(row) for row in sql.execute(f"{query} ORDER BY d.serial DESC", values)]


def document(sql: Sql, name: str) -> tuple[int, Document] | None:
    """The document with this id, and its number."""
    rows = sql.execute(f"SELECT {DOCUMENT} FROM documents d WHERE d.id = ?", (name,))
    return (rows[0][0], document_of(rows[0])) if rows else None


def from_source(sql: Sql, collection: int, source: str) -> tuple[int, Document] | None:
    """The document that came to a collection from `source`, and its number."""
    query = f"SELECT {DOCUMENT} FROM documents d WHERE d.collection = ? AND d.source = ?"
    rows = sql.execute(query, (collection, source))
    return (rows[0][0], document_of(rows[0])) if rows else None


def sources(sql: Sql, collection: int, prefix: str) -> dict[str, Source]:
    """The documents that came to a collection from sources that begin with `prefix`, by source."""
    query = (
        "SELECT d.source, d.id, d.stamp, m.error FROM documents d "
        "LEFT JOIN members m ON m.document = d.serial WHERE d.collection = ? AND substr(d.source, 1, ?) = ?"
    )
    rows = sql.execute(query, (collection, len(prefix), prefix))
    return {source: Source(name, stamp, error or "") for source, name, stamp, error in rows}


def set_stamp(sql: Sql, collection: int, source: str, stamp: str) -> None:
    """Note the state of the file that a document came from."""
    query = "UPDATE documents SET stamp = ? WHERE collection = ? AND source = ?"
    sql.execute(query, (stamp, collection, source))


def replace_document(sql: Sql, serial: int, size: int, digest: str, media_type: str, stamp: str) -> None:
    """Another content of a document: it is added again wherever it is."""
    query = "UPDATE documents SET bytes = ?, digest = ?, media_type = ?, stamp = ? WHERE serial = ?"
    sql.execute(query, (size, digest, media_type, stamp, serial))
    query = "UPDATE members SET status = ?, error = '', bytes = ? WHERE document = ?"
    sql.execute(query, (Status.IN_PROGRESS.value, size, serial))


def delete_document(sql: Sql, serial: int) -> list[Change]:
    """Remove a document, also from all collections."""
    rows = sql.execute("SELECT serial FROM members WHERE document = ?", (serial,))
    gone = [detach(sql, member) for (member,) in rows]
    sql.execute("DELETE FROM documents WHERE serial = ?", (serial,))
    return gone


def is_used(sql: Sql, digest: str) -> bool:
    """Whether a document has this content."""
    return bool(sql.execute("SELECT 1 FROM documents WHERE digest = ? LIMIT 1", (digest,)))


def digests(sql: Sql) -> set[str]:
    """Those of all documents."""
    return {digest for (digest,) in sql.execute("SELECT DISTINCT digest FROM documents")}


# -- members -----------------------------------------------------------------------------------------------------------


def attach(
    sql: Sql, collection: int, document: int, attributes: Mapping[str, Any] | None, chunking: Chunking | None,
    batch: str = "",
) -> None:  # fmt: skip
    """Add a document to a collection, or add it again; None: as before, or the defaults."""
    status = Status.IN_PROGRESS.value
    query = "SELECT serial, attributes, characters, overlap FROM members WHERE collection = ? AND document = ?"
    rows = sql.execute(query, (collection, document)) or [(0, "{}", *DEFAULT_CHUNKING)]
    serial, before, *split = rows[0]
    characters, overlap = split if chunking is None else (chunking.characters, chunking.overlap)
    values = (status, before if attributes is None else _json(attributes), characters, overlap, batch)
    if serial:
        query = "UPDATE members SET error = '', status = ?, attributes = ?, characters = ?, overlap = ?, batch = ?"
        sql.execute(f"{query} WHERE serial = ?", (*values, serial))
        return
    ((size,),) = sql.execute("SELECT bytes FROM documents WHERE serial = ?", (document,))
    sql.execute(
        "INSERT INTO members (collection, document, created_s, bytes, status, attributes, characters, overlap, batch, "
        "error, pieces, version, identity) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, '', 0, 0, '')",
        (collection, document, time.time(), size, *values),
    )


def members(sql: Sql, collection: int, status: Status | None, batch: str) -> list[KeptMember]:
    """Those in this state (None: in any) and batch (empty: in any or none), the newest first."""
    query = f"SELECT {MEMBER} FROM {MEMBERS} WHERE m.collection = ?"
    values: list[Any] = [collection]
    if status is not None:
        query, values = f"{query} AND m.status = ?", [*values, status.value]
    if batch:
        query, values = f"{query} AND m.batch = ?", [*values, batch]
    return [member_of(row) for row in sql.execute(f"{query} ORDER BY m.serial DESC", values)]


def member(sql: Sql, collection: int, document: str) -> KeptMember | None:
    """The document with this id in a collection."""
    rows = sql.execute(f"SELECT {MEMBER} FROM {MEMBERS} WHERE m.collection = ? AND d.id = ?", (collection, document))
    return member_of(rows[0]) if rows else None


def set_attributes(sql: Sql, member: int, attributes: Mapping[str, Any]) -> None:
    """Replace a member's attributes."""
    sql.execute("UPDATE members SET attributes = ? WHERE serial = ?", (_json(attributes), member))


def set_status(sql: Sql, collection: int, document: str, status: Status, error: str) -> None:
    """Set the state of a member."""
    query = "UPDATE members SET status = ?, error = ? WHERE collection = ? AND document = "
    values = (status.value, error, collection, document)
    sql.execute(f"{query} (SELECT serial FROM documents WHERE id = ?)", values)


def cancel(sql: Sql, collection: int, batch: str) -> None:
    """Stop adding those of a batch that are in progress."""
    query = "UPDATE members SET status = ? WHERE collection = ? AND batch = ? AND status = ? RETURNING serial, version"
    values = (Status.CANCELLED.value, collection, batch, Status.IN_PROGRESS.value)
    for serial, version in sql.execute(query, values):
        drop_versions(sql, serial, version)


def drop_versions(sql: Sql, member: int, but: int) -> None:
    """Remove all versions of a member but this one, with their pieces."""
    others = "SELECT serial FROM versions WHERE member = ? AND serial <> ?"
    sql.execute(f"DELETE FROM chunks WHERE version IN ({others})", (member, but))
    sql.execute("DELETE FROM versions WHERE member = ? AND serial <> ?", (member, but))


def detach(sql: Sql, member: int) -> Change:
    """Remove a member with its pieces."""
    query = "SELECT c.id, m.version, m.collection, d.id FROM"
    ((collection, version, serial, file),) = sql.execute(f"{query} {MEMBERS} WHERE m.serial = ?", (member,))
    gone = pieces_of(sql, version)
    drop_versions(sql, member, 0)
    sql.execute("DELETE FROM members WHERE serial = ?", (member,))
    return Change(collection, changed(sql, serial), file, 0, gone)


def changed(sql: Sql, collection: int) -> int:
    """Count a change of what is found in a collection. Returns its new stamp."""
    query = "UPDATE collections SET stamp = stamp + 1 WHERE serial = ? RETURNING stamp"
    return int(sql.execute(query, (collection,))[0][0])


def stamp(sql: Sql, name: str) -> int:
    """How many changes there have been of what is found in the collection with this id; 0 without one."""
    rows = sql.execute("SELECT stamp FROM collections WHERE id = ?", (name,))
    return int(rows[0][0]) if rows else 0


def pieces_of(sql: Sql, version: int) -> list[int]:
    """The numbers of the pieces of a version."""
    return [piece for (piece,) in sql.execute("SELECT id FROM chunks WHERE version = ?", (version,))]


def texts(sql: Sql, version: int) -> list[str]:
    """The texts of a version, in order."""
    return [text for (text,) in sql.execute("SELECT text FROM chunks WHERE version = ? ORDER BY number", (version,))]


def taken(sql: Sql, pieces: Sequence[int]) -> dict[int, Taken]:
    """These pieces, but for those that are found no more."""
    found = {}
    query = (
        "SELECT k.id, k.text, k.heading, k.number, c.id, d.name, d.id, d.source, m.attributes FROM chunks k "
        "JOIN versions v ON v.serial = k.version JOIN members m ON m.serial = v.member AND m.version = v.serial "
        "JOIN documents d ON d.serial = m.document JOIN collections c ON c.serial = m.collection WHERE k.id IN "
    )
    for start in range(0, len(pieces), 500):
        some = pieces[start : start + 500]
        for piece, *rest, attributes in sql.execute(f"{query} ({', '.join('?' * len(some))})", some):
            found[piece] = Taken._make([*rest, orjson.loads(attributes)])
    return found


def _json(value: Mapping[str, Any]) -> str:
    return orjson.dumps(dict(value)).decode()
