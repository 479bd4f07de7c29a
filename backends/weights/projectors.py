"""Which projector (`mmproj*.gguf`, for images and audio) belongs to which model, by the names of files."""

from __future__ import annotations

import logging
import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path, PurePosixPath

from llama_smart_proxy.backends.weights.filenames import is_projector, is_quantisation, quantisation, whole_name
from llama_smart_proxy.backends.weights.stamps import is_gguf

logger = logging.getLogger(__name__)

PRECISIONS = ("F16", "BF16", "F32", "Q8_0")
"""The preferred ones, where the same projector is there in several."""
_SEPARATOR = re.compile(r"[-_.\s/]+")
_NOT_IN_NAMES = {"", "ud", "i1", "imat", "imatrix"}
"""Words for how a model was quantised."""
_UNNAMED: tuple[set[str], ...] = ({"model"}, set())
"""The words, besides `mmproj` and the quantisation, of projectors that name no model."""
SNAPSHOTS = "snapshots"
"""The folder of the Hugging Face cache that holds a folder for each commit of a repository."""


class Projectors:
    """The projectors of one folder, given the names of all GGUF files in it."""

    def __init__(self, files: Iterable[str]) -> None:
        names = sorted(file for file in files if file.lower().endswith(".gguf"))
        self._words = {file: _words(file) for file in names if is_projector(file)}
        models = (file for file in names if not is_projector(file)) if self._words else ()
        self._models = set(map(_words, models)) - {()}

    def __bool__(self) -> bool:
        return bool(self._words)

    def of(self, model: str, *, one_model: bool = False) -> str | None:
        """The projector of the file `model`: the one that has the model's name in its own, in the preferred precision;
        else the only one, if it has no other model's name and the models of the folder are variants of one. With
        `one_model` they are known to be, and of several without a name the preferred one is taken."""
        if not self:
            return None
        words = _words(model)
        others = self._models - {words}
        kinship = {file: _kinship(words, own) for file, own in self._words.items() if own not in others}
        nearest = max(kinship.values(), default=(0, 0))
        if nearest > (0, 0):
            return self._preferred([file for file, value in kinship.items() if value == nearest])
        if one_model:
            return self._preferred(self.unnamed)
        return self.unnamed[0] if len(self.unnamed) == 1 and self._is_family(words) else None

    @cached_property
    def unnamed(self) -> list[str]:
        """The projectors that have the name of no model of the folder."""
        kin = (any(_kinship(words, own) > (0, 0) for words in self._models) for own in self._words.values())
        return [file for file, named in zip(self._words, kin, strict=True) if not named]

    def warn(self, model: object) -> None:
        """Log that it is unclear which one `model` gets, if it is."""
        if self.unnamed:
            several = ", ".join(self.unnamed[:10])
            logger.warning("%s gets no projector: unclear which; --mmproj in its args sets one: %s", model, several)

    def _preferred(self, files: Sequence[str]) -> str | None:
        if len({self._words[file] for file in files}) != 1:
            return None
        return min(files, key=lambda file: (_rank(quantisation(file)), file))

    def _is_family(self, words: tuple[str, ...]) -> bool:
        """Whether the name of this model, or of another, begins those of all models of the folder."""
        models = {*self._models, words}
        first = min(models, key=len)
        return all(model[: len(first)] == first for model in models)


def beside(path: Path, *, log: bool = True) -> Path | None:
    """The projector that accompanies the model at `path`, in its folder or where `upper_folder` leads. Which one it is
    may be unclear: then there is none, and with `log` a line in the log. Blocks on the disk."""
    folder: str | None = str(path.parent)
    while folder is not None:
        found = Projectors(_readable(Path(folder)))
        if found:
            name = found.of(path.name)
            if name is None and log:
                found.warn(path)
            return Path(folder, name) if name is not None else None
        folder = upper_folder(folder)
    return None


def among(model: str, files: Collection[str]) -> str | None:
    """As `beside`, in the log too, among all `files` of a repository, which is one model's."""
    for folder in PurePosixPath(model).parents:
        names = {PurePosixPath(file).name: file for file in files if PurePosixPath(file).parent == folder}
        found = Projectors(names)
        if found:
            name = found.of(PurePosixPath(model).name, one_model=True)
            if name is None:
                found.warn(model)
            return names[name] if name is not None else None
    return None


def upper_folder(folder: str) -> str | None:
    """The folder above, if that may hold the projector: above one that is named after a quantisation, and within a
    snapshot of the Hugging Face cache."""
    above, name = os.path.split(folder)
    in_snapshot = SNAPSHOTS in Path(above).parts and os.path.basename(above) != SNAPSHOTS
    return above if in_snapshot or is_quantisation(name) else None


def _readable(folder: Path) -> list[str]:
    """The GGUF files of a folder: projectors only if they can be used."""
    try:
        names = [name for name in os.listdir(folder) if name.lower().endswith(".gguf") and not name.startswith(".")]
    except OSError:
        return []
    return [name for name in names if not is_projector(name) or _works(folder / name)]


def _works(path: Path) -> bool:
    try:
        return path.is_file() and is_gguf(path)
    except OSError:
        return False


@lru_cache(maxsize=1024)
def _words(file: str) -> tuple[str, ...]:
    """The words of a file's name without its quantisation, part numbers, ending, and `mmproj`."""
    name = unicodedata.normalize("NFC", whole_name(PurePosixPath(file).name)).casefold()
    if (found := quantisation(name)) is not None:
        name = re.sub(rf"(?:^|[-._]){re.escape(found.casefold())}(?=[-.])", "", name)
    words = _SEPARATOR.split(name.removesuffix(".gguf"))
    return tuple(word for word in words if word not in _NOT_IN_NAMES and not word.startswith("mmproj"))


def _kinship(model: Sequence[str], projector: Sequence[str]) -> tuple[int, int]:
    """How near the name of a projector is to that of a model: the same, or one within the other; the nearer the
    greater, (0, 0) for not at all."""
    if not model or set(projector) in _UNNAMED:
        return 0, 0
    if model == projector:
        return 3, 0
    if _within(model, projector):
        return 2, len(model) - len(projector)
    return (1, len(projector) - len(model)) if _within(projector, model) else (0, 0)


def _within(short: Sequence[str], long: Sequence[str]) -> bool:
    return f"/{'/'.join(short)}/" in f"/{'/'.join(long)}/"


def _rank(precision: str | None) -> int:
    return PRECISIONS.index(precision) if precision in PRECISIONS else len(PRECISIONS)
