"""The database in a file of the state directory.

If it cannot be opened, all is kept in memory; a file that is damaged is renamed, and a new one begun. Both are logged
once.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from llama_smart_proxy.proxy.store.schema import STATE, Row, Schema, Sql, Unavailable

logger = logging.getLogger(__name__)

T = TypeVar("T")

FILE = STATE.file
BUSY_S = 5.0
"""Longest wait in seconds for another process that writes to the file."""
_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def state_dir(configured: Path | None, environ: Mapping[str, str]) -> Path | None:
    """The folder for the state: as configured, or systemd's `STATE_DIRECTORY`, or `llama-smart-proxy` in
    `$XDG_STATE_HOME` or `~/.local/state`; None if there is no home."""
    if configured is not None:
        return configured
    if given := environ.get("STATE_DIRECTORY", "").partition(":")[0]:
        return Path(given)
    home = environ.get("XDG_STATE_HOME", "")
    try:
        base = Path(home) if Path(home).is_absolute() else Path.home() / ".local" / "state"
    except RuntimeError:
        return None
    return base / "llama-smart-proxy"


class SQLite:
    """The file in `folder`, or the memory if that is None. A `schema.Database`."""

    def __init__(self, folder: Path | None, schema: Schema = STATE) -> None:
        self._folder = folder
        self._schema = schema
        self._connection: _Connection | None = None

    def transaction(self, work: Callable[[Sql], T], *, essential: bool) -> T:
        """As `Database.transaction`."""
        try:
            return _transaction(self._opened(), work)
        except sqlite3.DatabaseError as exc:
            if _is_busy(exc):
                raise Unavailable(f"another process keeps {self._schema.file} locked: {exc}") from exc
            if self._folder is None or not self._recover(exc, essential):
                raise
        return _transaction(self._opened(), work)

    def exists(self) -> bool:
        """As `Database.exists`."""
        with suppress(OSError):  # it cannot be known, as in a folder of others
            return self._connection is not None or (
                self._folder is not None and (self._folder / self._schema.file).exists()
            )
        return True

    def close(self) -> None:
        """As `Database.close`."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _recover(self, exc: sqlite3.DatabaseError, essential: bool) -> bool:
        """After `exc`: begin a new file if this one is damaged, or go on in memory if it cannot be used for something
        `essential`. Returns False if neither is done: the work is at fault, or is not worth that.

        Raises: `Unavailable` for work that is not essential.
        """
        damaged = type(exc) is sqlite3.DatabaseError  # "file is not a database", "disk image is malformed"
        if not damaged and (not isinstance(exc, sqlite3.OperationalError) or "syntax" in str(exc)):
            return False
        if not damaged and not (essential and self._schema.memory):
            raise self._unavailable(exc) from exc
        self.close()
        if damaged:
            self._set_aside(exc)
        else:
            self._use_memory(exc)
        return True

    def _opened(self) -> _Connection:
        if self._connection is None:
            try:
                self._connection = _connect(self._folder, self._schema)
            except (OSError, sqlite3.OperationalError, _Newer) as exc:
                if isinstance(exc, sqlite3.OperationalError) and _is_busy(exc):
                    raise
                self._use_memory(exc)
                self._connection = _connect(None, self._schema)
        return self._connection

    def _unavailable(self, exc: BaseException) -> Unavailable:
        return Unavailable(f"{self._schema.file} cannot be used (setting state_dir): {exc}")

    def _use_memory(self, exc: BaseException) -> None:
        """Raises: Unavailable if that is not allowed."""
        if not self._schema.memory:
            raise self._unavailable(exc) from exc
        logger.warning("the state cannot be kept in %s, only in memory (setting state_dir): %s", self._folder, exc)
        self._folder = None

    def _set_aside(self, exc: BaseException) -> None:
        assert self._folder is not None
        file = self._folder / self._schema.file
        aside = file.with_name(f"{file.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
        logger.warning("%s is damaged (%s), and now called %s; a new one is begun", file, exc, aside.name)
        try:
            file.rename(aside)
            for suffix in ("-wal", "-shm"):
                file.with_name(file.name + suffix).unlink(missing_ok=True)
        except OSError as failure:
            self._use_memory(failure)


class _Newer(Exception):
    """The file was written by a newer version of the proxy."""


class _Connection:
    """A `schema.Sql`."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self.close = connection.close

    def execute(self, query: str, values: Sequence[Any] = ()) -> list[Row]:
        return self._connection.execute(query, values).fetchall()

    def many(self, query: str, rows: Iterable[Sequence[Any]]) -> None:
        self._connection.executemany(query, rows)


def _is_busy(exc: sqlite3.Error) -> bool:
    return getattr(exc, "sqlite_errorcode", 0) & 0xFF in _BUSY


def _connect(folder: Path | None, schema: Schema) -> _Connection:
    """Raises: OSError, sqlite3.Error, _Newer."""
    if folder is not None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(folder / schema.file, os.O_RDWR | os.O_CREAT, 0o600))
    target = ":memory:" if folder is None else str(folder / schema.file)
    connection = sqlite3.connect(target, timeout=BUSY_S, isolation_level=None)
    opened = _Connection(connection)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        _transaction(opened, partial(_migrate, schema))
    except BaseException:
        connection.close()
        raise
    return opened


def _migrate(schema: Schema, sql: Sql) -> None:
    ((version,),) = sql.execute("PRAGMA user_version")
    if version > schema.version:
        raise _Newer(f"a newer version of the proxy has written {schema.file}")
    for statement in schema.statements(version):
        sql.execute(statement)
    if version < schema.version:
        sql.execute(f"PRAGMA user_version = {schema.version}")


def _transaction(sql: _Connection, work: Callable[[Sql], T]) -> T:
    sql.execute("BEGIN IMMEDIATE")
    try:
        result = work(sql)
        sql.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            sql.execute("ROLLBACK")
        raise
    return result
