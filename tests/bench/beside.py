"""How late the tokens of a stream come while others upload large bodies.

The stub sends on a fixed schedule, so a token's delay is what its arrival is behind that of the earliest token, less
the time between the two in the schedule.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from tests.bench import wire
from tests.bench.clients import Client, WholeClient, connect, leave
from tests.bench.job import Job

STREAMS = 8
QUIET_S = 0.3
"""Time in which streams run alone: their tokens show when the others are due."""
NUMBERS, LISTS, OBJECTS, TEXT = "numbers", "lists", "objects", "text"
ITEMS = {NUMBERS: ("12345", ","), LISTS: ("[" * 200 + "]" * 200, ","), OBJECTS: ('{"a": 0}', ", ")}
"""Item and separator of a long list, by shape. Numbers and lists are compact; objects are as Python writes them."""
SHAPES = (*ITEMS, TEXT)
"""What is in a body: of all JSON what takes a parser the longest, and what most large bodies are."""


def body(shape: str, size: int) -> bytes:
    """A chat request of about `size` bytes, for an answer that is not streamed."""
    if shape == TEXT:
        held = f'"{"data " * (size // 5)}"'
    else:
        item, separator = ITEMS[shape]
        held = f"[{separator.join([item] * (size // len(item + separator)))}]"
    return b'{"model":"%b","messages":[{"role":"user","content":"hi"}],"x":%b}' % (wire.MODEL.encode(), held.encode())


class Upload(WholeClient):
    """One upload. A proxy that is late enough refuses some, which is no reason to report nothing."""

    refused = False

    def answered(self, response: bytes) -> None:
        self.refused = not response.startswith(wire.OK)
        self.succeed()


class Watcher(Client):
    """One stream; `arrivals` holds when each token came."""

    def __init__(self) -> None:
        super().__init__()
        self.arrivals: list[float] = []
        self._last = b""
        self._changed = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        seen = self._last + data  # head or mark may straddle two pieces
        if not self._last and not data.startswith(wire.OK):
            self.fail(wire.BrokenRun(f"expected status 200, got {data[:400]!r}"))
        self.arrivals += [now] * seen.count(wire.TOKEN_MARK)
        self._last = seen[1 - len(wire.TOKEN_MARK) :]
        self._changed.set()

    def fail(self, error: wire.BrokenRun) -> None:
        super().fail(error)
        self._changed.set()

    async def more(self, count: int) -> None:
        """Return once so many further tokens have arrived. Raises: `wire.BrokenRun` if the stream has failed."""
        enough = len(self.arrivals) + count
        while len(self.arrivals) < enough:
            if self.finished.done():
                self.finished.result()
            self._changed.clear()
            await self._changed.wait()

    def worst_delay_s(self, interval_s: float) -> float:
        """The first token is left out: it has no place in the schedule."""
        late = [at - number * interval_s for number, at in enumerate(self.arrivals)][1:]
        return max(late) - min(late)


class BesideRun:
    """`STREAMS` streams of `each` tokens at most, and `count` uploads at once of a body of `job.shape`."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.request = wire.post_raw(wire.CHAT_PATH, body(job.shape, job.size))

    async def __call__(self) -> dict[str, float]:
        job = self.job
        uploads = await connect(job.port, [Upload() for _ in range(job.count)])
        watchers = await connect(job.port, [Watcher() for _ in range(STREAMS)])
        for watcher in watchers:
            watcher.transport.write(job.stream_request(job.each))
        try:
            async with asyncio.timeout(job.timeout_s):
                await self._next_tokens(watchers)
                await asyncio.sleep(QUIET_S)
                began = time.perf_counter()
                for upload in uploads:
                    upload.transport.write(self.request)
                    await asyncio.sleep(0)  # streams are read meanwhile
                await asyncio.gather(*(upload.finished for upload in uploads))
                spent_s = time.perf_counter() - began
                await self._next_tokens(watchers)
        except TimeoutError:
            answered = sum(upload.finished.done() and not upload.finished.cancelled() for upload in uploads)
            raise wire.BrokenRun(f"after {job.timeout_s:.0f} s {answered} of {job.count} were answered") from None
        finally:
            leave([*uploads, *watchers])
        worst_s = max(watcher.worst_delay_s(job.interval_ms / 1000) for watcher in watchers)
        refused = sum(upload.refused for upload in uploads)
        return {"worst_delay_ms": worst_s * 1000, "seconds": spent_s, "refused": refused}

    async def _next_tokens(self, watchers: Sequence[Watcher]) -> None:
        """Return once each stream has had two more: what was late has come, then."""
        for watcher in watchers:
            await watcher.more(2)
