"""What clients of the Ollama API are told of a model that Ollama does not hold: in `/api/tags`, `/api/ps`, `/api/show`.

All of it comes from the header of the model's GGUF file. Of a model without one here (a remote server's, one not yet
downloaded, a broken file) the same keys are told, with empty values: clients trip over missing ones and over null.

Source: Ollama `server/routes.go`, `server/images.go`, `format/format.go`; Open WebUI, Continue and VS Code's Copilot as
clients.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from llama_smart_proxy.backends.llamacpp.spawned import SpawnedModel
from llama_smart_proxy.backends.threads import in_thread
from llama_smart_proxy.backends.weights.files import locate
from llama_smart_proxy.backends.weights.gguf import Elided, GgufError, GgufInfo, read_info
from llama_smart_proxy.proxy.config import ModelConfig

logger = logging.getLogger(__name__)

QUANTIZATIONS = (
    "F32 F16 Q4_0 Q4_1 Q4_1_F16 Q4_2 Q4_3 Q8_0 Q5_0 Q5_1 Q2_K Q3_K_S Q3_K_M Q3_K_L Q4_K_S Q4_K_M Q5_K_S Q5_K_M Q6_K "
    "IQ2_XXS IQ2_XS Q2_K_S IQ3_XS IQ3_XXS IQ1_S IQ4_NL IQ3_S IQ3_M IQ2_S IQ2_M IQ4_XS IQ1_M BF16 Q4_0_4_4 Q4_0_4_8 "
    "Q4_0_8_8 TQ1_0 TQ2_0 MXFP4 NVFP4 Q1_0 Q2_0"
)
"""By `general.file_type`, which counts from 0. Source: llama.cpp `include/llama.h`, build b11434."""
GUESSED = 1024
"""Added to a file type that llama.cpp only guessed."""
THINKING = ("<think>", "[THINK]", "enable_thinking", "reasoning_content", "reasoning_effort", "thinking_budget")
"""Chat templates of models that think hold one of these; the mere word `reasoning` is in the prose of others, too."""
EMBEDDING_FLAGS = {"--embedding", "--embeddings", "--rerank", "--reranking"}
VISION_FLAGS = {"-mm", "--mmproj", "-mmu", "--mmproj-url"}
INFILL_NOTE = "{# /api/generate takes a suffix (.Suffix): this model can fill in the middle. #}"
"""Put before the template of such a model, because clients look for `.Suffix` there, which only Ollama's own template
language has. This is a comment in the language of these templates: what they render to does not change."""
NEVER = datetime(2318, 1, 1, tzinfo=UTC)
"""When a model expires that is to stay for ever: about what Ollama says, and no client chokes on it."""
COPILOT = "GitHubCopilotChat/"
SHOWN_ELEMENTS = 5
"""Longer arrays of the metadata are shown empty, as Ollama does, unless the client asked for all."""


@dataclass(frozen=True, slots=True)
class Card:
    """A model as its file tells of it. `digest` has 64 hexadecimal digits; `modified` counts seconds since 1970."""

    digest: str
    modified: float
    info: GgufInfo
    capabilities: tuple[str, ...]


def blank(name: str) -> Card:
    """The card of a model of which only the name is known. It passes for one that chats: nearly all do."""
    info = GgufInfo(version=0, metadata={}, tensors=0, parameters=0, size_bytes=0, infill=False)
    return Card(_sha256(name), 0.0, info, ("completion",))


# -- what a file tells -------------------------------------------------------------------------------------------------


def details(info: GgufInfo) -> dict[str, Any]:
    """The `details` of a model, with its context and embedding length if the file tells them."""
    family = _text(info, "general.architecture")
    known = {
        "parent_model": "",
        "format": "gguf" if info.version else "",
        "family": family,
        "families": [family] if family else [],
        "parameter_size": _human(info.parameters) if info.parameters else "",
        "quantization_level": _quantization(info),
    }
    lengths = {key: info.metadata.get(f"{family}.{key}") for key in ("context_length", "embedding_length")}
    return known | {key: length for key, length in lengths.items() if isinstance(length, int)}


def capabilities(info: GgufInfo, args: Sequence[str]) -> tuple[str, ...]:
    """What the model can do when llama-server runs it with `args`, in Ollama's words.

    A model made for embeddings can do nothing else. Tools and thinking are read from the chat templates, as Ollama
    does: there is no better place.
    """
    flags = {flag.replace("_", "-") if flag.startswith("--") else flag for flag in args}
    if f"{_text(info, 'general.architecture')}.pooling_type" in info.metadata or flags & EMBEDDING_FLAGS:
        return ("embedding",)
    # There may be several templates; llama.cpp has one of its own for tools.
    templates = "".join(_text(info, key) for key in info.metadata if key.startswith("tokenizer.chat_template"))
    able = {
        "completion": True,
        "tools": "tools" in templates or "tool_call" in templates,
        "thinking": any(marker in templates for marker in THINKING),
        "insert": info.infill,
        "vision": bool(flags & VISION_FLAGS),
    }
    return tuple(capability for capability, has in able.items() if has)


def _quantization(info: GgufInfo) -> str:
    names, file_type = QUANTIZATIONS.split(), info.metadata.get("general.file_type")
    if isinstance(file_type, int) and 0 <= file_type & ~GUESSED < len(names):
        return names[file_type & ~GUESSED]
    return "unknown" if info.version else ""


def _human(count: int) -> str:
    """A count as Ollama writes it: `7.6B`, `134.52M`, `70B`, `33K`."""
    for unit, name, decimals in ((10**9, "B", 1), (10**6, "M", 2), (10**3, "K", 0)):
        if count >= unit:
            return f"{count / unit:.{decimals if count % unit else 0}f}{name}"
    return str(count)


def _text(info: GgufInfo, key: str) -> str:
    value = info.metadata.get(key)
    return value if isinstance(value, str) else ""


# -- what clients get --------------------------------------------------------------------------------------------------


def tags_item(name: str, card: Card | None) -> dict[str, Any]:
    """The item of `/api/tags` for the model called `name`; without a `card`, of one of which no more is known."""
    card = card or blank(name)
    return {
        "name": name,
        "model": name,
        "modified_at": _rfc3339(card.modified),
        "size": card.info.size_bytes,
        "digest": card.digest,
        "details": details(card.info),
        "capabilities": list(card.capabilities),
    }


def ps_item(name: str, card: Card | None, *, expires_at: float, size_vram: int, context_length: int) -> dict[str, Any]:
    """The item of `/api/ps` for a loaded model. `expires_at` counts seconds since 1970; infinity is never."""
    card = card or blank(name)
    return {
        "name": name,
        "model": name,
        "size": card.info.size_bytes,
        "digest": card.digest,
        "details": details(card.info),
        "expires_at": _rfc3339(expires_at),
        "size_vram": size_vram,
        "context_length": context_length,
    }


def show(
    name: str,
    card: Card | None,
    *,
    num_ctx: int = 0,
    verbose: bool = False,
    requested_name: str = "",
    user_agent: str = "",
) -> dict[str, Any]:
    """The answer of `/api/show`. `num_ctx` is how many tokens a request may have, 0 if nobody set that.

    Each line of `parameters` is a name, spaces and a value without spaces: Continue takes them apart. Copilot shows
    `general.basename` to its user, and so gets there the name that it asked for, `requested_name`, as from Ollama.
    """
    card = card or blank(name)
    template = _text(card.info, "tokenizer.chat_template")
    model_info = _model_info(name, card.info, verbose)
    if user_agent.startswith(COPILOT):
        model_info["general.basename"] = requested_name or name
    return {
        "license": _text(card.info, "general.license"),
        "modelfile": f"# Modelfile\nFROM {name}\n" + (f"PARAMETER num_ctx {num_ctx}\n" if num_ctx else ""),
        "parameters": f"{'num_ctx':<30} {num_ctx}" if num_ctx else "",
        "template": INFILL_NOTE + template if "insert" in card.capabilities else template,
        "system": "",
        "details": details(card.info),
        "messages": [],
        "model_info": model_info,
        "capabilities": list(card.capabilities),
        "modified_at": _rfc3339(card.modified),
    }


def _model_info(name: str, info: GgufInfo, verbose: bool) -> dict[str, Any]:
    """The metadata as JSON can hold it, with the keys that clients ask for in any case."""
    shown: dict[str, Any] = {
        "general.architecture": "",
        "general.basename": name,
        "general.parameter_count": info.parameters,
    }
    for key, value in info.metadata.items():
        if isinstance(value, list):
            shown[key] = value if verbose or len(value) <= SHOWN_ELEMENTS else []
        elif isinstance(value, Elided):
            shown[key] = []
        elif not key.startswith("tokenizer.chat_template"):
            shown[key] = value
    return {key: value for key, value in shown.items() if _is_json(value)}


def _is_json(value: Any) -> bool:
    """Whether there is no NaN and no infinity in it."""
    numbers = value if isinstance(value, list) else [value]
    return all(math.isfinite(number) for number in numbers if isinstance(number, float))


def _rfc3339(seconds: float) -> str:
    """A time with an offset in place of `Z`, which `datetime.fromisoformat` of Python before 3.11 does not take."""
    when = datetime.fromtimestamp(max(0.0, seconds), UTC) if seconds < NEVER.timestamp() else NEVER
    return when.isoformat(timespec="microseconds")


# -- reading -----------------------------------------------------------------------------------------------------------


class Cards:
    """Describes the models that the proxy runs itself. A file is read again only when it has changed."""

    def __init__(self) -> None:
        self._known: dict[Path, _Known] = {}
        self._reading = asyncio.Lock()  # one at a time, since a header may take 40 MiB while it is read

    async def of(self, name: str, model: ModelConfig) -> Card | None:
        """The card of a model; None when its file is not here, or broken, which is logged once.

        Raises: `StartFailed` when the system has no more threads.
        """
        async with self._reading:
            return await in_thread(lambda: self._find(name, model))

    async def tags_item(self, spawned: SpawnedModel) -> dict[str, Any]:
        """The item of `/api/tags` for it."""
        return tags_item(spawned.name, await self.of(spawned.name, spawned.model))

    async def show(
        self, spawned: SpawnedModel, requested_name: str, *, verbose: bool = False, user_agent: str = ""
    ) -> dict[str, Any]:
        """The answer of `/api/show` for it, asked for by `requested_name`."""
        return show(
            spawned.name,
            await self.of(spawned.name, spawned.model),
            num_ctx=_num_ctx(spawned.model),
            verbose=verbose,
            requested_name=requested_name,
            user_agent=user_agent,
        )

    async def ps_item(self, spawned: SpawnedModel) -> dict[str, Any] | None:
        """The item of `/api/ps` for it; None when it is not loaded.

        `size_vram` is 0: llama-server does not tell how much of the model it put on a GPU.
        """
        expires_at = spawned.pool.expires_at(spawned.name)
        if expires_at is None:
            return None
        card = await self.of(spawned.name, spawned.model)
        trained = details(card.info).get("context_length", 0) if card is not None else 0
        context = _num_ctx(spawned.model) or trained // (spawned.model.parallel or 1)
        return ps_item(spawned.name, card, expires_at=expires_at, size_vram=0, context_length=context)

    def _find(self, name: str, model: ModelConfig) -> Card | None:
        path = locate(name, model)
        if path is None:
            return None
        known = self._known[path] = _look(path, self._known.get(path))
        if known.info is None:
            return None
        return Card(known.digest, known.stamp[1] / 1e9, known.info, capabilities(known.info, model.args))


def _num_ctx(model: ModelConfig) -> int:
    """How many tokens one request may have by the model's configuration, which counts those of all slots; 0 if that
    does not say."""
    return (model.ctx or 0) // (model.parallel or 1)


class _Known(NamedTuple):
    """What was found in a file when its size, and its time of writing in nanoseconds, were those of `stamp`."""

    stamp: tuple[int, int]
    digest: str
    info: GgufInfo | None


def _look(path: Path, known: _Known | None) -> _Known:
    """What is in the file: what is `known` if it has not changed."""
    stamp = (-1, -1)
    try:
        status = path.stat()
        stamp = (status.st_size, status.st_mtime_ns)
        if known is not None and known.stamp == stamp:
            return known
        return _Known(stamp, _digest(path, stamp), read_info(path))
    except (OSError, GgufError) as error:
        logger.warning("%s tells nothing of its model: %s", path, error)
        return _Known(stamp, "", None)


def _digest(path: Path, stamp: tuple[int, int]) -> str:
    """The SHA-256 of the file if it is in the cache of Hugging Face, where files have that for a name; else one of
    where it is and when it was written, since reading all of it may take minutes."""
    real = path.resolve()
    if real.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", real.name):
        return real.name
    return _sha256("\0".join(map(str, (real, *stamp))))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
