"""The knowledge base of this process. Nothing of it is opened, imported or started before it is used, but for what an
earlier run has left to do."""

from __future__ import annotations

import asyncio
import fcntl
import os
import time
from collections.abc import Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llama_smart_proxy.backends.threads import run_in_thread
from llama_smart_proxy.proxy.errors import ConfigError, Overloaded
from llama_smart_proxy.proxy.knowledge import catalogue
from llama_smart_proxy.proxy.knowledge.base import Index, Ranker, Reader, Viewer
from llama_smart_proxy.proxy.knowledge.calibration import Calibrations
from llama_smart_proxy.proxy.knowledge.catalogue import Change
from llama_smart_proxy.proxy.knowledge.contents import FOLDER, Contents
from llama_smart_proxy.proxy.knowledge.database import Database
from llama_smart_proxy.proxy.knowledge.index import make_index
from llama_smart_proxy.proxy.knowledge.ingestion import Ingestion
from llama_smart_proxy.proxy.knowledge.library import Library
from llama_smart_proxy.proxy.knowledge.shelves import Shelves
from llama_smart_proxy.proxy.knowledge.tables import SCHEMA, Kept, KeptMember
from llama_smart_proxy.proxy.knowledge.watch import Watcher
from llama_smart_proxy.proxy.store import Sql

if TYPE_CHECKING:
    from llama_smart_proxy.proxy.config.knowledge import KnowledgeConfig

T = TypeVar("T")

LOCK = "knowledge.lock"
FINISH_S = 2.0
"""Time limit in seconds at the end for changes that have begun."""


class Knowledge:
    """Owns the catalogue, the contents, the index and the work on the queue, in `folder` (None: there is none) and,
    with a `url`, in the Postgres there."""

    def __init__(
        self, folder: Path | None, url: str, config: KnowledgeConfig, embedder: Ranker, reader: Reader
    ) -> None:
        self.config = config
        self.embedder = embedder
        self._folder = folder
        self._contents = Contents(folder / FOLDER) if folder is not None else None
        self._url = url
        self._index_url = config.index.get_secret_value() if config.index is not None else ""
        self._reader = reader
        self._opening = asyncio.Lock()
        self._opened: Opened | None = None
        self._closed = False
        self._watcher = Watcher(self)

    def seen_by(self, viewer: Viewer) -> Library:
        """As one client sees it."""
        return Library(self, viewer)

    @property
    def contents(self) -> Contents:
        """The contents of documents. Raises: Overloaded if there is no folder for them."""
        if self._contents is None:
            raise Overloaded("there is no folder for the knowledge base (setting state_dir)", code="no_knowledge")
        return self._contents

    @property
    def is_open(self) -> bool:
        """Whether it is in use."""
        return self._opened is not None

    async def opened(self) -> Opened:
        """What it consists of, once it is open. Raises: Overloaded."""
        if self._opened is None:
            async with self._opening:
                self._opened = self._opened or await self._open()
        return self._opened

    async def _open(self) -> Opened:
        contents = self.contents
        if self._closed or self._folder is None:
            raise Overloaded("the proxy is shutting down")
        opened = Opened(self._folder, self._url, contents, self._index_url, self._reader, self.embedder)
        try:
            used = await opened.database.run(catalogue.digests)
            await run_in_thread(partial(contents.clear, used))
        except BaseException:
            await opened.close()
            raise
        opened.configure(self.config)
        self._watcher.wake()  # for collections that expire
        return opened

    async def start(self) -> None:
        """Begin to follow the watched folders, and go on with what an earlier run has begun."""
        left = self._folder is not None and any((self._folder / name).exists() for name in (FOLDER, SCHEMA.file))
        if left or self.config.watch:
            self._watcher.wake()

    def configure(self, config: KnowledgeConfig) -> None:
        """Follow the configuration."""
        self.config = config
        if self._opened is not None:
            self._opened.configure(config)
        if self._opened is not None or config.watch:
            self._watcher.wake()

    async def close(self) -> None:
        """End all work; what is in the queue stays there."""
        self._closed = True
        await self._watcher.close()
        if self._opened is not None:
            await self._opened.close()
        await self._reader.close()


class Opened:
    """The parts of a knowledge base that is in use."""

    def __init__(
        self, folder: Path, url: str, contents: Contents, index_url: str, reader: Reader, embedder: Ranker
    ) -> None:
        self._lock = _locked(folder)
        self.database = Database(folder, url)
        self.contents = contents
        self.shelves = Shelves(partial(_index_at, index_url), self.database)
        self.ingestion = Ingestion(self.database, contents, reader, embedder, self.shelves.change, self.step)
        self.calibrations = Calibrations(self.database, embedder)
        self.writing = asyncio.Lock()
        """Held while a content and its document come or go."""
        self.next_step = asyncio.Event()
        """Set at the next change of the counts of any collection."""
        self._used: dict[int, float] = {}
        self._finishing: set[asyncio.Task[Any]] = set()

    def configure(self, config: KnowledgeConfig) -> None:
        """Follow the configuration."""
        self.ingestion.max_file_bytes = config.max_file_mib << 20
        self.ingestion.wake()

    def step(self) -> None:
        """Counts of collections have changed."""
        self.next_step.set()
        self.next_step = asyncio.Event()

    def added(self) -> None:
        """There is something in the queue."""
        self.step()
        self.ingestion.wake()

    async def changed(self, changes: Sequence[Change]) -> None:
        """What is found has changed."""
        self.step()
        await self.shelves.change(changes)

    async def use(self, serials: Sequence[int]) -> None:
        """Note that these collections are in use, each once in a minute."""
        now_s = time.time()
        some = [serial for serial in serials if now_s - self._used.get(serial, 0.0) > 60]
        if some:
            self._used |= dict.fromkeys(some, now_s)
            await self.database.run(partial(catalogue.use, serials=some, now_s=now_s))

    async def finish(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a change of catalogue, contents and index, which is completed also if the caller is cancelled:
        the transaction would be committed all the same, and the others not follow it."""
        task = asyncio.get_running_loop().create_task(work, name="changes the knowledge base")
        self._finishing.add(task)
        task.add_done_callback(self._finishing.discard)
        return await asyncio.shield(task)

    async def delete(self, kept: Kept) -> None:
        """Remove a collection."""
        await self.finish(self._delete(kept))

    async def _delete(self, kept: Kept) -> None:
        async with self.writing:
            await self.remove(await self.database.run(partial(catalogue.delete, serial=kept.serial)))
        self.step()
        await self.shelves.drop(kept.collection.id)

    async def detach(self, found: KeptMember) -> None:
        """Remove a member; a document that came by its source has no other place."""
        await self.finish(self._detach(found))

    async def delete_document(self, serial: int, digest: str) -> None:
        """Remove a document, also from all collections."""
        await self.finish(self._delete_document(serial, digest))

    async def _delete_document(self, serial: int, digest: str) -> None:
        async with self.writing:
            changes = await self.database.run(partial(catalogue.delete_document, serial=serial))
            await self.remove([digest])
        await self.changed(changes)

    async def _detach(self, found: KeptMember) -> None:
        document = found.member.document

        def work(sql: Sql) -> list[Change]:
            known = catalogue.document(sql, document.id) if document.source else None
            return catalogue.delete_document(sql, known[0]) if known else [catalogue.detach(sql, found.serial)]

        async with self.writing:
            changes = await self.database.run(work)
            await self.remove([document.digest])
        await self.changed(changes)

    async def remove(self, digests: Sequence[str]) -> None:
        """Remove those of these contents that no document has any more; to be called with `writing` held."""

        def unused(sql: Sql) -> list[str]:
            return [digest for digest in digests if digest and not catalogue.is_used(sql, digest)]

        if not any(digests):
            return
        for digest in await self.database.run(unused):
            await run_in_thread(partial(self.contents.remove, digest))

    async def close(self) -> None:
        """End all work."""
        if self._finishing:
            _, late = await asyncio.wait(self._finishing, timeout=FINISH_S)
            for task in late:
                task.cancel()
        await self.calibrations.close()
        await self.ingestion.close()
        await self.shelves.close()
        self.database.close()
        os.close(self._lock)


def _locked(folder: Path) -> int:
    """The open file by which this process is the only one that has the knowledge base in `folder` open.

    Raises: Overloaded if another one has it.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as exc:
        raise Overloaded(f"the knowledge base cannot be kept (setting state_dir): {exc}", code="no_knowledge") from exc
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        os.close(file)
        reason = "another proxy has the knowledge base of this state_dir open; it can be used there"
        raise Overloaded(reason, code="no_knowledge") from exc
    return file


def _index_at(url: str) -> Index:
    try:
        return make_index(url)
    except ConfigError as exc:
        raise Overloaded("; ".join(exc.problems), code="no_knowledge") from exc
