"""Equality of model names."""

from __future__ import annotations


def key_of(name: str) -> str:
    """The canonical form of a name by Ollama's rules: case-insensitive; the tag `latest`, Ollama's own registry and its
    user `library` are optional."""
    key = name.lower().removeprefix("registry.ollama.ai/").removeprefix("library/")
    return key if ":" in key.rpartition("/")[2] else f"{key}:latest"
