"""Downloads models from the Hugging Face hub into the local cache; they appear there only after verification."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from llama_smart_proxy.backends.names import LONGEST_NAME
from llama_smart_proxy.backends.threads import run_in_thread
from llama_smart_proxy.backends.weights.downloads import Progress, Work
from llama_smart_proxy.backends.weights.filenames import DEFAULT_VARIANT, choose
from llama_smart_proxy.backends.weights.hub_cache import REPO, Folder, cached_models, delete, root
from llama_smart_proxy.backends.weights.hub_http import (
    FILE,
    DownloadCancelled,
    InvalidResponse,
    RemoteFile,
    fetch,
    manifest,
)
from llama_smart_proxy.backends.weights.projectors import among
from llama_smart_proxy.backends.weights.stamps import is_gguf
from llama_smart_proxy.proxy.errors import ModelNotFound, ProxyError, StartFailed

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

__all__ = ["PREFIXES", "cached_models", "delete", "download_name", "parse_name", "pull", "work"]

PREFIXES = ("hf.co/", "huggingface.co/")
"""Prefixes of the names of models of the hub."""
PROGRESS_INTERVAL_S = 0.1
LOCK_POLL_S = 0.5
READ_BYTES = 1024 * 1024
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def parse_name(name: str) -> tuple[str, str] | None:
    """The repository and variant of `hf.co/org/repo:variant`; None for any other name.

    The variant defaults to Q4_K_M, also for Ollama's `latest`. Neither part can be a path out of the cache.
    """
    if len(name) > LONGEST_NAME:
        return None
    prefix = next((prefix for prefix in PREFIXES if name.lower().startswith(prefix)), None)
    if prefix is None:
        return None
    repo, colon, variant = name[len(prefix) :].partition(":")
    if not REPO.fullmatch(repo) or (colon and not FILE.fullmatch(variant)):
        return None
    return repo, DEFAULT_VARIANT if variant in ("", "latest") else variant


def download_name(repo: str, variant: str | None) -> str:
    """The name of a model's download in `Downloads`, equal for all requests for the model."""
    return f"hf.co/{repo}:{variant or DEFAULT_VARIANT}"


def work(repo: str, variant: str | None) -> Work:
    """The work of `pull` for `Downloads.join`. Raises: as `pull`.

    After cancellation its thread ends with the next piece of data, at the latest when the connection times out.
    """

    async def do(report: Callable[[Progress], None]) -> None:
        loop = asyncio.get_running_loop()
        cancelled = threading.Event()

        def report_in_loop(progress: Progress) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(report, progress)

        try:
            await run_in_thread(partial(pull, repo, variant, report_in_loop, cancelled))
        finally:
            cancelled.set()

    return do


def pull(repo: str, variant: str | None, report: Callable[[Progress], None], cancelled: threading.Event) -> None:
    """Download the newest version of a model, and its projector, into the cache; blocks. `report` gets the progress in
    Ollama's format.

    Existing files are not downloaded again. Partial data is kept on failure, unless it is invalid.

    Raises: `ModelNotFound`; `StartFailed` (codes `model_gated`, `no_space`, `download_failed`); `DownloadCancelled`
    soon after `cancelled` was set.
    """
    with _translate_errors(repo):
        report({"status": "pulling manifest"})
        files = manifest(repo)
        folder = Folder(repo)
        chosen = choose(f"hf.co/{repo}", files, variant or DEFAULT_VARIANT)
        projector = among(chosen[0], files)
        selected = [files[name] for name in (*chosen, projector) if name is not None]
        (folder.path / "blobs").mkdir(parents=True, exist_ok=True)
        (folder.path / "snapshots").mkdir(exist_ok=True)
        folder.drop_partials({file.digest for file in files.values()})
        _check_space(folder, selected)
        for file in selected:
            _download_file(folder, file, report, cancelled)
        report({"status": "writing manifest"})
        folder.publish(selected[0].commit, {file.name: file.digest for file in selected})


def _download_file(
    folder: Folder, file: RemoteFile, report: Callable[[Progress], None], cancelled: threading.Event
) -> None:
    """Download and verify one file, after waiting for any other download of it."""
    kind = "sha256" if len(file.digest) == 64 else "sha1"
    status = {"status": f"pulling {file.digest[:12]}", "digest": f"{kind}:{file.digest}", "total": file.size}
    reported_at = 0.0

    def completed(size: int) -> None:
        nonlocal reported_at
        now = time.monotonic()
        if now - reported_at >= PROGRESS_INTERVAL_S or size == file.size:
            reported_at = now
            report({**status, "completed": size})

    with _locked(folder.lock(file.digest), cancelled):
        if _is_cached(folder, file):
            completed(file.size)
            return
        part = folder.partial(file.digest)
        fetch(file, part, completed, cancelled)
        report({"status": f"verifying {kind} digest"})
        try:
            _verify(part, file, cancelled)
        except InvalidResponse:
            part.unlink()
            raise
        part.replace(folder.blob(file.digest))


def _is_cached(folder: Folder, file: RemoteFile) -> bool:
    """Whether the file is in the cache. Removes an incomplete file left by another program."""
    held = folder.held(file.commit, file.name, file.digest)
    if held is not None and held.stat().st_size != file.size:
        held.unlink()
        held = None
    return held is not None


def _verify(path: Path, file: RemoteFile, cancelled: threading.Event) -> None:
    """Check size, digest and format of the file, and sync it. Raises: `InvalidResponse`, `DownloadCancelled`."""
    digest = hashlib.sha256()
    if len(file.digest) == 40:
        digest = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    with path.open("rb") as data:
        while piece := data.read(READ_BYTES):
            if cancelled.is_set():
                raise DownloadCancelled
            digest.update(piece)
        os.fsync(data.fileno())
    if digest.hexdigest() != file.digest:
        raise InvalidResponse(f"{file.name} has another digest than announced")
    if not is_gguf(path):
        raise InvalidResponse(f"{file.name} is not a GGUF file")


def _check_space(folder: Folder, selected: list[RemoteFile]) -> None:
    """Raises: `StartFailed` (code `no_space`) if the disk has not enough space for the missing data."""
    missing = 0
    for file in selected:
        if not _is_cached(folder, file):
            with suppress(FileNotFoundError):
                missing -= folder.partial(file.digest).stat().st_size
            missing += file.size
    free = shutil.disk_usage(folder.path).free
    if missing > free:
        message = f"hf.co/{folder.repo}: no space: {_size(missing)} are missing, {_size(free)} are free"
        raise StartFailed(f"{message} in {folder.path.parent}", code="no_space")


@contextmanager
def _locked(path: Path, cancelled: threading.Event) -> Iterator[None]:
    """Hold the lock that excludes other downloads of the same file, also by other programs."""
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        while True:
            if cancelled.is_set():
                raise DownloadCancelled
            try:
                stack.enter_context(FileLock(path, timeout=LOCK_POLL_S, mode=0o664))
            except Timeout:
                continue
            except NotImplementedError:  # a file system without locks
                pass
            break
        yield


@contextmanager
def _translate_errors(repo: str) -> Iterator[None]:
    """Converts external failures to errors of the proxy with a message of one line."""
    import httpx2
    from huggingface_hub import constants, errors

    try:
        yield
    except InvalidResponse as error:
        raise _failed(f"hf.co/{repo}: {constants.ENDPOINT} sent an invalid response: {error}") from error
    except errors.OfflineModeIsEnabled as error:
        raise _failed(f"hf.co/{repo}: HF_HUB_OFFLINE is set, so nothing can be downloaded") from error
    except errors.HFValidationError as error:
        raise ModelNotFound(f"{repo!r} cannot be the name of a repository") from error
    except errors.HfHubHTTPError as error:
        raise _refused(repo, error) from error
    except httpx2.TimeoutException as error:
        raise _failed(f"hf.co/{repo}: {constants.ENDPOINT} did not answer in time", status=504) from error
    except httpx2.HTTPError as error:
        raise _failed(f"hf.co/{repo}: cannot reach {constants.ENDPOINT}: {_first_line(error)}") from error
    except OSError as error:
        if error.errno in DISK_FULL:
            message = f"hf.co/{repo}: the disk of {root()} is full; partial data is kept"
            raise StartFailed(message, code="no_space") from error
        raise _failed(f"hf.co/{repo}: cannot write to {root()}: {error.strerror}") from error


def _refused(repo: str, error: HfHubHTTPError) -> ProxyError:
    """The error for an error status of the hub."""
    import huggingface_hub as hub

    endpoint, status = hub.constants.ENDPOINT, error.response.status_code
    terms = f"accept its terms at {endpoint}/{repo}"
    if isinstance(error, hub.errors.GatedRepoError):
        remedy = f"{terms} with the account of the token" if hub.get_token() else f"{terms}, and set HF_TOKEN"
        return _failed(f"hf.co/{repo} is gated: {remedy}", status=403, code="model_gated")
    if isinstance(error, hub.errors.EntryNotFoundError):
        return ModelNotFound(f"hf.co/{repo}: {endpoint} does not have the file that it lists")
    if isinstance(error, hub.errors.RepositoryNotFoundError) or status == 404:
        return ModelNotFound(f"there is no repository {repo} at {endpoint}, or it is private and needs a token")
    if status in (401, 403):
        return _failed(f"hf.co/{repo}: {endpoint} refuses the token (HF_TOKEN)", status=403, code="model_gated")
    return _failed(f"hf.co/{repo}: {endpoint} answered with status {status}")


def _failed(message: str, *, status: int = 503, code: str = "download_failed") -> StartFailed:
    return StartFailed(message, status=status, code=code)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _size(size: int) -> str:
    """A number of bytes, for display."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
