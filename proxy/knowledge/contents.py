"""The contents of documents, each once, in a folder of the state directory, in files that are called as their SHA-256.

All functions block on the disk.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Collection
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

FOLDER = "knowledge"
_BLOCK = 1024 * 1024
_NEW = ".new"
"""The end of the name of a file that is being written."""


class Spooled(NamedTuple):
    """A content in a file of its own, its SHA-256 in hexadecimal, and its size in bytes."""

    file: Path
    digest: str
    size: int


class Contents:
    """The files in `folder`, which is made with the first one. Only the user of the proxy can read them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def incoming(self) -> Path:
        """A folder for files that are to be taken. What an earlier run has left there is removed at first."""
        folder = self._folder / "incoming"
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        for file in folder.iterdir():
            file.unlink(missing_ok=True)
        return folder

    def path(self, digest: str) -> Path:
        """Where the content with this digest is, if it is there."""
        return self._folder / digest

    def take(self, file: Path, *, move: bool) -> Spooled:
        """Take the content of `file`, which is moved or copied. It is kept only with `keep`. Raises: OSError."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = self._folder / f"{secrets.token_hex(8)}{_NEW}"
        try:
            if not move or not _moved(file, new):
                return Spooled(new, *_copied(file, new))
            return Spooled(new, *digest_of(new))
        except BaseException:
            new.unlink(missing_ok=True)
            raise
        finally:
            if move:
                file.unlink(missing_ok=True)

    def keep(self, spooled: Spooled) -> None:
        """Keep a content that was taken; it may be kept already. Raises: OSError."""
        try:
            os.replace(spooled.file, self.path(spooled.digest))
        except FileNotFoundError:
            if not self.path(spooled.digest).exists():
                raise

    def remove(self, digest: str) -> None:
        """Remove a content, if it is there."""
        with suppress(OSError):
            self.path(digest).unlink(missing_ok=True)

    def clear(self, used: Collection[str]) -> None:
        """Remove what a crash has left behind: all but the contents with these digests. With none in use, only files
        that were being written: the database may be a new one in place of one that was damaged."""
        with suppress(OSError):
            left = [file for file in self._folder.iterdir() if file.is_file() and file.name not in used]
            for file in left if used else [file for file in left if file.suffix == _NEW]:
                file.unlink(missing_ok=True)
            _ = self.incoming


def digest_of(file: Path) -> tuple[str, int]:
    """The SHA-256 of a file in hexadecimal, and its size in bytes. Raises: OSError."""
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256")
        return digest.hexdigest(), opened.tell()


def _moved(file: Path, target: Path) -> bool:
    """Whether `file` was moved: it is on the same file system."""
    try:
        os.chmod(file, 0o600)
        os.rename(file, target)
    except OSError:
        return False
    return True


def _copied(file: Path, target: Path) -> tuple[str, int]:
    hashed, size = hashlib.sha256(), 0
    with file.open("rb") as read, open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as write:
        while block := read.read(_BLOCK):
            hashed.update(block)
            write.write(block)
            size += len(block)
    return hashed.hexdigest(), size
