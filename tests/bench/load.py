"""The load generator: `python -m tests.bench.load KIND JSON` drives one target once and prints one JSON object.

It reads the clocks of the measured processes itself, at the edges of a window in which every connection is up and
busy, so that neither its own start nor the first and last requests count. Everything that arrives is kept and compared
with what the stub sent. On a broken run it prints the reason to standard error and ends with code 1.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import uvloop

from tests.bench import apis, wire
from tests.bench.beside import BesideRun
from tests.bench.clients import Client, WholeClient, all_finished, connect
from tests.bench.firsts import first_tokens
from tests.bench.job import Job, Window
from tests.bench.memory import open_streams


class StreamClient(Client):
    """Takes one streamed answer; counting tokens is all it does while the window is open."""

    def __init__(self, run: StreamRun) -> None:
        super().__init__()
        self.run = run
        self.parts: list[bytes] = []
        self.last = b""

    def data_received(self, data: bytes) -> None:
        if not self.parts and not data.startswith(wire.OK):
            self.fail(wire.BrokenRun(f"expected status 200, got {data[:400]!r}"))
        seen = self.last + data  # the mark may straddle two pieces
        self.run.arrived(seen.count(wire.TOKEN_MARK), is_first=not self.parts)
        self.last = seen[1 - len(wire.TOKEN_MARK) :]
        self.parts.append(data)
        if self._ends(data):
            self.run.one_ended()
            self.succeed()

    def _ends(self, data: bytes) -> bool:
        size = len(wire.LAST_CHUNK)
        return (data if len(data) >= size else b"".join(self.parts[-size:])).endswith(wire.LAST_CHUNK)


class StreamRun:
    """`count` streams at once; the window is open from when all have begun until the first one ends."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.window = Window(job.pids)
        self.tokens = self.begun = 0

    def arrived(self, tokens: int, *, is_first: bool) -> None:
        self.tokens += tokens
        self.begun += is_first
        if is_first and self.begun == self.job.count:
            self.window.open(self.tokens)

    def one_ended(self) -> None:
        self.window.close(self.tokens)

    async def __call__(self) -> dict[str, float]:
        job = self.job
        clients = await connect(job.port, [StreamClient(self) for _ in range(job.count)])
        request = job.stream_request(job.each)
        for client in clients:
            client.transport.write(request)
        await all_finished(clients, job.timeout_s, lambda: f"{self.tokens} tokens arrived")
        for client in clients:
            apis.check_stream(b"".join(client.parts), job.api, job.model, job.each)
        return self.window.result()


class PlainClient(WholeClient):
    """Posts, checks the answer, posts again, as long as the run wants more."""

    def __init__(self, run: PlainRun) -> None:
        super().__init__()
        self.run = run

    def answered(self, response: bytes) -> None:
        try:
            wire.check_body(response, wire.plain_body())
        except wire.BrokenRun as broken:
            self.fail(broken)
        else:
            self.run.arrived()
            self.next()

    def next(self) -> None:
        if self.run.takes_one():
            self.transport.write(self.run.request)
        else:
            self.succeed()


class PlainRun:
    """`each` requests over `count` connections; the window leaves out the first and the last tenth."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.request = wire.plain_request()
        self.window = Window(job.pids)
        self.edge = job.each // 10
        self.taken = self.answered = 0

    def takes_one(self) -> bool:
        if self.taken == self.job.each:
            return False
        self.taken += 1
        return True

    def arrived(self) -> None:
        self.answered += 1
        if self.answered == self.edge:
            self.window.open(self.answered)
        elif self.answered == self.job.each - self.edge:
            self.window.close(self.answered)

    async def __call__(self) -> dict[str, float]:
        clients = await connect(self.job.port, [PlainClient(self) for _ in range(self.job.count)])
        for client in clients:
            client.next()
        await all_finished(clients, self.job.timeout_s, lambda: f"{self.answered} of {self.job.each} answers arrived")
        return self.window.result()


KINDS: dict[str, Callable[[Job], dict[str, float]]] = {
    "stream": lambda job: uvloop.run(StreamRun(job)()),
    "plain": lambda job: uvloop.run(PlainRun(job)()),
    "first": first_tokens,
    "beside": lambda job: uvloop.run(BesideRun(job)()),
    "open": lambda job: uvloop.run(open_streams(job)),
}


def main() -> None:
    kind, job = sys.argv[1], Job(**json.loads(sys.argv[2]))
    try:
        result = KINDS[kind](job)
    except (wire.BrokenRun, OSError) as broken:
        sys.exit(f"{kind}: {broken}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
