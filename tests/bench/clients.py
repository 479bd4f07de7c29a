"""What every load has in common: connections to the target, and the wait for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

from tests.bench import wire


class Client(asyncio.Protocol):
    """One connection. `finished` is done when it has had all it waits for, failed when the target hung up or lied."""

    def __init__(self) -> None:
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.fail(wire.BrokenRun(f"the target closed a connection early ({exc})"))

    def succeed(self) -> None:
        if not self.finished.done():
            self.finished.set_result(None)

    def fail(self, error: wire.BrokenRun) -> None:
        if not self.finished.done():
            self.finished.set_exception(error)


class WholeClient(Client):
    """Takes answers that are not streamed, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self._pending = b""

    def data_received(self, data: bytes) -> None:
        data = self._pending + data
        end = data.find(b"\r\n\r\n")
        length = wire.content_length(data[:end])
        whole = data.endswith(wire.LAST_CHUNK) if length is None else len(data) >= end + 4 + length
        self._pending = b"" if whole else data
        if not whole:
            return
        self.answered(data)

    def answered(self, response: bytes) -> None:
        """A whole answer is there."""
        self.succeed()


AnyClient = TypeVar("AnyClient", bound=Client)


async def connect(port: int, clients: Sequence[AnyClient]) -> Sequence[AnyClient]:
    """Connect all clients, one after the other (a burst would measure the backlog), and return them."""
    loop = asyncio.get_running_loop()
    unconnected = iter(clients)
    for _ in clients:
        await loop.create_connection(lambda: next(unconnected), "127.0.0.1", port)
    return clients


async def all_finished(clients: Sequence[Client], timeout_s: float, progress: Callable[[], str]) -> None:
    """Wait until all have what they wait for, and disconnect them.

    Raises: `BrokenRun` as soon as one fails, or at the deadline.
    """
    try:
        async with asyncio.timeout(timeout_s):
            await asyncio.gather(*(client.finished for client in clients))
    except TimeoutError:
        raise wire.BrokenRun(f"not finished after {timeout_s:.0f} s: {progress()}") from None
    finally:
        leave(clients)


def leave(clients: Sequence[Client]) -> None:
    """Disconnect all clients."""
    for client in clients:
        client.finished.cancel()
        client.transport.abort()
