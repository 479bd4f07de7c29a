"""What the names of GGUF files say: which belong together, which quantisation they hold, and which one is meant."""

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
_SHOWN = 20


def is_projector(file: str) -> bool:
    """A vision or audio projector, which goes beside a model and is none itself."""
    return "mmproj" in PurePosixPath(file).name.lower()


def whole_name(file: str) -> str:
    """The name a split model would have if it were not; any other file's name as it is."""
    split = SPLIT.fullmatch(file)
    return f"{split['stem']}.gguf" if split else file


def all_parts(file: str) -> list[str]:
    """All parts of a split model, in order, given any of them; a file that is not split is its own only part."""
    split = SPLIT.fullmatch(file)
    if split is None:
        return [file]
    stem, parts = split["stem"], split["parts"]
    return [f"{stem}-{number:05}-of-{parts}.gguf" for number in range(1, int(parts) + 1)]


def quantisation(file: str) -> str | None:
    """The part of a file's name that tells its quantisation, as it is written there: the last one, in upper case."""
    found = _QUANTISATION.findall(whole_name(file))
    return str(found[-1]).upper() if found else None


def models_among(files: Iterable[str]) -> dict[str, list[str]]:
    """The models among the files of a repository: by whole name, the files of each. Projectors are none."""
    models: dict[str, list[str]] = {}
    for file in sorted(files):
        if file.lower().endswith(".gguf") and not is_projector(file):
            models.setdefault(whole_name(file), []).append(file)
    return models


def fitting(models: Collection[str], variant: str) -> list[str]:
    """Those whole names that `variant` means: the one it names, with or without `.gguf`; else those of that very
    quantisation; else those it fits as a glob, or has as a part of the name. Case matters for names only."""
    named = [model for model in models if variant in (model, model.removesuffix(".gguf"))]
    wanted = variant.lower()
    pattern = wanted if wanted.endswith(".gguf") or set("*?[") & set(wanted) else f"*{wanted}*.gguf"
    return (
        named
        or [model for model in models if quantisation(model) == variant.upper()]
        or [model for model in models if _fits(model.lower(), pattern)]
    )


def choose(where: str, files: Iterable[str], variant: str) -> list[str]:
    """The files, in order, of the one model among `files` that `variant` means.

    Raises: `ModelNotFound`, naming `where` that is and the candidates, when none or several fit, or when a part is
    missing.
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
    """Whether these, in order, are all parts of a model."""
    return parts == all_parts(parts[0])


def _fits(model: str, pattern: str) -> bool:
    return fnmatchcase(model, pattern) or fnmatchcase(PurePosixPath(model).name, pattern)


def _listing(models: Collection[str] | Mapping[str, object]) -> str:
    names = sorted(models)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more if names else "it holds no GGUF files"
