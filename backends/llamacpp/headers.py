"""What the headers of GGUF files contain about models: read in a thread, and again only when a file has changed."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from llama_smart_proxy.backends.base import ModelInfo
from llama_smart_proxy.backends.llamacpp.arguments import flags_of
from llama_smart_proxy.backends.threads import run_in_thread
from llama_smart_proxy.backends.weights.files import locate
from llama_smart_proxy.backends.weights.gguf import Elided, GgufError, GgufInfo, read_info
from llama_smart_proxy.proxy.config import ModelConfig

logger = logging.getLogger(__name__)

THINKING = ("<think>", "[THINK]", "enable_thinking", "reasoning_content", "reasoning_effort", "thinking_budget")
"""Chat templates of models that think hold one of these; the mere word `reasoning` is in the prose of others, too."""
EMBEDDING_FLAGS = {"--embedding", "--embeddings", "--rerank", "--reranking"}
VISION_FLAGS = {"-mm", "--mmproj", "-mmu", "--mmproj-url"}


class Headers:
    """Describes models by their files."""

    def __init__(self) -> None:
        self._known: dict[Path, _Known] = {}
        self._reading = asyncio.Lock()  # one at a time, since a header may take 40 MiB while it is read

    async def info(self, name: str, model: ModelConfig) -> ModelInfo:
        """What is known of a model. No more than its configuration when its file is not here, or broken, which is
        logged once.

        Raises: `StartFailed` when the system has no more threads.
        """
        async with self._reading:
            return await run_in_thread(lambda: self._find(name, model))

    def _find(self, name: str, model: ModelConfig) -> ModelInfo:
        num_ctx = (model.ctx or 0) // (model.parallel or 1)  # llama-server's counts the tokens of all slots
        path = locate(name, model)
        if path is None:
            return ModelInfo(name, num_ctx=num_ctx)
        known = self._known[path] = _look(path, self._known.get(path))
        if known.header is None:
            return ModelInfo(name, num_ctx=num_ctx)
        return ModelInfo(
            name,
            digest=known.digest,
            modified=known.stamp[1] / 1e9,
            size_bytes=known.header.size_bytes,
            parameters=known.header.parameters,
            format="gguf",
            capabilities=capabilities(known.header, model.args),
            metadata=known.header.metadata,
            num_ctx=num_ctx,
        )


def capabilities(header: GgufInfo, args: Sequence[str]) -> tuple[str, ...]:
    """What the model can do when llama-server runs it with `args`, by Ollama's names.

    A model made for embeddings can do nothing else. Tools and thinking are read from the chat templates, as Ollama
    does: there is no better place.
    """
    flags = flags_of(args)
    if f"{header.metadata.get('general.architecture')}.pooling_type" in header.metadata or flags & EMBEDDING_FLAGS:
        return ("embedding",)
    # There may be several templates; llama.cpp has one of its own for tools.
    texts = (text for key, text in header.metadata.items() if key.startswith("tokenizer.chat_template"))
    templates = _given_template(args) or "".join(text for text in texts if isinstance(text, str))
    able = {
        "completion": True,
        "tools": "tools" in templates or "tool_call" in templates,
        "thinking": any(marker in templates for marker in THINKING),
        "insert": header.infill,
        "vision": bool(flags & VISION_FLAGS),
    }
    return tuple(capability for capability, has in able.items() if has)


def _given_template(args: Sequence[str]) -> str:
    """The chat template that `args` set in place of the model's; empty if there is none, or only the name of one of
    llama.cpp's own."""
    for flag, value in pairwise(args):
        if flag == "--chat-template-file":
            try:
                return Path(value).expanduser().read_text(errors="replace")
            except OSError:
                return ""
        if flag == "--chat-template" and "{" in value:
            return value
    return ""


class _Known(NamedTuple):
    """What was found in a file when its size, and its time of writing in nanoseconds, were those of `stamp`."""

    stamp: tuple[int, int]
    digest: str
    header: GgufInfo | None


def _look(path: Path, known: _Known | None) -> _Known:
    """What is in the file: what is `known` if it has not changed. What is too long to keep is an empty list."""
    stamp = (-1, -1)
    try:
        status = path.stat()
        stamp = (status.st_size, status.st_mtime_ns)
        if known is not None and known.stamp == stamp:
            return known
        header, digest = read_info(path), _digest(path, stamp)
    except (OSError, GgufError) as error:
        logger.warning("%s: the header cannot be read: %s", path, error)
        return _Known(stamp, "", None)
    kept = {key: [] if isinstance(value, Elided) else value for key, value in header.metadata.items()}
    return _Known(stamp, digest, replace(header, metadata=kept))


def _digest(path: Path, stamp: tuple[int, int]) -> str:
    """The SHA-256 of the file if it is in the cache of Hugging Face, where files have that for a name; else one of
    where it is and when it was written, since reading all of it may take minutes."""
    real = path.resolve()
    if real.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", real.name):
        return real.name
    text = "\0".join(map(str, (real, *stamp)))
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
