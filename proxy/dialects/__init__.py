"""The wire APIs: the only room that knows one from another.

`base` is what each of them has to answer; `openai`, `anthropic` and `ollama` are the answers. To add one, see
`docs/extending.md`.
"""

from __future__ import annotations

from llama_smart_proxy.proxy.dialects import ollama, openai
from llama_smart_proxy.proxy.dialects.anthropic.dialect import ANTHROPIC
from llama_smart_proxy.proxy.dialects.base import Dialect, UpstreamCodec
from llama_smart_proxy.proxy.dialects.ollama.dialect import OLLAMA
from llama_smart_proxy.proxy.dialects.openai import NATIVE, OPENAI, RESPONSES

__all__ = ["ANTHROPIC", "NATIVE", "OLLAMA", "OPENAI", "RESPONSES", "UPSTREAM_CODECS", "Dialect", "dialect_of"]

UPSTREAM_CODECS: dict[str, UpstreamCodec] = {
    "llama.cpp": openai.LLAMA_CPP,
    "openai": openai.WIRE,
    "ollama": ollama.WIRE,
}
"""How a model's server is asked, by the `codec` of the model."""

_BY_PREFIX = (("/api/", OLLAMA),)


def dialect_of(path: str) -> Dialect:
    """The API that an endpoint belongs to which says nothing else."""
    return next((dialect for prefix, dialect in _BY_PREFIX if path.startswith(prefix)), OPENAI)
