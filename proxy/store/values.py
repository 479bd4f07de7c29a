"""Keys and values: those of each agent, and those of the proxy itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import orjson

from llama_smart_proxy.proxy.store.schema import Sql
from llama_smart_proxy.proxy.store.store import Store

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
        rows = await self._store.run(lambda sql: sql.execute(query, (self._agent, len(prefix), prefix)))
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


def _read(sql: Sql, agent: str, key: str, default: Any = None) -> Any:
    found = sql.execute("SELECT value FROM kept WHERE agent = ? AND key = ?", (agent, key))
    return default if not found else orjson.loads(found[0][0])


def _write(sql: Sql, agent: str, key: str, data: bytes) -> None:
    sql.execute(
        "INSERT INTO kept (agent, key, value, written_s) VALUES (?, ?, ?, ?) ON CONFLICT (agent, key) "
        "DO UPDATE SET value = excluded.value, written_s = excluded.written_s",
        (agent, key, data, time.time()),
    )
    while True:
        query = "SELECT count(*), coalesce(sum(length(value)), 0) FROM kept WHERE agent = ?"
        ((entries, size),) = sql.execute(query, (agent,))
        if entries <= MAX_ENTRIES and size <= MAX_BYTES:
            return
        oldest = "SELECT key FROM kept WHERE agent = ? ORDER BY written_s LIMIT ?"
        excess = max(1, entries - MAX_ENTRIES)
        sql.execute(f"DELETE FROM kept WHERE agent = ? AND key IN ({oldest})", (agent, agent, excess))
