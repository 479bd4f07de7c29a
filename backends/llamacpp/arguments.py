"""What llama-server's arguments mean to the proxy: the flags that users give, and those that a model's file requires.

Pure functions. Source: llama.cpp `common/arg.cpp` and `tools/server/server-context.cpp`, build b11434.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

from llama_smart_proxy.proxy.config import spelled

CTX = ("-c", "--ctx-size")
PARALLEL = ("-np", "--parallel")
POOLING = ("none", "mean", "cls", "last", "rank")
"""The values of `--pooling`, in the order of their numbers in GGUF files."""
VISION_FLAGS = {"-mm", "--mmproj", "-mmu", "--mmproj-url"}
NO_VISION_FLAGS = {"--no-mmproj", "--no-mmproj-auto"}
LARGEST_BATCH = 8192
"""Largest batch for a model without a configured context: the memory that a batch takes grows with its square."""


def flags_of(args: Sequence[str]) -> set[str]:
    """The flags among `args`; after `--`, llama-server takes `_` for `-`."""
    return {spelled(arg) for arg in args if arg.startswith("-")}


def takes_projector(args: Sequence[str], env: Mapping[str, str | None]) -> bool:
    """Whether the projector beside a model is for the proxy to pass; not if `args` or `env` decide about it."""
    decided = flags_of(args) & (VISION_FLAGS | NO_VISION_FLAGS)
    return not decided and not any(name.startswith(("LLAMA_ARG_MMPROJ", "LLAMA_ARG_NO_MMPROJ")) for name in env)


def value_of(args: Sequence[str], *spellings: str) -> str | None:
    """The value of the last of these flags; None if there is none."""
    return next(reversed(list(_values(args, *spellings))), None)


def context_of_slot(ctx: int | None, parallel: int | None, args: Sequence[str]) -> int:
    """The configured number of tokens of one request, 0 if there is none. llama-server's `-c` has those of all slots.
    The arguments are added last, so they count."""
    tokens, slots = ctx or 0, parallel or 1
    with suppress(ValueError):
        tokens = int(value_of(args, *CTX) or "")
    with suppress(ValueError):
        slots = int(value_of(args, *PARALLEL) or "")
    return max(0, tokens) // max(1, slots)


def tags_of(args: Sequence[str]) -> list[str]:
    """The labels in `--tags a,b`, sorted."""
    texts = ",".join(_values(args, "--tags")).split(",")
    return sorted({text.strip() for text in texts} - {""})


def required_by(metadata: Mapping[str, Any], ctx: int | None, args: Sequence[str]) -> list[str]:
    """The flags that a model made for embeddings or reranking requires, from the header of its file; none for others.

    `ctx` is the configured context, None if there is none; `args` are the user's flags, which llama-server gets after
    these. Where the pooling requires a whole input in one batch, the batch is the context. Other inputs are split.
    """
    arch = metadata.get("general.architecture")
    kind = metadata.get(f"{arch}.pooling_type")
    if not isinstance(kind, int):
        return []
    stored = POOLING[kind] if 0 <= kind < len(POOLING) else "none"
    rerank = not {"--rerank", "--reranking"}.isdisjoint(flags_of(args))
    pooling = "rank" if rerank else value_of(args, "--pooling") or stored
    flags = ["--reranking"] if pooling == "rank" else ["--embedding"]
    causal = metadata.get(f"{arch}.attention.causal") is not False
    if pooling == "last" or (pooling == "rank" and causal):
        return flags
    batch = _context(metadata.get(f"{arch}.context_length"), ctx, args)
    return [*flags, "--batch-size", str(batch), "--ubatch-size", str(batch)] if batch else flags


def _context(trained: object, ctx: int | None, args: Sequence[str]) -> int:
    """Most tokens of one input; 0 if that is unknown."""
    with suppress(ValueError):
        ctx = int(value_of(args, *CTX) or "")
    most = trained if isinstance(trained, int) else 0
    if ctx is None:
        return min(most, LARGEST_BATCH)
    return min(ctx, most) if ctx > 0 and most > 0 else ctx or most


def _values(args: Sequence[str], *spellings: str) -> Iterator[str]:
    for flag, value in pairwise(args):
        if spelled(flag) in spellings:
            yield value
