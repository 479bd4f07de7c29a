"""The upstream: `python -m tests.bench.stub`, an HTTP/1.1 server that does as little as it can for each answer.

It prints its port on the first line of standard output, serves until it is told to stop, and answers a chat request
with canned bytes: a stream of as many tokens as the question asks for, one chunk and one write each, or else one JSON
object at once. It is an OpenAI-style server and an Ollama server on one port.
"""

from __future__ import annotations

import asyncio
import json
import math
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import uvloop

from tests.bench import wire


@dataclass(frozen=True)
class Face:
    """How one kind of server streams: its head, the frame of each token, and what ends an answer of so many tokens."""

    head: bytes
    frame: Callable[[int], bytes]
    last: Callable[[int], bytes]


OPENAI = Face(
    b"HTTP/1.1 200 OK\r\nServer: llama.cpp\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
    b"Access-Control-Allow-Origin: \r\n\r\n",
    wire.token,
    lambda tokens: wire.DONE,
)
OLLAMA = Face(
    b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n",
    wire.line,
    wire.last_line,
)


def _whole(status: bytes, body: bytes) -> bytes:
    head = b"HTTP/1.1 %b\r\nServer: llama.cpp\r\nContent-Type: application/json; charset=utf-8\r\n" % status
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


PLAIN = _whole(b"200 OK", wire.plain_body())
MODELS = _whole(b"200 OK", json.dumps({"object": "list", "data": [{"id": wire.MODEL, "object": "model"}]}).encode())
OLLAMA_MODELS = _whole(
    b"200 OK", json.dumps({"models": [{"name": wire.OLLAMA_MODEL, "model": wire.OLLAMA_MODEL}]}).encode()
)
VERSION = _whole(b"200 OK", b'{"version":"0.12.6"}')
UNKNOWN = _whole(b"404 Not Found", b'{"error":{"message":"no such path","code":404}}')
ANSWERS = {
    **dict.fromkeys((b"/v1/models", b"/models", b"/health"), MODELS),
    **dict.fromkeys((b"/api/tags", b"/api/ps"), OLLAMA_MODELS),
    b"/api/version": VERSION,
}


MOST_KEPT = 32 * 1024
"""Bytes of a request that are waited for as a whole; of a longer one, what comes first holds all that matters."""
STEP_S = 0.001
"""The event loop's clock ticks in milliseconds; streams take turns to start at each tick of an interval."""


class Stream:
    """One streamed answer, on an absolute schedule: a late write is not followed by later ones.

    How many streams write in the same millisecond decides how often a proxy wakes for a token, and so its cost; so the
    schedule is the same for every target, whatever the moment at which its requests arrived.
    """

    _opened = 0

    def __init__(self, transport: asyncio.Transport, face: Face, tokens: int, interval_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport = transport
        self._face = face
        self._tokens = tokens
        self._interval_s = interval_s
        turn = Stream._opened % round(interval_s / STEP_S)
        Stream._opened += 1
        self._began = math.ceil(self._loop.time() / interval_s) * interval_s + turn * STEP_S
        self._next = 1
        transport.write(face.head + wire.chunk(face.frame(0)))
        self._arm()

    def _arm(self) -> None:
        self._loop.call_at(self._began + self._next * self._interval_s, self._tick)

    def _tick(self) -> None:
        if self._transport.is_closing():
            return
        if self._next == self._tokens:
            self._transport.write(wire.chunk(self._face.last(self._tokens)) + wire.LAST_CHUNK)
            return
        self._transport.write(wire.chunk(self._face.frame(self._next)))
        self._next += 1
        self._arm()


class Stub(asyncio.Protocol):
    """One connection: whole requests in, canned answers out. A proxy never pipelines, so nor does this expect it.

    Of a large body only the beginning is kept, so that uploads do not delay the streams of others.
    """

    def __init__(self) -> None:
        self._pending = b""
        self._upload: tuple[bytes, bytes] | None = None
        """Head, and what is kept of the body, of a request most of which is still to come."""
        self._missing = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._upload is not None:
            self._missing -= len(data)
            if self._missing <= 0:
                upload, self._upload = self._upload, None
                self._answer(*upload)
            return
        data = self._pending + data
        end = data.find(b"\r\n\r\n")
        size = end + 4 + (wire.content_length(data[:end]) or 0)
        if end < 0 or len(data) < size <= MOST_KEPT:
            self._pending = data
            return
        head, body = data[:end], data[end + 4 : size]
        self._pending = data[size:]
        if len(data) < size:
            self._upload, self._missing = (head, body), size - len(data)
        else:
            self._answer(head, body)

    def _answer(self, head: bytes, body: bytes) -> None:
        if not head.startswith(b"POST "):
            self._transport.write(ANSWERS.get(head.split(b" ")[1], UNKNOWN))
        elif asked := wire.asked(body):
            face = OLLAMA if head.startswith(b"POST /api/chat ") else OPENAI
            Stream(self._transport, face, asked[0], asked[1] / 1000)
        else:
            self._transport.write(PLAIN)


async def main() -> None:
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stopped.set)
    server = await loop.create_server(Stub, "127.0.0.1", 0, backlog=512)
    print(server.sockets[0].getsockname()[1], flush=True)
    await stopped.wait()
    server.close()


if __name__ == "__main__":
    uvloop.run(main())
