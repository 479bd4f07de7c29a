"""The folder `models_dir` as LM Studio, llama.cpp and people lay it out: which models it holds, and their names.

Everything here blocks on the disk: call it in a thread.
"""

from __future__ import annotations

import os
import re
import time
import unicodedata
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

from llama_smart_proxy.backends.names import key_of
from llama_smart_proxy.backends.weights.filenames import SPLIT, all_parts, is_projector
from llama_smart_proxy.backends.weights.projectors import Projectors, upper_folder
from llama_smart_proxy.backends.weights.stamps import Stamp, is_gguf, stamp_of
from llama_smart_proxy.proxy.config import Config

GONE = (FileNotFoundError, NotADirectoryError)
"""What is not there; any other error may pass."""
MAX_NAME = 255
MAX_DEPTH = 16
"""Most folders below each other that are read."""
FRESH_S = 2.0
"""Age in seconds from which a scan is repeated although the times of all folders stand still: what links lead to may
have changed."""
SHARE = 20
"""A scan is not repeated before so many times the time that it took."""
SMALL = 2**20
"""Smaller files are opened once: they are more often pages of errors or pointers of git-lfs than models."""
NOT_MODELS = {"$recycle.bin", "#recycle", "@eadir", "lost+found", "__macosx", "system volume information"}
"""Folders of operating systems, in lower case."""
_UNFIT = re.compile(
    "[\x00-\x1f\x7f-\x9f,\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ufffe\uffff\ud800-\udfff]"
)
"""Not in a name: what breaks a line or turns the direction of a text, what is not UTF-8, and the comma, which separates
the aliases of llama-server."""


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A model of the folder; its first part, if it is split. `aliases` has its path below the folder, if that is
    a further name. The stamps are those at the last scan."""

    name: str
    aliases: list[str]
    path: Path
    stamp: Stamp
    projector: Path | None = None
    projector_stamp: Stamp | None = None


@dataclass(frozen=True, slots=True)
class Scan:
    """What was found: the models by the keys of their names, and of their aliases; remarks for the operator; and, if
    the folder cannot be read, why. One that is `gone` has no models; of another, what was known of it last is here."""

    models: Mapping[str, ModelFile] = field(default_factory=dict)
    aliases: Mapping[str, ModelFile] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    error: str = ""
    gone: bool = False


def key(name: str) -> str:
    """The key of a name: equal for names that clients may use for one another."""
    return key_of(_fit(name))


class ModelsDir:
    """The models of a folder. `taken` are the names that mean something else: by key, with the file they mean, if any.
    For one thread at a time."""

    def __init__(self, folder: Path, taken: Mapping[str, Path | None]) -> None:
        self._folder = os.path.abspath(os.path.expanduser(folder))
        self._taken = taken
        self._scan = Scan()
        self._walk = _Walk(self._folder, {})
        self._stale_s = float("-inf")

    @classmethod
    def of(cls, config: Config) -> ModelsDir | None:
        """The one of a configuration, if it has one."""
        if config.llama_cpp.models_dir is None:
            return None
        models = {**config.models, **config.virtual}
        taken = {key(own): model.path for name, model in models.items() for own in (name, *model.aliases)}
        return cls(config.llama_cpp.models_dir, taken)

    def take_over(self, before: ModelsDir) -> Scan:
        """Go on from what another one has found last, and return that; nothing if it is of another folder, or if other
        names mean something else there."""
        if (before._folder, before._taken) == (self._folder, self._taken):
            self._walk, self._scan, self._stale_s = before._walk, before._scan, before._stale_s
        return self._scan

    def look(self) -> Scan:
        """What is in the folder now. The same object as before if nothing has changed."""
        begun_s = time.monotonic()
        if begun_s < self._stale_s and all(_time_of(path) == time_ns for path, time_ns in self._walk.times.items()):
            return self._scan
        walk = _Walk(self._folder, self._walk.folders)
        try:
            walk.run()
        except OSError as error:
            self.forget()
            message = f"{_fit(self._folder)}: {error.strerror}"
            gone = isinstance(error, GONE)
            self._scan = Scan(error=message, gone=True) if gone else replace(self._scan, error=message)
            return self._scan
        if self._scan.error or (walk.folders, walk.unreadable) != (self._walk.folders, self._walk.unreadable):
            self._scan = _Naming(walk, self._folder, self._taken).scan()
        self._walk = walk
        now_s = time.monotonic()
        self._stale_s = now_s + max(FRESH_S, SHARE * (now_s - begun_s))
        return self._scan

    def forget(self) -> None:
        """Let the next look be a scan."""
        self._stale_s = float("-inf")


# -- reading folders -------------------------------------------------------------------------------------------------


class _Walk:
    """One walk through all folders below `root`: real ones before those behind links, each only once. `before` are the
    `folders` of the last walk, for what cannot be read now."""

    def __init__(self, root: str, before: Mapping[str, dict[str, Stamp]]) -> None:
        self.folders: dict[str, dict[str, Stamp]] = {}
        """The GGUF files of each folder, by the folder's path below the root."""
        self.times: dict[str, int] = {}
        """The times of folders, and of links that lead nowhere yet, by path: 0 for what does not exist."""
        self.unreadable: list[str] = []
        self._root = root
        self._before = before
        self._seen: set[tuple[int, int]] = set()

    def run(self) -> None:
        """Raises: `OSError` if the root cannot be read."""
        folders, links = deque([""]), deque[str]()
        while folders or links:
            folder = folders.popleft() if folders else links.popleft()
            try:
                self._read(folder, folders, links)
            except OSError as error:
                if not folder:
                    raise
                if not isinstance(error, GONE):
                    self._keep(folder, error)

    def _keep(self, folder: str, error: OSError) -> None:
        """Take what was known of a folder and those below it."""
        kept = {path: files for path, files in self._before.items() if f"{path}/".startswith(f"{folder}/")}
        self.folders |= kept
        what = "what was known of it last is offered" if kept else "it is left out"
        self.unreadable.append(f"{_fit(folder)}: {error.strerror}; {what}")

    def _read(self, folder: str, folders: deque[str], links: deque[str]) -> None:
        path = os.path.join(self._root, folder)
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in self._seen:
            return
        self._seen.add((status.st_dev, status.st_ino))
        self.times[path] = status.st_mtime_ns
        with os.scandir(path) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
        names = {entry.name for entry in entries}
        files: dict[str, Stamp] = {}
        for entry in entries:
            if entry.name.startswith(".") or entry.name.lower() in NOT_MODELS:
                continue
            with suppress(OSError):
                if entry.is_dir():
                    below = f"{folder}/{entry.name}" if folder else entry.name
                    if below.count("/") < MAX_DEPTH:
                        (links if entry.is_symlink() else folders).append(below)
                elif (stamp := self._file(entry, names)) is not None:
                    files[entry.name] = stamp
        self.folders[folder] = files

    def _file(self, entry: os.DirEntry[str], names: set[str]) -> Stamp | None:
        """The stamp of an entry that is a GGUF file."""
        if entry.is_symlink() and not os.path.exists(entry.path):
            self.times[entry.path] = 0
        if not entry.name.lower().endswith(".gguf") or not entry.is_file():
            return None
        stamp = stamp_of(entry.stat())
        size = stamp[-1]
        is_partial = size == 0 or f"{entry.name}.aria2" in names  # of a download that goes on
        return None if is_partial or (size < SMALL and not is_gguf(entry.path, stamp)) else stamp


def _time_of(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0


# -- names -----------------------------------------------------------------------------------------------------------


class _Naming:
    """Gives each model of a walk a name of its own: the shortest one that is free, the highest folders and the first
    in the alphabet first."""

    def __init__(self, walk: _Walk, root: str, taken: Mapping[str, Path | None]) -> None:
        self._walk = walk
        self._root = root
        self._taken = taken
        self._owners: dict[str, _Part] = {}
        self._remarks = list(walk.unreadable)
        self._projectors: dict[str, tuple[str, Projectors]] = {}

    def scan(self) -> Scan:
        """The models, each by its name and by its path below the root, if that means no other."""
        names = {name: part for part in sorted(self._parts()) if (name := self._name(part))}
        models: dict[str, ModelFile] = {}
        aliases: dict[str, ModelFile] = {}
        for name, part in names.items():
            alias = _fit(part.stem)
            is_free = key(alias) not in self._taken and key(alias) not in self._owners
            model = self._model(name, [alias] if is_free else [], part)
            models[key(name)] = model
            if is_free:
                aliases.setdefault(key(alias), model)
        return Scan(models, aliases, tuple(self._remarks))

    def _parts(self) -> Iterator[_Part]:
        """The first or only part of each model."""
        for folder, files in self._walk.folders.items():
            for name, stamp in files.items():
                split = SPLIT.fullmatch(name)
                if is_projector(name) or (split is not None and int(split["part"]) != 1):
                    continue
                part = _Part.of(folder, name, stamp)
                if missing := [other for other in all_parts(name) if other not in files]:
                    self._remarks.append(f"{_fit(part.file)}: {len(missing)} of its parts are missing; it is left out")
                else:
                    yield part

    def _name(self, part: _Part) -> str:
        """A name that is free; empty for a file that is offered already by the name that this one would have."""
        conflict = ""
        for name in part.names():
            own = key(name)
            owner = self._owners.get(own)
            if owner is None and own not in self._taken:
                self._owners[own] = part
                if conflict:
                    self._remarks.append(f"{_fit(part.file)} is offered as {name!r}: {conflict}")
                return name
            if self._is_same(part, owner, self._taken.get(own)):
                return ""
            means = _fit(owner.file) if owner is not None else "a configured model"
            conflict = conflict or f"the name {name!r} means {means}"
        raise AssertionError("unreachable")

    def _is_same(self, part: _Part, owner: _Part | None, configured: Path | None) -> bool:
        if owner is not None:
            return owner.stamp[:2] == part.stamp[:2]
        with suppress(OSError):
            return configured is not None and stamp_of(os.stat(configured))[:2] == part.stamp[:2]
        return False

    def _model(self, name: str, aliases: list[str], part: _Part) -> ModelFile:
        path, (folder, found) = Path(self._root, part.file), self._projectors_for(part.folder)
        projector = found.of(os.path.basename(part.file))
        if projector is None:
            return ModelFile(name, aliases, path, part.stamp)
        stamp = self._walk.folders[folder][projector]
        return ModelFile(name, aliases, path, part.stamp, Path(self._root, folder, projector), stamp)

    def _projectors_for(self, folder: str) -> tuple[str, Projectors]:
        """The projectors that models in `folder` may have, and the folder where they are."""
        known = self._projectors.get(folder)
        if known is None:
            known = folder, Projectors(self._walk.folders.get(folder, ()))
            above = upper_folder(folder) if folder else None
            if not known[1] and above is not None:
                known = self._projectors_for(above)
            self._projectors[folder] = known
        return known


@dataclass(frozen=True, slots=True, order=True)
class _Part:
    """A file of a walk, in the order in which names are given: `file` and `stem` are its path below the root, the stem
    without part number and ending."""

    depth: int
    normalised: str
    file: str
    folder: str = field(compare=False)
    stem: str = field(compare=False)
    stamp: Stamp = field(compare=False)

    @classmethod
    def of(cls, folder: str, name: str, stamp: Stamp) -> _Part:
        start = f"{folder}/" if folder else ""
        split = SPLIT.fullmatch(name)
        stem = split["stem"] if split else name[: -len(".gguf")]
        file = f"{start}{name}"
        return cls(file.count("/"), unicodedata.normalize("NFC", file), file, folder, f"{start}{stem}", stamp)

    def names(self) -> Iterator[str]:
        """The names it may have, the shortest first."""
        yield _fit(self.stem.rpartition("/")[2])
        yield _fit(self.stem)
        yield _fit(self.file)
        for number in count(2):
            yield f"{_fit(self.file)}-{number}"


def _fit(text: str) -> str:
    """`text` as a name; printable in one line, and UTF-8."""
    return _UNFIT.sub("-", unicodedata.normalize("NFC", text)).strip()[-MAX_NAME:] or "-"
