"""Memory of a proxy for each stream that is open: many at once, each of which has had its first token."""

from __future__ import annotations

import asyncio

from tests.bench import process, wire
from tests.bench.clients import Client, connect, leave
from tests.bench.job import Job

WARMING = 50


class OpenClient(Client):
    """Takes a streamed answer up to its first token, and reads on."""

    def __init__(self) -> None:
        super().__init__()
        self._head = b""

    def data_received(self, data: bytes) -> None:
        if self.finished.done():
            return
        self._head += data
        if not self._head.startswith(wire.OK):
            self.fail(wire.BrokenRun(f"expected status 200, got {self._head[:400]!r}"))
        elif wire.TOKEN_MARK in self._head:
            self.succeed()


async def open_streams(job: Job) -> dict[str, float]:
    """The resident memory that `job.count` open streams take, in KiB each. Some go first and are closed again: what the
    first requests bring into memory for good is not counted."""
    leave(await _opened(job, min(WARMING, job.count)))
    before_mib = process.rss_mib(job.pids)
    clients = await _opened(job, job.count)
    grown_mib = process.rss_mib(job.pids) - before_mib
    leave(clients)
    return {"streams": job.count, "kib_per_stream": grown_mib * 1024 / job.count}


async def _opened(job: Job, count: int) -> list[OpenClient]:
    clients = list(await connect(job.port, [OpenClient() for _ in range(count)]))
    request = job.stream_request(job.each)
    for client in clients:
        client.transport.write(request)
    async with asyncio.timeout(job.timeout_s):
        await asyncio.gather(*(client.finished for client in clients))
    return clients
