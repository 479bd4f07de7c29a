"""Indexes: where pieces are found by vector and by text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec

from llama_smart_proxy.proxy.errors import ConfigError
from llama_smart_proxy.proxy.knowledge.base import Index


def make_index(url: str = "") -> Index:
    """The index at `url`, or the one in this process. Raises: ConfigError if a package is missing."""
    try:
        return _MAKERS[url.partition(":")[0]](url)
    except ImportError as exc:
        extra = "rag,postgres" if url else "rag"
        raise ConfigError([f"knowledge: {exc}; pip install 'llama-smart-proxy[{extra}]'"]) from None


def _local(_: str) -> Index:
    from llama_smart_proxy.proxy.knowledge.index.local import LocalIndex

    return LocalIndex()


def _postgres(url: str) -> Index:
    if find_spec("asyncpg") is None:  # with the first request it would be too late
        raise ImportError("the package asyncpg is missing")
    from llama_smart_proxy.proxy.knowledge.index.postgres import PostgresIndex

    return PostgresIndex(url)


def _qdrant(url: str) -> Index:
    from llama_smart_proxy.proxy.knowledge.index.qdrant import QdrantIndex

    return QdrantIndex(url)


_MAKERS: Mapping[str, Callable[[str], Index]] = {
    "": _local,
    "postgres": _postgres,
    "postgresql": _postgres,
    "qdrant": _qdrant,
    "qdrants": _qdrant,
}
