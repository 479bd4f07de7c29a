"""What the proxy keeps over a restart: values of agents, usage, and recent requests; in SQLite, or in Postgres."""

from __future__ import annotations

from llama_smart_proxy.proxy.store.history import History
from llama_smart_proxy.proxy.store.postgres import Postgres
from llama_smart_proxy.proxy.store.schema import MIGRATIONS, Schema, Sql, Unavailable
from llama_smart_proxy.proxy.store.sqlite import FILE, SQLite, state_dir
from llama_smart_proxy.proxy.store.store import Store
from llama_smart_proxy.proxy.store.values import KeyValues, ProxyMemory

__all__ = [
    "FILE",
    "MIGRATIONS",
    "History",
    "KeyValues",
    "Postgres",
    "ProxyMemory",
    "SQLite",
    "Schema",
    "Sql",
    "Store",
    "Unavailable",
    "state_dir",
]
