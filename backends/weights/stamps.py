"""Whether a file is still the one that was read: what is read of files is kept by their stamps."""

from __future__ import annotations

import os
from pathlib import Path

MAGIC = b"GGUF"
Stamp = tuple[int, int, int, int]
"""Device and inode of a file, the time of its last change in ns, and its size in bytes."""

_known: dict[str, tuple[Stamp, bool]] = {}


def stamp_of(status: os.stat_result) -> Stamp:
    """The stamp of a file."""
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def is_gguf(path: Path | str, stamp: Stamp | None = None) -> bool:
    """Whether it begins with the magic number of GGUF. A file that has the same `stamp`, by default its present one, as
    when it was read is not opened again. Raises: `OSError`."""
    name = os.fspath(path)
    stamp = stamp or stamp_of(os.stat(name))
    known = _known.get(name)
    if known is None or known[0] != stamp:
        with open(name, "rb") as file:
            known = _known[name] = stamp, file.read(len(MAGIC)) == MAGIC
    return known[1]
