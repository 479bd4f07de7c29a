"""The card of a model in a list of OpenAI's API: fields that chat UIs show to their users, and other clients ignore.

Source: Open WebUI 0.12.4, `backend/open_webui/routers/openai.py` (`get_merged_models`) and `utils/models.py`, which
keep `name` and `info` of an item unless its administrator has set them; its frontend, which takes each capability that
is not there for given; the items of OpenRouter, vLLM and llama-server.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llama_smart_proxy.proxy.chat import Json
from llama_smart_proxy.proxy.dialects.ollama import models as ollama

if TYPE_CHECKING:
    from llama_smart_proxy.backends.base import ModelInfo

NAME = "openai"
"""The key of this API's items in `ModelInfo.native`."""
MAX_NAME, MAX_DESCRIPTION = 100, 2000
HELP = {"content": "/help", "title": ["/help", "lists the commands"]}
"""The suggestion to ask for the commands of the proxy's agents."""
TEXTLESS = ("bert", "rerank")
"""Parts of the names of families whose models generate no text."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A model as it is to be shown. `place`: where it runs; `agents`: the names of those that take part in its chats;
    `helps`: whether `/help` is answered."""

    id: str
    info: ModelInfo
    place: str = ""
    agents: Sequence[str] = ()
    helps: bool = False


class Cards:
    """The cards of the models of one list after the other; what has not changed is not composed again."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[Shown, str, Json]] = {}

    def of(self, models: Sequence[Shown]) -> list[Json]:
        """For each of these models, in a list of them, the fields `name` and `info` of its item. The name is the
        configured one, else that in its file or of its server; after the id if two are called the same, as pickers cut
        the end off."""
        last, self._last = self._last, {}
        for model in models:
            known = last.get(model.id)
            self._last[model.id] = known if known and known[0] == model else (model, _title(model), card(model))
        found = [self._last[model.id] for model in models]
        uses = Counter(title.casefold() for _, title, _ in found)
        return [
            {
                "name": title if title == model.id or uses[title.casefold()] == 1 else f"{model.id} ({title})",
                "info": info,
            }
            for model, title, info in found
        ]


def card(model: Shown) -> Json:
    """The field `info` of its item."""
    info, able = model.info, _abilities(model.info)
    hidden = _is_textless(info, able) if info.hidden is None else info.hidden
    meta: Json = {
        "description": info.description or _text(_item(info), "description", MAX_DESCRIPTION) or _facts(model),
        "capabilities": {"usage": True},
    }
    if able:
        meta["capabilities"]["vision"] = "vision" in able
    suggestions: list[Json] = [{"content": text} for text in info.suggestions]
    if model.helps and not hidden:
        suggestions.append(HELP)
    if suggestions:
        meta["suggestion_prompts"] = suggestions
    if hidden:
        meta["hidden"] = True
    return {"meta": meta}


def _title(model: Shown) -> str:
    found = model.info.title or model.info.metadata.get("general.name")
    return _clean(found, MAX_NAME) or _text(_item(model.info), "name", MAX_NAME) or model.id


def _facts(model: Shown) -> str:
    """Size, quantisation, context, where it runs and its agents, as far as they are known."""
    info, details = model.info, _details(model.info)
    quantisation = _text(details, "quantization_level", MAX_NAME)
    size_bytes = info.size_bytes or _count(_listed(info).get("size"))
    context = info.num_ctx or _count(details.get("context_length")) or _context(_item(info))
    facts = [
        _text(details, "parameter_size", MAX_NAME),
        "" if quantisation == "unknown" else quantisation,
        _size(size_bytes),
        f"context {context:,}" if context else "",
        f"on {model.place}" if model.place else "",
        f"agents: {', '.join(model.agents)}" if model.agents else "",
    ]
    return " \N{MIDDLE DOT} ".join(filter(None, facts))


def _size(count: int) -> str:
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            return f"{count / unit:.{1 if count < 10 * unit else 0}f} {name}"
    return ""


def _context(item: Json) -> int:
    """Most tokens of a request, by the item of vLLM, OpenRouter, or llama-server."""
    meta = item.get("meta")
    counts = [item.get("max_model_len"), item.get("context_length")]
    counts += [meta.get("n_ctx"), meta.get("n_ctx_train")] if isinstance(meta, dict) else []
    return next(filter(None, map(_count, counts)), 0)


def _abilities(info: ModelInfo) -> Sequence[str]:
    """By Ollama's names; empty if unknown."""
    if info.capabilities:
        return info.capabilities
    listed = _listed(info).get("capabilities")
    if isinstance(listed, list):
        return [name for name in listed if isinstance(name, str)]
    architecture = _item(info).get("architecture")
    kinds = architecture.get("input_modalities") if isinstance(architecture, dict) else None
    return ["completion", *(["vision"] if "image" in kinds else [])] if isinstance(kinds, list) else []


def _is_textless(info: ModelInfo, able: Sequence[str]) -> bool:
    if able:
        return "completion" not in able
    families = _details(info).get("families")
    found: Iterable[Any] = families if isinstance(families, list) else ()
    return any(isinstance(family, str) and any(part in family for part in TEXTLESS) for family in found)


def _details(info: ModelInfo) -> Json:
    listed = _listed(info)
    if not listed:
        return ollama.details(info)
    details = listed.get("details")
    return details if isinstance(details, dict) else {}


def _listed(info: ModelInfo) -> Json:
    """Its item in Ollama's API, as its server has it; empty if that has none."""
    return info.native.get(ollama.NAME, {})


def _item(info: ModelInfo) -> Json:
    """Its item in OpenAI's API, as its server has it; empty if that has none."""
    return info.native.get(NAME, {})


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _text(item: Json, key: str, limit: int) -> str:
    return _clean(item.get(key), limit)


def _clean(value: object, limit: int) -> str:
    """Text of a file or another server as one line without characters that cannot be seen; empty for anything else."""
    if not isinstance(value, str):
        return ""
    words = " ".join(value[: 2 * limit].split())
    seen = words if words.isprintable() else "".join(c for c in words if unicodedata.category(c)[0] != "C")
    return seen if len(seen) <= limit else f"{seen[: limit - 1]}\N{HORIZONTAL ELLIPSIS}"
