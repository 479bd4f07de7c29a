"""A disk that does not answer: a file system in user space whose server never reads a request."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

MNT_DETACH = 2
libc = ctypes.CDLL(None, use_errno=True)


class Disk:
    """`folder`, of which every look hangs from `stop` to `resume`. Those that hang then fail, and what was in it is
    there again. A process that hangs can be killed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._server = -1
        self._mounted = False

    def stop(self) -> None:
        """Skips the test where that is not allowed."""
        try:
            server = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            pytest.skip("needs root and /dev/fuse")
        options = f"fd={server},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
        if libc.mount(b"deaf", os.fsencode(self.folder), b"fuse", 0, options) != 0:
            os.close(server)
            pytest.skip("needs the right to mount")
        self._server, self._mounted = server, True

    def fail(self) -> None:
        """Every look fails from now on, until `resume`."""
        if not self._mounted:
            self.stop()
        os.close(self._server)
        self._server = -1

    def resume(self) -> None:
        """Without effect if it was not stopped."""
        if self._mounted:
            libc.umount2(os.fsencode(self.folder), MNT_DETACH)
            self._mounted = False
        if self._server >= 0:
            with suppress(OSError):
                os.close(self._server)
            self._server = -1


@contextmanager
def stopping_disk(folder: Path) -> Iterator[Disk]:
    """A disk that answers, until it is stopped."""
    folder.mkdir(parents=True, exist_ok=True)
    disk = Disk(folder)
    try:
        yield disk
    finally:
        disk.resume()


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """`folder` on a disk of `size` bytes. Skips the test where mounting is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    if libc.mount(b"small", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode()) != 0:
        pytest.skip("needs the right to mount")
    try:
        yield
    finally:
        libc.umount2(os.fsencode(folder), MNT_DETACH)
