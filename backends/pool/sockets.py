"""Unix sockets for the children: a folder that only this user can enter, for as long as the proxy runs.

A proxy that was killed leaves its folder behind; the next one removes it. Which folder belongs to a living proxy is
known by a lock, which the kernel releases however that ends.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from llama_smart_proxy.proxy.errors import StartFailed

PREFIX = "llama-smart-proxy-"
LOCK = "lock"
LONGEST = 103
"""Most bytes of a socket's path on every system (Linux: 107). Source: `sun_path` in unix(7), less its final null."""


class SocketFolder:
    """Hands out paths for sockets. The folder is made with the first one."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._lock = -1

    def path(self) -> str:
        """A path that no socket has had. Blocks.

        Raises: `StartFailed` if no folder can be made, or only one whose path is too long.
        """
        if self._folder is None or not self._folder.is_dir():
            self.close()
            self._make()
        return f"{self._folder}/{secrets.token_hex(4)}.sock"

    def example(self) -> str:
        """What such a path looks like."""
        return f"{_bases()[0]}/{PREFIX}xxxxxxxx/xxxxxxxx.sock"

    def close(self) -> None:
        """Remove the folder."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            os.close(self._lock)
            self._folder = None

    def _make(self) -> None:
        reasons = []
        for base in _bases():
            if len(os.fsencode(base)) + len(f"/{PREFIX}12345678/12345678.sock") > LONGEST:
                reasons.append(f"{base} is too long for a socket's path")
                continue
            try:
                self._folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))  # mode 0700
                self._lock = os.open(self._folder / LOCK, os.O_CREAT | os.O_RDWR, 0o600)
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as exc:
                reasons.append(f"{base}: {exc.strerror}")
        raise StartFailed(f"No folder for unix sockets (llama_cpp.transport; TMPDIR): {'; '.join(reasons)}.")


def remove_stale() -> None:
    """Remove the folders of this user whose proxies have ended. Blocks."""
    for base in _bases():
        for folder in Path(base).glob(f"{PREFIX}*"):
            with suppress(OSError):
                if folder.stat(follow_symlinks=False).st_uid == os.geteuid():
                    _remove_if_unlocked(folder)


def _remove_if_unlocked(folder: Path) -> None:
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _bases() -> list[str]:
    """Where such a folder may be, the best one first."""
    return list(dict.fromkeys(filter(None, (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp"))))
