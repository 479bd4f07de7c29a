"""The local Hugging Face cache: what is whole in it, where a download goes, and how files come and go.

Its layout is that of `huggingface_hub`, so that other programs share it: in `models--org--repo`, `blobs/<digest>` holds
the bytes, `snapshots/<commit>/<file>` links to them, and `refs/main` names the newest commit. Nothing is linked before
it is verified (`backends.hub`), so whatever is linked may be loaded.

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

from llama_smart_proxy.backends.weights.filenames import fitting, is_whole, models_among, quantisation, whole_name
from llama_smart_proxy.proxy.config import ModelConfig, checked_name
from llama_smart_proxy.proxy.errors import ModelNotFound, StartFailed

MAGIC = b"GGUF"
PARTIAL = ".lsp.incomplete"
SETTLED_NS = 2_000_000_000
"""A folder changed less than so long ago may change again without getting another time stamp."""
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
REPO = re.compile(rf"(?!.*(?:--|\.\.))(?=.{{3,96}}\Z){_PART}/{_PART}")
"""A repository that the hub may have: no `--`, which stands for the slash in the cache, and no way out of it."""


def root() -> Path:
    """The folder of the cache (`HF_HUB_CACHE`, else `hub` in `HF_HOME`)."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).absolute()


def is_gguf(path: Path) -> bool:
    """Whether it begins as a GGUF file does. Raises: `OSError`."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


@dataclass(frozen=True, slots=True)
class Folder:
    """Where the cache keeps one repository."""

    repo: str

    @property
    def path(self) -> Path:
        return root() / f"models--{self.repo.replace('/', '--')}"

    def blob(self, digest: str) -> Path:
        """The verified bytes with that digest."""
        return self.path / "blobs" / digest

    def partial(self, digest: str) -> Path:
        """What has come of them so far."""
        return self.path / "blobs" / f"{digest}{PARTIAL}"

    def lock(self, digest: str) -> Path:
        """Held by whoever fetches them; `huggingface_hub` looks at the same one."""
        return root() / ".locks" / self.path.name / f"{digest}.lock"

    def drop_partials(self, digests: set[str]) -> None:
        """Remove what was begun of any other bytes: the repository does not hold them any more."""
        for file in (self.path / "blobs").glob(f"*{PARTIAL}"):
            if file.name.removesuffix(PARTIAL) not in digests:
                file.unlink(missing_ok=True)

    def held(self, commit: str, file: str, digest: str) -> Path | None:
        """The bytes of `file`, if they are here: where there are no links they are in the snapshot itself."""
        places = (self.blob(digest), self.path / "snapshots" / commit / file)
        return next((place for place in places if place.is_file()), None)

    def publish(self, commit: str, files: dict[str, str]) -> None:
        """Make these files, each with its digest, part of the snapshot `commit`, and that the newest one."""
        for file, digest in files.items():
            link, blob = self.path / "snapshots" / commit / file, self.blob(digest)
            link.parent.mkdir(parents=True, exist_ok=True)
            if not blob.exists() or (link.exists() and link.samefile(blob)):
                continue
            link.unlink(missing_ok=True)
            try:
                link.symlink_to(os.path.relpath(blob, link.parent))
            except FileExistsError:  # another program was quicker
                pass
            except OSError:  # a file system without links
                blob.replace(link)
        main = self.path / "refs" / "main"
        main.parent.mkdir(exist_ok=True)
        main.write_text(commit)


@dataclass(frozen=True, slots=True)
class _Scan:
    """The whole models of each snapshot of a repository, the newest first: by whole name, the first part's path.
    `stamps`: when each folder changed."""

    snapshots: list[dict[str, Path]]
    stamps: dict[Path, int]


_scans: dict[Path, _Scan] = {}


def find(repo: str, variant: str) -> Path | None:
    """The first part of the model that `variant` means, if it is whole in the cache: in the newest snapshot, which is
    that of `refs/main`, else in the next one."""
    for models in _snapshots(Folder(repo).path):
        fits = fitting(models, whole_name(variant))
        if fits:
            return models[fits[0]] if len(fits) == 1 else None
    return None


def cached_models() -> dict[str, ModelConfig]:
    """Every whole GGUF model of the cache, as `hf.co/org/repo:VARIANT`.

    VARIANT is its quantisation, or its file name without `.gguf` if another one of the repository has the same. The
    `variant` of the configuration is its exact file name. A cache that cannot be read is empty; one that has not
    changed is not read again.
    """
    found: dict[str, ModelConfig] = {}
    for path in _repositories():
        repo = path.name.removeprefix("models--").replace("--", "/")
        models = {file for snapshot in _snapshots(path) for file in snapshot} if REPO.fullmatch(repo) else set()
        count = Counter(map(quantisation, models))
        for file in sorted(models):
            own = quantisation(file)
            variant = own if own is not None and count[own] == 1 else file.removesuffix(".gguf")
            with suppress(ValueError):  # a file name that no model may have
                found[checked_name(f"hf.co/{repo}:{variant}")] = ModelConfig(repo=repo, variant=file)
    return found


def delete(repo: str, file: str) -> None:
    """Remove a file, all parts of it if it is split, from every snapshot, and its bytes unless others link to them.

    Raises: `ModelNotFound` when it is not there, `StartFailed` (code `delete_failed`) when that is not possible.
    """
    import huggingface_hub as hub

    try:
        cache = hub.scan_cache_dir(root())
        doomed = [
            entry
            for held in cache.repos
            if (held.repo_type, held.repo_id) == ("model", repo)
            for revision in held.revisions
            for entry in revision.files
            if whole_name(entry.file_path.relative_to(revision.snapshot_path).as_posix()) == whole_name(file)
        ]
        if doomed:
            cache.delete_files(*doomed).execute()
    except hub.CacheNotFound:
        doomed = []
    except OSError as error:
        raise StartFailed(f"hf.co/{repo}: cannot remove {file}: {error.strerror}", code="delete_failed") from error
    if not doomed:
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
    """When it last changed, in nanoseconds; 0 when there is no such thing."""
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
        """The GGUF files below `folder` that are there and can be read."""
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
