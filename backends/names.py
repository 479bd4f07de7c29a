"""Which names mean one model."""

from __future__ import annotations


def key_of(name: str) -> str:
    """What two names of one model have in common, as Ollama sees it: the tag may be left out if it is `latest`, so may
    the registry and the user if they are Ollama's own, and case does not matter."""
    key = name.lower().removeprefix("registry.ollama.ai/").removeprefix("library/")
    return key if ":" in key.rpartition("/")[2] else f"{key}:latest"
