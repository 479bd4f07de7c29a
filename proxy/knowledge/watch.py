"""Looks after the knowledge base now and then: it follows the folders that are watched, and removes collections that
have been out of use for longer than they are kept.

Folders are polled, as network and bind mounts report no changes. Only files whose time, size or inode has changed are
read. Links are not followed: a folder that others write to would show them any file of the proxy's user.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from llama_smart_proxy.backends.threads import run_in_thread
from llama_smart_proxy.proxy.errors import ProxyError
from llama_smart_proxy.proxy.knowledge import catalogue
from llama_smart_proxy.proxy.knowledge.repeated import Repeated
from llama_smart_proxy.proxy.knowledge.sources import add_source, fail_source, remove_sources
from llama_smart_proxy.proxy.knowledge.tables import Kept

if TYPE_CHECKING:
    from llama_smart_proxy.proxy.config.knowledge import WatchedFolder
    from llama_smart_proxy.proxy.knowledge.knowledge import Knowledge, Opened

logger = logging.getLogger(__name__)

INTERVAL_S = 2.0
"""Shortest time in seconds between two looks at the folders; a look that takes long is made more seldom."""
SHARE = 20
"""The time between two looks is at least so many times that of a look."""
EXPIRY_S = 60.0
AT_ONCE = 2
"""Most files that are read at one time."""
_TEMPORARY = (".part", ".tmp", ".crdownload", ".swp", "~")


class Found(NamedTuple):
    """A file: its path, its size in bytes, and a text that is different after a change."""

    path: str
    size: int
    stamp: str


@dataclass(slots=True)
class Seen:
    """The documents below a folder, by the names of their sources, and the folders that cannot be read, with the
    reason."""

    files: dict[str, Found] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)

    def misses(self, path: str) -> bool:
        """Whether there is certainly no such file."""
        return path not in self.files and not any(path.startswith(f"{folder}{os.sep}") for folder in self.unreadable)


def look(folder: Path) -> Seen:
    """The documents in and below `folder`. Blocks on the disk."""
    seen = Seen()
    left = [str(folder)]
    while left:
        current = left.pop()
        try:
            with os.scandir(current) as entries:
                for entry in entries:
                    if entry.name.startswith((".", "~$")) or entry.name.endswith(_TEMPORARY):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        left.append(entry.path)
                    elif entry.is_file(follow_symlinks=False):
                        found = entry.stat(follow_symlinks=False)
                        seen.files[_source(entry.path)] = Found(entry.path, found.st_size, _stamp(found))
        except OSError as exc:
            seen.unreadable[current] = exc.strerror or type(exc).__name__
    return seen


def _source(path: str) -> str:
    """A path may have bytes that are no text."""
    return path.encode(errors="backslashreplace").decode()


def _stamp(found: os.stat_result) -> str:
    return f"{found.st_mtime_ns} {found.st_size} {found.st_ino}"


class Watcher:
    """The looks after `knowledge`, in a task of its own, which begins with the first `wake`."""

    def __init__(self, knowledge: Knowledge) -> None:
        self._knowledge = knowledge
        self._looks = Repeated(self._looked, "looks at watched folders")
        self._problems: dict[str, str] = {}
        self._devices: dict[str, int] = {}
        self._followed: set[str] = set()
        self._expired_s = 0.0

    def wake(self) -> None:
        """Look now."""
        self._looks.wake()

    async def close(self) -> None:
        """End it."""
        await self._looks.close()

    async def _looked(self) -> float:
        """The seconds until the next look."""
        began_s = time.monotonic()
        try:
            await self._look_after()
            self._remark("", "")
        except ProxyError as exc:
            self._remark("", exc.message)
        except Exception as exc:  # of the disk or the database: the next look may succeed
            logger.error("the watched folders were not looked at", exc_info=exc)
        if not self._folders and self._knowledge.is_open:
            return EXPIRY_S
        return max(INTERVAL_S, SHARE * (time.monotonic() - began_s))

    @property
    def _folders(self) -> Sequence[WatchedFolder]:
        return self._knowledge.config.watch

    async def _look_after(self) -> None:
        opened = await self._knowledge.opened()
        if time.monotonic() - self._expired_s > EXPIRY_S or not self._expired_s:
            self._expired_s = time.monotonic()
            for kept in await opened.database.run(partial(catalogue.expired, now_s=time.time())):
                logger.info("the collection %s has been out of use for %s days, and is removed", *_expired(kept))
                await opened.delete(kept)
        for folder in self._folders:
            await self._follow(opened, folder)

    async def _follow(self, opened: Opened, folder: WatchedFolder) -> None:
        path = folder.path.expanduser().absolute()
        seen = await run_in_thread(partial(look, path))
        for unreadable, reason in seen.unreadable.items():
            self._remark(unreadable, f"the folder {unreadable} cannot be read (setting knowledge.watch): {reason}")
        if str(path) in seen.unreadable or not await self._is_there(path, seen):
            return
        kept = await opened.database.run(partial(catalogue.of_operator, name=folder.collection))
        prefix = f"{_source(str(path))}{os.sep}"
        known = await opened.database.run(partial(catalogue.sources, collection=kept.serial, prefix=prefix))
        if gone := [known[source].document for source in known if seen.misses(source)]:
            await remove_sources(opened, gone)
        is_first = prefix not in self._followed
        self._followed.add(prefix)
        errors = {source: before.error for source, before in known.items()}
        changed = [
            (source, found)
            for source, found in seen.files.items()
            if source not in known or known[source].stamp != found.stamp or (is_first and errors[source])
        ]
        for at in range(0, len(changed), AT_ONCE):
            some, began_s = changed[at : at + AT_ONCE], time.monotonic()
            await asyncio.gather(*(_add(opened, kept, source, found, errors.get(source, "")) for source, found in some))
            await asyncio.sleep(time.monotonic() - began_s)  # half of the time belongs to those who chat

    async def _is_there(self, path: Path, seen: Seen) -> bool:
        """Whether this is the folder that it was: one whose disk is not mounted is empty, and nothing is removed."""
        device = (await run_in_thread(path.stat)).st_dev
        if seen.files:
            self._devices[str(path)] = device
        return self._devices.get(str(path), device) == device

    def _remark(self, subject: str, problem: str) -> None:
        if problem and self._problems.get(subject) != problem:
            logger.warning("%s", problem)
        self._problems[subject] = problem


def _expired(kept: Kept) -> tuple[str, int | None]:
    return kept.collection.name, kept.collection.days


async def _add(opened: Opened, kept: Kept, source: str, found: Found, error: str) -> None:
    """Add or replace a document; one that is being written has another stamp at the next look. One that cannot be read
    has no stamp, as it may be readable then without a change; `error` is why it could not be before."""
    limit = opened.ingestion.max_file_bytes
    reason = f"it is larger than {limit >> 20} MiB (setting knowledge.max_file_mib)" if found.size > limit else ""
    if not reason:
        try:
            await add_source(opened, kept, source, Path(found.path), "", move=False, stamp=found.stamp)
        except FileNotFoundError:
            return
        except OSError as exc:
            reason = f"it cannot be read: {exc.strerror}"
    if reason and reason != error:
        await fail_source(opened, kept, source, found.size, reason, "")
