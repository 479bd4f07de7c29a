"""The wire APIs. All differences between them are in this package.

`base` defines the interface; `openai`, `responses`, `anthropic` and `ollama` implement it. To add one, see
`docs/extending.md`.
"""

from __future__ import annotations

from collections.abc import Container

from llama_smart_proxy.proxy.dialects import ollama, openai
from llama_smart_proxy.proxy.dialects.anthropic.dialect import ANTHROPIC
from llama_smart_proxy.proxy.dialects.anthropic.models import lists_models
from llama_smart_proxy.proxy.dialects.base import Dialect, UpstreamCodec
from llama_smart_proxy.proxy.dialects.ollama.dialect import OLLAMA
from llama_smart_proxy.proxy.dialects.openai import NATIVE, OPENAI
from llama_smart_proxy.proxy.dialects.responses.dialect import RESPONSES

__all__ = [
    "ANTHROPIC",
    "NATIVE",
    "OLLAMA",
    "OPENAI",
    "RESPONSES",
    "UPSTREAM_CODECS",
    "Dialect",
    "dialect_of",
    "dialect_of_client",
]

UPSTREAM_CODECS: dict[str, UpstreamCodec] = {
    "llama.cpp": openai.LLAMA_CPP,
    "openai": openai.WIRE,
    "ollama": ollama.WIRE,
}
"""The codec for a model's server, by the model's `codec`."""

_BY_PREFIX = (("/api/", OLLAMA),)


def dialect_of(path: str) -> Dialect:
    """The API of an endpoint that declares none, by its path."""
    return next((dialect for prefix, dialect in _BY_PREFIX if path.startswith(prefix)), OPENAI)


def dialect_of_client(declared: Dialect, path: str, headers: Container[str]) -> Dialect:
    """The API of a client at an endpoint, which at the lists of models is known by a header."""
    return ANTHROPIC if lists_models(path, headers) else declared
