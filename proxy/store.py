"""What the proxy keeps over a restart: one SQLite file in the state directory, used by one thread.

All features share the file and the thread: each has tables of its own, made by an entry of `MIGRATIONS`, and calls
`Store.run` with what it does with the connection. The file is opened with the first call. If it cannot be, all is kept
in memory; a file that is damaged is renamed, and a new one begun. Both are logged once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import orjson

logger = logging.getLogger(__name__)

T = TypeVar("T")

FILE = "state.db"
MIGRATIONS = (
    """
    CREATE TABLE kept (agent TEXT, key TEXT, value BLOB, written_s REAL, PRIMARY KEY (agent, key)) WITHOUT ROWID;
    CREATE INDEX kept_by_age ON kept (agent, written_s);
    """,
)
"""The statements that lead from each version of the schema (`user_version`) to the next one; only ever appended to."""
CLOSE_S = 5.0
"""Time limit in seconds for what is still to be written at the end."""
PROXY = ""
"""The name under which the proxy itself keeps values, which is none of an agent."""
MAX_KEY = 512
"""Characters of a key."""
MAX_VALUE = 256 * 1024
"""Bytes of a value, as JSON."""
MAX_ENTRIES = 10_000
"""Entries of one agent; with more, those written longest ago are removed."""
MAX_BYTES = 64 * 1024 * 1024
"""Bytes of all values of one agent; as above."""

Work = Callable[[sqlite3.Connection], T]


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


class Store:
    """The file in `folder`, or the memory if that is None. `run` may be called from any event loop."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._connection: sqlite3.Connection | None = None

    async def run(self, work: Work[T]) -> T:
        """The result of `work`, which is one transaction, in the thread. Raises: what `work` raises."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def job() -> None:
            result: T | None = None
            error: BaseException | None = None
            try:
                result = self._do(work)
            except BaseException as exc:  # raised where it is awaited
                error = exc
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(_settle, future, result, error)

        self._submit(job)
        return await future

    def begin(self, work: Work[T], on_result: Callable[[T], None] | None = None, *, writes: bool = True) -> None:
        """Do `work` in the thread later, and pass its result to `on_result` in the event loop. A failure is logged.
        What `writes` nothing does not create the file: it is left out if there is none."""
        loop = asyncio.get_running_loop()

        def job() -> None:
            if not writes and self._connection is None and not _exists(self._folder):
                return
            try:
                result = self._do(work)
            except Exception as exc:
                logger.warning("the state could not be read or written: %s", exc)
                return
            if on_result is not None:
                with suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(on_result, result)

        try:
            self._submit(job)
        except RuntimeError as exc:  # the system has no more threads now
            logger.warning("the state could not be read or written: %s", exc)

    def _submit(self, job: Callable[[], None]) -> None:
        if self._thread is None:
            thread = threading.Thread(target=self._work_off, name="store", daemon=True)
            thread.start()  # kept only then: the system may have no more threads now
            self._thread = thread
        self._jobs.put(job)

    async def open(self) -> None:
        """Open the file now, which is done with the first use otherwise: a folder that was configured is reported at
        once if it cannot be used."""
        await self.run(lambda sql: None)

    def close(self) -> None:
        """Write what is still to be written, for a limited time, and close the file."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(CLOSE_S)
            self._thread = None

    # -- in the thread -------------------------------------------------------------------------------------------------

    def _work_off(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _do(self, work: Work[T]) -> T:
        try:
            return _transaction(self._opened(), work)
        except sqlite3.DatabaseError as exc:
            if self._folder is None or not self._recover(exc):
                raise
        return _transaction(self._opened(), work)

    def _recover(self, exc: sqlite3.DatabaseError) -> bool:
        """After `exc`: begin a new file if this one is damaged, or go on in memory if it cannot be used. Returns False
        if it was the fault of the work."""
        damaged = type(exc) is sqlite3.DatabaseError  # "file is not a database", "disk image is malformed"
        if not damaged and (not isinstance(exc, sqlite3.OperationalError) or "syntax" in str(exc)):
            return False
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if damaged:
            self._set_aside(exc)
        else:
            self._use_memory(exc)
        return True

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            try:
                self._connection = _connect(self._folder)
            except (OSError, sqlite3.OperationalError, _Newer) as exc:
                self._use_memory(exc)
                self._connection = _connect(None)
        return self._connection

    def _use_memory(self, exc: BaseException) -> None:
        logger.warning("the state cannot be kept in %s, only in memory (setting state_dir): %s", self._folder, exc)
        self._folder = None

    def _set_aside(self, exc: BaseException) -> None:
        assert self._folder is not None
        file = self._folder / FILE
        aside = file.with_name(f"{FILE}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
        logger.warning("%s is damaged (%s), and now called %s; a new one is begun", file, exc, aside.name)
        try:
            file.rename(aside)
            for suffix in ("-wal", "-shm"):
                file.with_name(FILE + suffix).unlink(missing_ok=True)
        except OSError as failure:
            self._use_memory(failure)


class _Newer(Exception):
    """The file was written by a newer version of the proxy."""


def _connect(folder: Path | None) -> sqlite3.Connection:
    """Raises: OSError, sqlite3.Error, _Newer."""
    if folder is not None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(folder / FILE, os.O_RDWR | os.O_CREAT, 0o600))
    target = ":memory:" if folder is None else str(folder / FILE)
    connection = sqlite3.connect(target, timeout=CLOSE_S, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        _transaction(connection, _migrate)
    except BaseException:
        connection.close()
        raise
    return connection


def _migrate(connection: sqlite3.Connection) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > len(MIGRATIONS):
        raise _Newer(f"a newer version of the proxy has written {FILE}")
    for statements in MIGRATIONS[version:]:
        for statement in filter(str.strip, statements.split(";")):
            connection.execute(statement)
    if version < len(MIGRATIONS):
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")


def _transaction(connection: sqlite3.Connection, work: Work[T]) -> T:
    connection.execute("BEGIN IMMEDIATE")
    try:
        result = work(connection)
    except BaseException:
        with suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")
    return result


def _settle(future: asyncio.Future[Any], result: object, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def _exists(folder: Path | None) -> bool:
    return folder is not None and (folder / FILE).exists()


class KeyValues:
    """The keys and values of one agent: texts, and what JSON can express.

    Bounded: `MAX_KEY`, `MAX_VALUE`; beyond `MAX_ENTRIES` and `MAX_BYTES` the entries written longest ago are removed.
    """

    def __init__(self, store: Store, agent: str) -> None:
        self._store = store
        self._agent = agent

    async def get(self, key: str, default: Any = None) -> Any:
        """The value of `key`, or `default`."""
        return await self._store.run(lambda sql: _read(sql, self._agent, key, default))

    async def set(self, key: str, value: Any) -> None:
        """Set the value of `key`. Raises: ValueError, TypeError for what cannot be stored."""
        data = orjson.dumps(value)
        if not isinstance(key, str) or len(key) > MAX_KEY or len(data) > MAX_VALUE:
            raise ValueError(f"a key has at most {MAX_KEY} characters, and a value {MAX_VALUE // 1024} KiB of JSON")
        await self._store.run(lambda sql: _write(sql, self._agent, key, data))

    async def delete(self, key: str) -> None:
        """Remove `key`, if it is there."""
        query = "DELETE FROM kept WHERE agent = ? AND key = ?"
        await self._store.run(lambda sql: sql.execute(query, (self._agent, key)))

    async def keys(self, prefix: str = "") -> list[str]:
        """All keys that begin with `prefix`, sorted."""
        query = "SELECT key FROM kept WHERE agent = ? AND substr(key, 1, ?) = ? ORDER BY key"
        rows = await self._store.run(lambda sql: sql.execute(query, (self._agent, len(prefix), prefix)).fetchall())
        return [key for (key,) in rows]


class ProxyMemory:
    """What the proxy itself remembers, as its backends want it: nothing is awaited, and nothing raised."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def recall(self, key: str, on_value: Callable[[Any], None]) -> None:
        """Call `on_value` in the event loop with the value of `key`, if there is one."""

        def known(value: Any) -> None:
            if value is not None:
                on_value(value)

        self._store.begin(lambda sql: _read(sql, PROXY, key), known, writes=False)

    def remember(self, key: str, value: Any) -> None:
        """Set the value of `key`, some time after this call."""
        data = orjson.dumps(value)
        self._store.begin(lambda sql: _write(sql, PROXY, key, data))


def _read(sql: sqlite3.Connection, agent: str, key: str, default: Any = None) -> Any:
    query = "SELECT value FROM kept WHERE agent = ? AND key = ?"
    found = sql.execute(query, (agent, key)).fetchone()
    return default if found is None else orjson.loads(found[0])


def _write(sql: sqlite3.Connection, agent: str, key: str, data: bytes) -> None:
    sql.execute("INSERT OR REPLACE INTO kept VALUES (?, ?, ?, ?)", (agent, key, data, time.time()))
    while True:
        query = "SELECT count(*), total(length(value)) FROM kept WHERE agent = ?"
        entries, size = sql.execute(query, (agent,)).fetchone()
        if entries <= MAX_ENTRIES and size <= MAX_BYTES:
            return
        oldest = "SELECT key FROM kept WHERE agent = ? ORDER BY written_s LIMIT ?"
        excess = max(1, entries - MAX_ENTRIES)
        sql.execute(f"DELETE FROM kept WHERE agent = ? AND key IN ({oldest})", (agent, agent, excess))
