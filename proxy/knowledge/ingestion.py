"""Reads, embeds and stores what is in the queue, a few files at a time.

Everything is in the database before it begins, so that it goes on after the end of the process, and within a file with
the first piece that is not stored. A file that cannot be read has failed; an embedding model that does not answer is
asked again, later and later, and no file fails by it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from llama_smart_proxy.proxy.errors import BadRequest, ProxyError, UpstreamRefused
from llama_smart_proxy.proxy.knowledge import queue
from llama_smart_proxy.proxy.knowledge.base import Embedder, Piece, Reader, Unreadable
from llama_smart_proxy.proxy.knowledge.catalogue import Change
from llama_smart_proxy.proxy.knowledge.contents import Contents
from llama_smart_proxy.proxy.knowledge.database import Database
from llama_smart_proxy.proxy.knowledge.queue import Job, Staged
from llama_smart_proxy.proxy.knowledge.repeated import Repeated
from llama_smart_proxy.proxy.store import Sql

if TYPE_CHECKING:
    from llama_smart_proxy.proxy.knowledge.base import Vectors

logger = logging.getLogger(__name__)

BATCH = 8
"""Most texts that are embedded at a time: a question waits for one such batch at most."""
STORED_AT_ONCE = 256
"""Pieces of a file that are stored in one transaction, and embedded again after a kill at worst."""
FILES_AT_ONCE = 8
"""Most files that are embedded and stored together, while they have fewer than `BATCH` pieces."""
HARMLESS = "text"
FIRST_RETRY_S, LAST_RETRY_S = 1.0, 60.0
_OF_THE_TEXT = frozenset({400, 413, 422})
"""The statuses with which a server refuses a text that it would also refuse the next time."""


class _Reading(NamedTuple):
    """A file that has been read: its version, how many of its pieces are stored already, and all of them."""

    job: Job
    version: int
    stored: int
    pieces: Sequence[Piece]


class Totals:
    """What one run of the queue has done."""

    def __init__(self) -> None:
        self.began_s = time.monotonic()
        self.files = self.failed = self.pieces = 0

    def __str__(self) -> str:
        spent_s = max(time.monotonic() - self.began_s, 1e-3)
        failed = f", {self.failed} of them not readable" if self.failed else ""
        return f"{self.files} files{failed}, {self.pieces} pieces in {spent_s:.1f} s ({self.pieces / spent_s:.0f}/s)"


class Ingestion:
    """The work on the queue in `database`. `on_change` is awaited with what is found from then on, `on_step` is called
    after each change of the states of files."""

    def __init__(
        self,
        database: Database,
        contents: Contents,
        reader: Reader,
        embedder: Embedder,
        on_change: Callable[[Sequence[Change]], Awaitable[None]],
        on_step: Callable[[], None],
    ) -> None:
        self.max_file_bytes = 100 * 2**20
        self.problem = ""
        """Why nothing is added for now, such as a model that does not answer; empty while all is well."""
        self._database = database
        self._contents = contents
        self._reader = reader
        self._embedder = embedder
        self._on_change = on_change
        self._on_step = on_step
        self._work = Repeated(self._queue_worked_off, "ingestion of documents")
        self._retry_s = FIRST_RETRY_S
        self._identity = ""
        self._totals: Totals | None = None

    def wake(self) -> None:
        """There is something in the queue, or the configuration has changed."""
        self._work.wake()

    async def close(self) -> None:
        """End the work."""
        await self._work.close()

    async def _queue_worked_off(self) -> float | None:
        """The seconds after which it is to be tried again; None if nothing is left in the queue."""
        try:
            await self._outdated()
            while await self._step():
                self._retry_s, self.problem = FIRST_RETRY_S, ""
            self.problem = ""
            return None
        except ProxyError as exc:
            return self._later(exc.message)
        except Exception as exc:  # of the database, the disk, an index: nothing may end this for good
            logger.error("documents are not added now", exc_info=exc)
            return self._later(type(exc).__name__)

    def _later(self, reason: str) -> float:
        wait_s, self._retry_s = self._retry_s, min(self._retry_s * 2, LAST_RETRY_S)
        self.problem = reason
        logger.warning("documents wait for %.0f s before they are added: %s", wait_s, reason)
        return wait_s

    async def _step(self) -> bool:
        """Work on the next files. Returns False if there are none. Raises: ProxyError of the embedding model."""
        if not await self._database.run(partial(queue.jobs, limit=1)):
            self._report()
            return False
        self._totals = self._totals or Totals()
        identity = await self._embedder.identity()
        readings = await self._read(identity)
        if not readings:
            return True
        try:
            await self._embed(readings, identity)
        except (BadRequest, UpstreamRefused) as exc:
            if exc.status not in _OF_THE_TEXT:
                raise
            await self._apart(readings, identity)
        return True

    async def _outdated(self) -> None:
        """Queue what has vectors of another model than the present one, if there is one."""
        try:
            identity = await self._embedder.identity()
        except ProxyError:
            return
        if identity != self._identity:
            if changed := await self._database.run(partial(queue.outdate, identity=identity)):
                logger.info("%d files are embedded again, as the embedding model is another one", changed)
            self._identity = identity

    def _report(self) -> None:
        if self._totals is not None:
            logger.info("added to the knowledge base: %s", self._totals)
            self._totals = None

    async def _read(self, identity: str) -> list[_Reading]:
        """The next files, until they have enough pieces for a batch. Those that cannot be read have failed."""
        found: list[tuple[Job, Sequence[Piece]]] = []
        for job in await self._database.run(partial(queue.jobs, limit=FILES_AT_ONCE)):
            if sum(len(pieces) for _, pieces in found) >= BATCH:
                break
            try:
                found.append((job, await self._pieces(job)))
            except Unreadable as exc:
                await self._failed(job, str(exc))
            except ProxyError:  # as when no process can be started
                raise
            except Exception as exc:  # a defect of the reader: the other files go on
                logger.error("document %s cannot be read", job.document.name, exc_info=exc)
                await self._failed(job, f"reading it failed: {type(exc).__name__}")

        def begin(sql: Sql) -> list[_Reading]:
            return [_Reading(job, *queue.begin(sql, job, identity), pieces) for job, pieces in found]

        return [reading for reading in await self._database.run(begin) if reading.version]

    async def _pieces(self, job: Job) -> list[Piece]:
        """Raises: Unreadable."""
        document = job.document
        if not document.digest:
            raise Unreadable("its content is not there")
        if document.bytes > self.max_file_bytes:
            raise Unreadable(f"it is larger than {self.max_file_bytes >> 20} MiB (setting knowledge.max_file_mib)")
        file = self._contents.path(document.digest)
        try:
            pieces = await self._reader.read(file, document.name, document.media_type, job.chunking)
        except OSError as exc:
            raise Unreadable(f"its content cannot be read: {exc.strerror}") from exc
        if not pieces:
            raise Unreadable("there is no text in it")
        return pieces

    async def _failed(self, job: Job, reason: str) -> None:
        await self._database.run(partial(queue.fail, job=job, reason=reason))
        self.count_failed(job.document.name, reason)
        self._on_step()

    def count_failed(self, name: str, reason: str) -> None:
        """A file cannot be read."""
        logger.warning("document %s cannot be added: %s", name, reason)
        if self._totals is not None:
            self._totals.files += 1
            self._totals.failed += 1

    async def _apart(self, readings: Sequence[_Reading], identity: str) -> None:
        """Embed each file alone: one of them has a text that is refused, if the model refuses no harmless one, neither
        before nor after it; else the model has failed, or has just recovered."""
        await self._embedder.embed([HARMLESS], background=True)  # raises if it refuses any text
        for reading in readings:
            version, stored = await self._database.run(partial(queue.begin, job=reading.job, identity=identity))
            if not version:
                continue
            try:
                await self._embed([reading._replace(version=version, stored=stored)], identity)
            except (BadRequest, UpstreamRefused) as exc:
                if exc.status not in _OF_THE_TEXT:
                    raise
                await self._embedder.embed([HARMLESS], background=True)
                await self._failed(reading.job, f"the embedding model refuses it: {exc.message}")

    async def _embed(self, readings: Sequence[_Reading], identity: str) -> None:
        """Embed and store files. Raises: ProxyError; what is stored by then stays."""
        pending = (
            (reading.version, number, Piece(*map(_storable, reading.pieces[number])))
            for reading in readings
            for number in range(reading.stored, len(reading.pieces))
        )
        rows: list[Staged] = []
        while batch := list(islice(pending, BATCH)):
            vectors = await self._embedder.embed([piece.text for _, _, piece in batch], background=True)
            rows += _staged(batch, vectors)
            self._count_pieces(len(batch))
            if len(rows) >= STORED_AT_ONCE:
                some, rows = rows, []
                await self._database.run(partial(queue.store, rows=some))
        await self._complete(readings, rows, identity)
        if self._totals is not None:
            self._totals.files += len(readings)

    def _count_pieces(self, number: int) -> None:
        if self._totals is not None:
            self._totals.pieces += number

    async def _complete(self, readings: Sequence[_Reading], rows: Sequence[Staged], identity: str) -> None:
        def work(sql: Sql) -> list[Change]:
            queue.store(sql, rows)
            changes = [queue.complete(sql, reading.job, reading.version, identity) for reading in readings]
            return [change for change in changes if change is not None]

        changes = await self._database.run(work)
        self._on_step()
        await self._on_change(changes)


def _storable(text: str) -> str:
    """Without what databases refuse."""
    return text if text.isascii() and "\0" not in text else text.replace("\0", " ").encode(errors="replace").decode()


def _staged(batch: Sequence[tuple[int, int, Piece]], vectors: Vectors) -> list[Staged]:
    data: Any = vectors.astype("<f2")
    return [
        Staged(version, number, piece.heading, piece.text, data[row].tobytes())
        for row, (version, number, piece) in enumerate(batch)
    ]
