"""The fields of the configuration about the knowledge base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, SecretStr

from llama_smart_proxy.proxy.config.section import Section


def _index_url(secret: SecretStr) -> SecretStr:
    try:
        parts = urlsplit(secret.get_secret_value())
        usable = parts.scheme in ("postgresql", "postgres", "qdrant", "qdrants") and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ValueError("must be a URL such as postgresql://user@host/database or qdrant://host:6333")
    return secret


MINILM = "minilm"
"""The name of the embedding model that is there without configuration."""


def _private(entries: list[str]) -> list[str]:
    from llama_smart_proxy.proxy.fetching.guard import Private  # with what it imports, only for who requires it

    for entry in entries:
        try:
            Private([entry])
        except ValueError:
            raise ValueError(f"{entry!r} must be a host such as docs.lan, or a network such as 10.1.0.0/16") from None
    return entries


class WatchedFolder(Section):
    """A folder whose documents are in a collection."""

    path: Path = Field(description="The folder; all documents in and below it.")
    collection: str = Field(default="default", min_length=1, max_length=200, description="The name of the collection.")


class KnowledgeConfig(Section):
    """Documents that questions are answered from, by the agent rag and by /v1/vector_stores."""

    embedding_model: str | None = Field(
        default=None, description="Name of the model that makes vectors; by default the one called minilm."
    )
    reranker: str | None = Field(
        default=None, description="Name of a reranking model, which sorts what a search has found."
    )
    watch: list[WatchedFolder] = Field(default_factory=list, description="Folders that are kept in collections.")
    index: Annotated[SecretStr, AfterValidator(_index_url)] | None = Field(
        default=None,
        description="URL of a Postgres with pgvector (postgresql://) or a Qdrant server (qdrant://, qdrants:// with "
        "TLS) that is searched, in place of this process.",
    )
    allow_private: Annotated[list[str], AfterValidator(_private)] = Field(
        default_factory=list,
        description="Hosts and networks, such as docs.lan or 10.1.0.0/16, from which pages are added although their "
        "addresses are not public. Pages of web searches never come from there.",
    )
    max_file_mib: int = Field(default=100, ge=1, description="Largest document, in MiB.")

    @property
    def embedder(self) -> str:
        """The name of the model that makes vectors."""
        return self.embedding_model or MINILM
