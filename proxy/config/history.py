"""The fields of the configuration about what is kept of requests, and where."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, SecretStr

from llama_smart_proxy.proxy.config.section import Section


def _postgres_url(secret: SecretStr) -> SecretStr:
    try:
        parts = urlsplit(secret.get_secret_value())
        usable = parts.scheme in ("postgresql", "postgres") and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ValueError("must be a URL such as postgresql://user@host/database")
    return secret


PostgresUrl = Annotated[SecretStr, AfterValidator(_postgres_url)]
"""Secret, as it may contain a password."""


class HistoryConfig(Section):
    """What is kept about requests: names, times and counts."""

    requests: int = Field(default=10_000, ge=0, le=1_000_000, description="Most recent requests; 0 keeps none of them.")
    days: int = Field(default=90, ge=1, le=36_500, description="Days for which usage is kept.")
