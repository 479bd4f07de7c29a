"""Indexes: where pieces are found by vector and by text."""

from __future__ import annotations

from llama_smart_proxy.proxy.errors import ConfigError
from llama_smart_proxy.proxy.knowledge.base import Index


def make_index() -> Index:
    """The index in this process. Raises: ConfigError if numpy is missing."""
    try:
        from llama_smart_proxy.proxy.knowledge.index.local import LocalIndex
    except ImportError as exc:
        raise ConfigError([f"knowledge: {exc}; pip install 'llama-smart-proxy[rag]'"]) from None
    return LocalIndex()
