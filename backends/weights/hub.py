"""Models of the Hugging Face hub: fetched into the local cache, verified, and only then to be seen there."""

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

from llama_smart_proxy.backends.threads import in_thread
from llama_smart_proxy.backends.weights.downloads import Progress, Work
from llama_smart_proxy.backends.weights.filenames import DEFAULT_VARIANT, choose
from llama_smart_proxy.backends.weights.hub_cache import REPO, Folder, cached_models, delete, is_gguf, root
from llama_smart_proxy.backends.weights.hub_http import FILE, Lie, RemoteFile, Stopped, fetch, manifest
from llama_smart_proxy.proxy.errors import ModelNotFound, ProxyError, StartFailed

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

__all__ = ["PREFIXES", "cached_models", "delete", "download_name", "parse_name", "pull", "work"]

PREFIXES = ("hf.co/", "huggingface.co/")
"""How the name of a model of the hub begins."""
TELL_S = 0.1
LOCK_S = 0.5
READ_BYTES = 1024 * 1024
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def parse_name(name: str) -> tuple[str, str] | None:
    """`hf.co/org/repo:variant` as repository and variant; None for anything else.

    Without a variant, or with Ollama's `latest`, it is Q4_K_M. Neither part can lead out of the cache.
    """
    prefix = next((prefix for prefix in PREFIXES if name.lower().startswith(prefix)), None)
    if prefix is None:
        return None
    repo, colon, variant = name[len(prefix) :].partition(":")
    if not REPO.fullmatch(repo) or (colon and not FILE.fullmatch(variant)):
        return None
    return repo, DEFAULT_VARIANT if variant in ("", "latest") else variant


def download_name(repo: str, variant: str | None) -> str:
    """What the download of a model is called in `Downloads`, so that all who want it find the same one."""
    return f"hf.co/{repo}:{variant or DEFAULT_VARIANT}"


def work(repo: str, variant: str | None) -> Work:
    """The download of one model, for `Downloads.join`; what it does and raises is `pull`'s.

    When it is cancelled its thread ends with the next piece of data, at the latest when the connection times out.
    """

    async def do(tell: Callable[[Progress], None]) -> None:
        loop = asyncio.get_running_loop()
        stopped = threading.Event()

        def told(progress: Progress) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(tell, progress)

        try:
            await in_thread(partial(pull, repo, variant, told, stopped))
        finally:
            stopped.set()

    return do


def pull(repo: str, variant: str | None, tell: Callable[[Progress], None], stopped: threading.Event) -> None:
    """Bring the newest version of a model into the cache; blocks. `tell` gets its progress, in Ollama's words.

    What is there is not fetched again. However it ends, what has come stays, unless it was wrong.

    Raises: `ModelNotFound`; `StartFailed` (codes `model_gated`, `no_space`, `download_failed`); `Stopped` soon after
    `stopped` was set.
    """
    with _told_apart(repo):
        tell({"status": "pulling manifest"})
        files = manifest(repo)
        folder = Folder(repo)
        wanted = [files[name] for name in choose(f"hf.co/{repo}", files, variant or DEFAULT_VARIANT)]
        (folder.path / "blobs").mkdir(parents=True, exist_ok=True)
        (folder.path / "snapshots").mkdir(exist_ok=True)
        folder.drop_partials({file.digest for file in files.values()})
        _check_room(folder, wanted)
        for file in wanted:
            _get(folder, file, tell, stopped)
        tell({"status": "writing manifest"})
        folder.publish(wanted[0].commit, {file.name: file.digest for file in wanted})


def _get(folder: Folder, file: RemoteFile, tell: Callable[[Progress], None], stopped: threading.Event) -> None:
    """Have the verified bytes of one file in the cache. Whoever else fetches it is waited for."""
    kind = "sha256" if len(file.digest) == 64 else "sha1"
    status = {"status": f"pulling {file.digest[:12]}", "digest": f"{kind}:{file.digest}", "total": file.size}
    told_at = 0.0

    def completed(size: int) -> None:
        nonlocal told_at
        now = time.monotonic()
        if now - told_at >= TELL_S or size == file.size:
            told_at = now
            tell({**status, "completed": size})

    with _locked(folder.lock(file.digest), stopped):
        if _is_here(folder, file):
            completed(file.size)
            return
        part = folder.partial(file.digest)
        fetch(file, part, completed, stopped)
        tell({"status": f"verifying {kind} digest"})
        try:
            _verify(part, file, stopped)
        except Lie:
            part.unlink()
            raise
        part.replace(folder.blob(file.digest))


def _is_here(folder: Folder, file: RemoteFile) -> bool:
    """Whether its bytes are in the cache. Bytes that another program left unfinished there are removed."""
    held = folder.held(file.commit, file.name, file.digest)
    if held is not None and held.stat().st_size != file.size:
        held.unlink()
        held = None
    return held is not None


def _verify(path: Path, file: RemoteFile, stopped: threading.Event) -> None:
    """See that the bytes on the disk are those the hub announced, and stay there. Raises: `Lie`, `Stopped`."""
    digest = hashlib.sha256()
    if len(file.digest) == 40:
        digest = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    with path.open("rb") as data:
        while piece := data.read(READ_BYTES):
            if stopped.is_set():
                raise Stopped
            digest.update(piece)
        os.fsync(data.fileno())
    if digest.hexdigest() != file.digest:
        raise Lie(f"{file.name} has another digest than it had announced")
    if not is_gguf(path):
        raise Lie(f"{file.name} is not a GGUF file")


def _check_room(folder: Folder, wanted: list[RemoteFile]) -> None:
    """Raises: `StartFailed` (code `no_space`) when the disk has no room for what is still to come."""
    missing = 0
    for file in wanted:
        if not _is_here(folder, file):
            with suppress(FileNotFoundError):
                missing -= folder.partial(file.digest).stat().st_size
            missing += file.size
    free = shutil.disk_usage(folder.path).free
    if missing > free:
        message = f"hf.co/{folder.repo}: no space for it: {_size(missing)} are to be fetched, {_size(free)} are free"
        raise StartFailed(f"{message} in {folder.path.parent}", code="no_space")


@contextmanager
def _locked(path: Path, stopped: threading.Event) -> Iterator[None]:
    """Hold the lock that keeps two downloads of the same bytes apart, also those of other programs."""
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        while True:
            if stopped.is_set():
                raise Stopped
            try:
                stack.enter_context(FileLock(path, timeout=LOCK_S, mode=0o664))
            except Timeout:
                continue
            except NotImplementedError:  # a file system without locks
                pass
            break
        yield


@contextmanager
def _told_apart(repo: str) -> Iterator[None]:
    """Turns whatever goes wrong outside of this program into an error that says what it is, in one line."""
    import httpx2
    from huggingface_hub import constants, errors

    try:
        yield
    except Lie as lie:
        raise _failed(f"hf.co/{repo}: {constants.ENDPOINT} sent something wrong: {lie}") from lie
    except errors.OfflineModeIsEnabled as error:
        raise _failed(f"hf.co/{repo}: HF_HUB_OFFLINE is set, so nothing can be fetched") from error
    except errors.HFValidationError as error:
        raise ModelNotFound(f"{repo!r} cannot be the name of a repository") from error
    except errors.HfHubHTTPError as error:
        raise _refused(repo, error) from error
    except httpx2.TimeoutException as error:
        raise _failed(f"hf.co/{repo}: {constants.ENDPOINT} did not answer in time", status=504) from error
    except httpx2.HTTPError as error:
        raise _failed(f"hf.co/{repo}: cannot reach {constants.ENDPOINT}: {_first_line(error)}") from error
    except OSError as error:
        if error.errno in NO_ROOM:
            message = f"hf.co/{repo}: the disk of {root()} is full; what was fetched is kept"
            raise StartFailed(message, code="no_space") from error
        raise _failed(f"hf.co/{repo}: cannot write to {root()}: {error.strerror}") from error


def _refused(repo: str, error: HfHubHTTPError) -> ProxyError:
    """What an answer of the hub with an error status means."""
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
    """A number of bytes as people read it."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
