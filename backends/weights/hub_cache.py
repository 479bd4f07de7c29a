"""The local Hugging Face cache: finding complete models, paths for downloads, publishing and deleting files.

Its layout is that of `huggingface_hub`, so that other programs share it: in `models--org--repo`, `blobs/<digest>` holds
the bytes, `snapshots/<commit>/<file>` links to them, and `refs/main` names the newest commit. Files are
linked only after verification (`hub`), so that all linked files can be loaded.

Everything here blocks on the disk: call it in a thread.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from llama_smart_proxy.backends.weights.filenames import (
    fitting,
    is_projector,
    is_whole,
    models_among,
    quantisation,
    whole_name,
)
from llama_smart_proxy.backends.weights.stamps import is_gguf
from llama_smart_proxy.proxy.config import ModelConfig, checked_name
from llama_smart_proxy.proxy.errors import ModelNotFound, StartFailed

PARTIAL = ".lsp.incomplete"
SETTLED_NS = 2_000_000_000
"""A folder that changed more recently may change again without a new time stamp, so its scan is not cached."""
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
REPO = re.compile(rf"(?!.*(?:--|\.\.))(?=.{{3,96}}\Z){_PART}/{_PART}")
"""Valid repository names: without `--`, which replaces the slash in the cache, and without `..`."""


def root() -> Path:
    """The folder of the cache (`HF_HUB_CACHE`, else `hub` in `HF_HOME`)."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).absolute()


@dataclass(frozen=True, slots=True)
class Folder:
    """The folder of one repository in the cache."""

    repo: str

    @property
    def path(self) -> Path:
        return root() / f"models--{self.repo.replace('/', '--')}"

    def blob(self, digest: str) -> Path:
        """The path of the verified file with that digest."""
        return self.path / "blobs" / digest

    def partial(self, digest: str) -> Path:
        """The path of its partial download."""
        return self.path / "blobs" / f"{digest}{PARTIAL}"

    def lock(self, digest: str) -> Path:
        """The lock file of its download, shared with `huggingface_hub`."""
        return root() / ".locks" / self.path.name / f"{digest}.lock"

    def drop_partials(self, digests: set[str]) -> None:
        """Remove partial downloads of all other digests, which the repository does not contain any more."""
        for file in (self.path / "blobs").glob(f"*{PARTIAL}"):
            if file.name.removesuffix(PARTIAL) not in digests:
                file.unlink(missing_ok=True)

    def held(self, commit: str, file: str, digest: str) -> Path | None:
        """The path of the data of `file`, if present; without symbolic links it is in the snapshot itself."""
        paths = (self.blob(digest), self.path / "snapshots" / commit / file)
        return next((path for path in paths if path.is_file()), None)

    def publish(self, commit: str, files: dict[str, str]) -> None:
        """Link these files, given with their digests, in the snapshot `commit`, and make it the newest."""
        for file, digest in files.items():
            link, blob = self.path / "snapshots" / commit / file, self.blob(digest)
            link.parent.mkdir(parents=True, exist_ok=True)
            if not blob.exists() or (link.exists() and link.samefile(blob)):
                continue
            link.unlink(missing_ok=True)
            try:
                link.symlink_to(os.path.relpath(blob, link.parent))
            except FileExistsError:  # created by another program
                pass
            except OSError:  # a file system without links
                blob.replace(link)
        main = self.path / "refs" / "main"
        main.parent.mkdir(exist_ok=True)
        main.write_text(commit)


@dataclass(frozen=True, slots=True)
class _Scan:
    """The complete models of each snapshot of a repository, newest first: the path of the first part, by whole name.
    `stamps`: the modification time of each folder in ns."""

    snapshots: list[dict[str, Path]]
    stamps: dict[Path, int]


_scans: dict[Path, _Scan] = {}


def find(repo: str, variant: str) -> Path | None:
    """The first part of the model that matches `variant`, if it is complete: in the snapshot of `refs/main`, else in
    the next newest; None if no or several models match."""
    for models in _snapshots(Folder(repo).path):
        fits = fitting(models, whole_name(variant))
        if fits:
            return models[fits[0]] if len(fits) == 1 else None
    return None


def cached_models() -> dict[str, ModelConfig]:
    """All complete GGUF models of the cache, as `hf.co/org/repo:VARIANT`.

    VARIANT is the quantisation, or the file name without `.gguf` if several models of the repository have the same. The
    `variant` of the configuration is the exact file name. An unreadable cache counts as empty; an unchanged one is not
    read again.
    """
    found: dict[str, ModelConfig] = {}
    for path in _repositories():
        repo = path.name.removeprefix("models--").replace("--", "/")
        models = {file for snapshot in _snapshots(path) for file in snapshot} if REPO.fullmatch(repo) else set()
        count = Counter(map(quantisation, models))
        for file in sorted(models):
            own = quantisation(file)
            variant = own if own is not None and count[own] == 1 else file.removesuffix(".gguf")
            with suppress(ValueError):  # not valid as a model name
                found[checked_name(f"hf.co/{repo}:{variant}")] = ModelConfig(repo=repo, variant=file)
    return found


def delete(repo: str, file: str) -> None:
    """Delete a file, with all parts if it is split, from every snapshot, and its data unless other files link to it.
    With the last model of the repository, its projectors are deleted.

    Raises: `ModelNotFound` if it is not in the cache, `StartFailed` (code `delete_failed`) if the disk refuses.
    """
    import huggingface_hub as hub

    try:
        cache = hub.scan_cache_dir(root())
        held = [
            (whole_name(entry.file_path.relative_to(revision.snapshot_path).as_posix()), entry)
            for stored in cache.repos
            if (stored.repo_type, stored.repo_id) == ("model", repo)
            for revision in stored.revisions
            for entry in revision.files
        ]
        files = [entry for name, entry in held if name == whole_name(file)]
        if not set(models_among(name for name, _ in held)) - {whole_name(file)}:
            files += [entry for name, entry in held if is_projector(name)] if files else []
        if files:
            cache.delete_files(*files).execute()
    except hub.CacheNotFound:
        files = []
    except OSError as error:
        raise StartFailed(f"hf.co/{repo}: cannot remove {file}: {error.strerror}", code="delete_failed") from error
    if not files:
        raise ModelNotFound(f"hf.co/{repo}: {file} is not in the local Hugging Face cache")


def _repositories() -> list[Path]:
    with suppress(OSError):
        return sorted(path for path in root().iterdir() if path.name.startswith("models--"))
    return []


def _snapshots(folder: Path) -> list[dict[str, Path]]:
    """See `_Scan.snapshots`."""
    known = _scans.get(folder)
    if known is not None and all(_stamp(path) == stamp for path, stamp in known.stamps.items()):
        return known.snapshots
    scan = _Scanner(folder).scan()
    if max(scan.stamps.values()) < time.time_ns() - SETTLED_NS:
        _scans[folder] = scan
    else:
        _scans.pop(folder, None)
    return scan.snapshots


def _stamp(path: Path) -> int:
    """The modification time in ns; 0 if it does not exist."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


@dataclass(slots=True)
class _Scanner:
    folder: Path
    stamps: dict[Path, int] = field(default_factory=dict)

    def scan(self) -> _Scan:
        for name in (".", "blobs", "refs/main", "snapshots"):
            self._note(self.folder / name)
        return _Scan([self._models(snapshot) for snapshot in self._newest_first()], self.stamps)

    def _models(self, snapshot: Path) -> dict[str, Path]:
        files = {path.relative_to(snapshot).as_posix(): path for path in self._files(snapshot)}
        models = models_among(files).items()
        return {model: files[parts[0]] for model, parts in models if is_whole(parts)}

    def _newest_first(self) -> list[Path]:
        commit = ""
        with suppress(OSError, ValueError):
            commit = (self.folder / "refs" / "main").read_text().strip()
        with suppress(OSError):
            found = [path for path in (self.folder / "snapshots").iterdir() if path.is_dir()]
            return sorted(found, key=lambda path: (path.name == commit, _stamp(path)), reverse=True)
        return []

    def _files(self, folder: Path) -> Iterator[Path]:
        """The readable GGUF files below `folder`."""
        self._note(folder)
        with suppress(OSError):
            for path in folder.iterdir():
                if path.is_dir() and not path.is_symlink():
                    yield from self._files(path)
                elif path.suffix.lower() == ".gguf":
                    with suppress(OSError):
                        if path.is_file() and is_gguf(path):
                            yield path

    def _note(self, path: Path) -> None:
        self.stamps[path] = _stamp(path)
