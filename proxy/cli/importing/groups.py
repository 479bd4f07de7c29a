"""How many models llama-swap runs at one time, by its groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llama_smart_proxy.proxy.cli.importing.values import mapping, texts


def processes(models: Sequence[str], groups: Mapping[str, Any]) -> int:
    """The most processes at one time.

    Within a group with `swap` one member runs, otherwise all. An `exclusive` group unloads the others, but for
    persistent ones. Models without a group are in one with both. Source: llama-swap's config.example.yaml.
    """
    staying = shared = alone = 0
    grouped: set[str] = set()
    for group in map(mapping, groups.values()):
        members = [member for member in texts(group.get("members")) if member in models]
        grouped.update(members)
        count = min(1, len(members)) if group.get("swap", True) else len(members)
        if group.get("persistent"):
            staying += count
        elif group.get("exclusive", True):
            alone = max(alone, count)
        else:
            shared += count
    if set(models) - grouped:
        alone = max(alone, 1)
    return max(1, staying + shared + alone)
