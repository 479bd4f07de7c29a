"""Interprets the names of GGUF files: the parts of a split model, the quantisation, and selection by variant."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from llama_smart_proxy.proxy.errors import ModelNotFound

DEFAULT_VARIANT = "Q4_K_M"
SPLIT = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf")
_QUANTISATION = re.compile(
    r"(?:^|[-._/])((?:UD-)?(?:I?Q\d(?:_[A-Z0-9]+)*|TQ\d_\d|MXFP4(?:_[A-Z]+)?|BF16|FP?16|FP?32))(?=[-.])", re.IGNORECASE
)
_MAX_LISTED = 20


def is_projector(file: str) -> bool:
    """Whether it is a vision or audio projector, which accompanies a model and is not one itself."""
    return "mmproj" in file.rpartition("/")[2].lower()


def is_quantisation(name: str) -> bool:
    """Whether it is the name of a quantisation and nothing else, as folders in repositories of large models have."""
    return quantisation(f"{name}.gguf") == name.upper()


def whole_name(file: str) -> str:
    """The name of a split model without the part number; any other name unchanged."""
    split = SPLIT.fullmatch(file)
    return f"{split['stem']}.gguf" if split else file


def all_parts(file: str) -> list[str]:
    """All parts of a split model, in order, from any of them; a file that is not split is its only part."""
    split = SPLIT.fullmatch(file)
    if split is None:
        return [file]
    stem, parts = split["stem"], split["parts"]
    return [f"{stem}-{number:05}-of-{parts}.gguf" for number in range(1, int(parts) + 1)]


def quantisation(file: str) -> str | None:
    """The quantisation in a file's name, in upper case; the last one of several; None without any."""
    found = _QUANTISATION.findall(whole_name(file))
    return str(found[-1]).upper() if found else None


def models_among(files: Iterable[str]) -> dict[str, list[str]]:
    """The models among the files of a repository: the files of each, by whole name. Projectors are excluded."""
    models: dict[str, list[str]] = {}
    for file in sorted(files):
        if file.lower().endswith(".gguf") and not is_projector(file):
            models.setdefault(whole_name(file), []).append(file)
    return models


def fitting(models: Collection[str], variant: str) -> list[str]:
    """The whole names that match `variant`: as a name, with or without `.gguf`; else as a quantisation; else as a glob
    or a part of the name. Only names are case-sensitive."""
    named = [model for model in models if variant in (model, model.removesuffix(".gguf"))]
    lowered = variant.lower()
    pattern = lowered if lowered.endswith(".gguf") or set("*?[") & set(lowered) else f"*{lowered}*.gguf"
    return (
        named
        or [model for model in models if quantisation(model) == variant.upper()]
        or [model for model in models if _fits(model.lower(), pattern)]
    )


def choose(where: str, files: Iterable[str], variant: str) -> list[str]:
    """The files, in order, of the one model among `files` that matches `variant`.

    Raises: `ModelNotFound`, with `where` and the candidates, if none or several match, or if a part is missing.
    """
    models = models_among(files)
    fits = fitting(models, whole_name(variant))
    if len(fits) != 1:
        wrong = "several files fit" if fits else "no file fits"
        raise ModelNotFound(f"{where}: {wrong} variant '{variant}'", hint=_listing(fits or models))
    parts = models[fits[0]]
    if not is_whole(parts):
        raise ModelNotFound(f"{where}: {fits[0]} has {len(all_parts(parts[0]))} parts, only {len(parts)} are there")
    return parts


def is_whole(parts: list[str]) -> bool:
    """Whether these are all parts of a model, in order."""
    return parts == all_parts(parts[0])


def _fits(model: str, pattern: str) -> bool:
    return fnmatchcase(model, pattern) or fnmatchcase(PurePosixPath(model).name, pattern)


def _listing(models: Collection[str] | Mapping[str, object]) -> str:
    names = sorted(models)
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more if names else "it contains no GGUF files"
