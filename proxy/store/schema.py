"""The tables, and what the two databases have in common: one dialect of SQL, that of SQLite with `?` for values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
Row = tuple[Any, ...]

MIGRATIONS = (
    """
    CREATE TABLE kept (agent TEXT, key TEXT, value BLOB, written_s REAL, PRIMARY KEY (agent, key)) WITHOUT ROWID;
    CREATE INDEX kept_by_age ON kept (agent, written_s);
    """,
    """
    CREATE TABLE usage (
        day TEXT, key TEXT, model TEXT, api TEXT, requests INTEGER, errors INTEGER, prompt_tokens INTEGER,
        completion_tokens INTEGER, cached_tokens INTEGER, seconds REAL, PRIMARY KEY (day, key, model, api)
    ) WITHOUT ROWID;
    CREATE TABLE requests (
        serial INTEGER PRIMARY KEY, id TEXT, at_s REAL, key TEXT, model TEXT, status INTEGER, entry BLOB
    );
    CREATE INDEX requests_by_id ON requests (id);
    CREATE TABLE batches (writer TEXT PRIMARY KEY, number INTEGER, at_s REAL) WITHOUT ROWID;
    """,
)
"""The statements that lead from each version of the schema to the next one; only ever appended to."""


class Sql(Protocol):
    """A connection within a transaction."""

    def execute(self, query: str, values: Sequence[Any] = ()) -> list[Row]:
        """The rows of one statement. Raises: the errors of the database."""

    def many(self, query: str, rows: Iterable[Sequence[Any]]) -> None:
        """One statement for the values of each row. Raises: as `execute`."""


class Database(Protocol):
    """Where all is kept. All methods are called from one thread."""

    def transaction(self, work: Callable[[Sql], T], *, essential: bool) -> T:
        """The result of `work`, which is one transaction; it may be called again if the connection had to be replaced.
        Something that is `essential` is kept in memory if it cannot be kept otherwise, where that is possible.

        Raises: what `work` raises; `Unavailable` if the database cannot be used now.
        """

    def exists(self) -> bool:
        """Whether there is something to read; False only if that is certain."""

    def close(self) -> None:
        """Close the connection, if there is one."""


class Unavailable(Exception):
    """The database cannot be used now; the message contains no credentials."""


@dataclass(frozen=True, slots=True)
class Schema:
    """The tables of one database: its `file` in the state directory, or its `namespace` in Postgres. Without `memory`,
    a file that cannot be used makes it `Unavailable`, and nothing is kept in memory instead."""

    file: str
    namespace: str
    migrations: Sequence[str]
    memory: bool = True

    @property
    def version(self) -> int:
        """The present one."""
        return len(self.migrations)

    def statements(self, version: int) -> list[str]:
        """What leads from this version of the schema to the present one."""
        later = self.migrations[version:]
        return [text for migration in later for text in map(str.strip, migration.split(";")) if text]


STATE = Schema("state.db", "llama_smart_proxy", MIGRATIONS)
"""What the proxy remembers: values, usage and requests."""
