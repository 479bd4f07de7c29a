"""GGUF files that are written on this machine, from the weights in an installed package, and kept in a folder.

Everything here blocks on the disk: call it in a thread.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from llama_smart_proxy.backends.weights import bert
from llama_smart_proxy.backends.weights.stamps import stamp_of

logger = logging.getLogger(__name__)


class Unwritable(Exception):
    """A file cannot be converted; the message is the reason and the remedy."""


def folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where they are: `llama-smart-proxy/weights` in `$XDG_CACHE_HOME` or `~/.cache`."""
    home = environ.get("XDG_CACHE_HOME", "")
    cache = Path(home) if os.path.isabs(home) else Path("~/.cache").expanduser()
    return cache / "llama-smart-proxy" / "weights"


def path_of(source: Path, variant: str) -> Path:
    """The GGUF file of `source`; another one when that, or what is written, has changed."""
    try:
        state = (*stamp_of(source.stat())[2:], bert.VERSION)
    except OSError as error:
        raise Unwritable(f"{source}: {error.strerror}") from error
    digest = hashlib.sha256(repr(state).encode()).hexdigest()[:12]
    return folder() / f"{_stem(source, variant)}-{digest}.gguf"


def checked(source: Path, variant: str) -> Path:
    """`source`. Raises: `Unwritable`, when it is known that no GGUF file can be made of it."""
    if variant not in bert.VARIANTS:
        raise Unwritable(f"variant {variant} is none of {', '.join(bert.VARIANTS)}")
    missing = [name for name in bert.NEEDS if importlib.util.find_spec(name) is None]
    if missing and not path_of(source, variant).exists():
        raise Unwritable(f"converting it requires {' and '.join(missing)}: pip install 'llama-smart-proxy[rag]'")
    return source


def made(source: Path, variant: str) -> Path:
    """The GGUF file of `source`, which is written if it is not there: whole or not at all, by one process at a time,
    which removes those of earlier states. Raises: `Unwritable`."""
    checked(source, variant)
    try:
        path = path_of(source, variant)
        if not path.exists():
            _write(source, path, variant)
    except OSError as error:
        reason = error.strerror or "No space left on device"  # numpy gives none when not all could be written
        where = f"{error.filename or folder()}: {reason}; XDG_CACHE_HOME sets another folder"
        raise Unwritable(f"cannot convert {source.name}: {where}") from error
    except (ImportError, bert.NotConvertible) as error:
        raise Unwritable(f"cannot convert {source.name}: {error}") from error
    return path


def _write(source: Path, path: Path, variant: str) -> None:
    from filelock import FileLock

    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    stem, part = _stem(source, variant), path.with_suffix(".part")
    with FileLock(path.parent / f"{stem}.lock", mode=0o600):
        if path.exists():  # another process has written it
            return
        logger.info("writing %s from %s, once", path, source.name)
        try:
            part.unlink(missing_ok=True)
            os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            bert.write_gguf(source, part, variant)
            part.rename(path)
        except BaseException:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise
        for old in path.parent.glob(f"{stem}-*"):
            if old != path:
                old.unlink(missing_ok=True)


def _stem(source: Path, variant: str) -> str:
    place = hashlib.sha256(os.fsencode(source.absolute())).hexdigest()[:8]
    return f"{source.absolute().parent.parent.name}-{variant}-{place}"
