"""A model in the Ollama API: the items of `/api/tags` and `/api/ps`, and the answer of `/api/show`.

The item of an Ollama server is passed on unchanged. A model with little known about it (a remote server's, one not
downloaded, a broken file) has the same keys with empty values, because clients fail on missing keys and on null.

Source: Ollama `server/routes.go`, `server/images.go`, `format/format.go`; Open WebUI, Continue and VS Code's Copilot as
clients.
"""

from __future__ import annotations

import hashlib
import math
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from llama_smart_proxy.proxy.chat import Json

if TYPE_CHECKING:
    from llama_smart_proxy.backends.base import ModelInfo, Residence

NAME = "ollama"
"""The key of this API's items in `ModelInfo.native`."""
QUANTIZATIONS = (
    "F32 F16 Q4_0 Q4_1 Q4_1_F16 Q4_2 Q4_3 Q8_0 Q5_0 Q5_1 Q2_K Q3_K_S Q3_K_M Q3_K_L Q4_K_S Q4_K_M Q5_K_S Q5_K_M Q6_K "
    "IQ2_XXS IQ2_XS Q2_K_S IQ3_XS IQ3_XXS IQ1_S IQ4_NL IQ3_S IQ3_M IQ2_S IQ2_M IQ4_XS IQ1_M BF16 Q4_0_4_4 Q4_0_4_8 "
    "Q4_0_8_8 TQ1_0 TQ2_0 MXFP4 NVFP4 Q1_0 Q2_0"
)
"""By `general.file_type`, which counts from 0. Source: llama.cpp `include/llama.h`, build b11434."""
GUESSED = 1024
"""Flag of a file type that llama.cpp only guessed (`LLAMA_FTYPE_GUESSED`)."""
DEFAULT_CAPABILITIES = ("completion",)
"""Of a model whose capabilities are not known."""
INFILL_NOTE = "{# /api/generate takes a suffix (.Suffix): this model can fill in the middle. #}"
"""Prefix of the template of a model that can infill: clients search it for `.Suffix`, which only Ollama's own template
language has. It is a comment in Jinja, so the template renders to the same text."""
NEVER = datetime(2318, 1, 1, tzinfo=UTC)
"""`expires_at` of a model that never expires: close to Ollama's value, and clients can parse it."""
INVALID_NAME = "invalid model name"
"""Error message for a name that is not valid."""
COPILOT = "GitHubCopilotChat/"
SHOWN_ELEMENTS = 5
"""Longer arrays of the metadata are returned empty, as Ollama does, unless the request is `verbose`."""


def full_name(name: str) -> str:
    """The name with the registry, user and tag that Ollama adds."""
    path = name if ":" in name.rpartition("/")[2] else f"{name}:latest"
    return ("registry.ollama.ai/library/", "registry.ollama.ai/", "")[min(path.count("/"), 2)] + path


def tags_item(info: ModelInfo) -> Json:
    """The item of `/api/tags` for a model."""
    if NAME in info.native:
        return info.native[NAME]
    return {
        "name": info.name,
        "model": info.name,
        "modified_at": _rfc3339(info.modified),
        "size": info.size_bytes,
        "digest": _digest(info),
        "details": details(info),
        "capabilities": list(info.capabilities or DEFAULT_CAPABILITIES),
    }


def ps_item(info: ModelInfo, residence: Residence) -> Json:
    """The item of `/api/ps` for a loaded model."""
    if NAME in residence.native:
        return residence.native[NAME]
    return {
        "name": info.name,
        "model": info.name,
        "size": info.size_bytes,
        "digest": _digest(info),
        "details": details(info),
        "expires_at": _rfc3339(residence.expires_at),
        "size_vram": residence.size_vram,
        "context_length": residence.context_length,
    }


def show(info: ModelInfo, *, verbose: bool = False, requested_name: str = "", user_agent: str = "") -> Json:
    """The answer of `/api/show`.

    Each line of `parameters` is a name, spaces and a value without spaces, because Continue parses it. Copilot shows
    `general.basename` to its user, so that it is set to `requested_name` there, as Ollama does.
    """
    template, num_ctx = _text(info, "tokenizer.chat_template"), info.num_ctx
    model_info = _model_info(info, verbose)
    if user_agent.startswith(COPILOT):
        model_info["general.basename"] = requested_name or info.name
    return {
        "license": _text(info, "general.license"),
        "modelfile": f"# Modelfile\nFROM {info.name}\n" + (f"PARAMETER num_ctx {num_ctx}\n" if num_ctx else ""),
        "parameters": f"{'num_ctx':<30} {num_ctx}" if num_ctx else "",
        "template": INFILL_NOTE + template if "insert" in info.capabilities else template,
        "system": "",
        "details": details(info),
        "messages": [],
        "model_info": model_info,
        "capabilities": list(info.capabilities or DEFAULT_CAPABILITIES),
        "modified_at": _rfc3339(info.modified),
    }


def details(info: ModelInfo) -> Json:
    """The `details` of a model, with its context and embedding length if they are known."""
    family = _text(info, "general.architecture")
    known = {
        "parent_model": "",
        "format": info.format,
        "family": family,
        "families": [family] if family else [],
        "parameter_size": _human(info.parameters) if info.parameters else "",
        "quantization_level": _quantization(info),
    }
    lengths = {key: info.metadata.get(f"{family}.{key}") for key in ("context_length", "embedding_length")}
    return known | {key: length for key, length in lengths.items() if isinstance(length, int)}


def _quantization(info: ModelInfo) -> str:
    names, file_type = QUANTIZATIONS.split(), info.metadata.get("general.file_type")
    if isinstance(file_type, int) and 0 <= file_type & ~GUESSED < len(names):
        return names[file_type & ~GUESSED]
    return "unknown" if info.format else ""


def _human(count: int) -> str:
    """A count as Ollama writes it: `7.6B`, `134.52M`, `70B`, `33K`."""
    for unit, name, decimals in ((10**9, "B", 1), (10**6, "M", 2), (10**3, "K", 0)):
        if count >= unit:
            return f"{count / unit:.{decimals if count % unit else 0}f}{name}"
    return str(count)


def _model_info(info: ModelInfo, verbose: bool) -> Json:
    """The metadata that JSON can represent, with the keys that clients require."""
    shown: Json = {
        "general.architecture": "",
        "general.basename": info.name,
        "general.parameter_count": info.parameters,
    }
    for key, value in info.metadata.items():
        if isinstance(value, list):
            shown[key] = value if verbose or len(value) <= SHOWN_ELEMENTS else []
        elif not key.startswith("tokenizer.chat_template"):
            shown[key] = value
    return {key: value for key, value in shown.items() if _is_json(value)}


def _is_json(value: Any) -> bool:
    """Whether `value` contains no NaN and no infinity."""
    numbers = value if isinstance(value, list) else [value]
    return all(math.isfinite(number) for number in numbers if isinstance(number, float))


def _text(info: ModelInfo, key: str) -> str:
    value = info.metadata.get(key)
    return value if isinstance(value, str) else ""


def _digest(info: ModelInfo) -> str:
    """The digest of the model, or else of its name, because clients identify models by it."""
    return info.digest or hashlib.sha256(info.name.encode(errors="surrogateescape")).hexdigest()


def _rfc3339(seconds: float) -> str:
    """`seconds` since 1970 with an offset instead of `Z`, which Python before 3.11 cannot parse."""
    when = datetime.fromtimestamp(max(0.0, seconds), UTC) if seconds < NEVER.timestamp() else NEVER
    return when.isoformat(timespec="microseconds")
