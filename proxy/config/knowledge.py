"""The fields of the configuration about the knowledge base."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr

from llama_smart_proxy.proxy.config import shapes
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


def _host(text: str) -> str:
    try:
        if "/" in text:
            ip_network(text)
        elif not text or (any(sign in text for sign in ":@?# ") and not _is_address(text)):
            raise ValueError
    except ValueError:
        raise ValueError("must be the name of a host, an address, or a network such as 10.1.0.0/16") from None
    return text


def _is_address(text: str) -> bool:
    return bool(ip_address(text))


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
    allow_private: Annotated[list[Annotated[str, AfterValidator(_host)]], BeforeValidator(shapes.comma_list)] = Field(
        default_factory=list,
        description="Names, addresses and networks of hosts that are not public and whose pages an administrator may "
        "add.",
    )
    max_file_mib: int = Field(default=100, ge=1, description="Largest document, in MiB.")
