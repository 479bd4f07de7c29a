"""Time to the first token: streamed requests one after the other on one connection, by a plain blocking socket."""

from __future__ import annotations

import socket
import time

from tests.bench import wire
from tests.bench.job import Job

TOKENS = 3


def first_tokens(job: Job) -> dict[str, float]:
    """Milliseconds from sending a request to having its first whole frame, over `job.each` requests.

    A tenth as many requests go first and are not counted.

    Raises: `BrokenRun` when an answer is not, byte for byte, what the stub sent.
    """
    request = job.stream_request(TOKENS)
    with socket.create_connection(("127.0.0.1", job.port), timeout=job.timeout_s) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(job.each // 10):
            _once(connection, request)
        times_ms = sorted(_once(connection, request) for _ in range(job.each))
    return {"requests": job.each, "p50_ms": _percentile(times_ms, 50), "p99_ms": _percentile(times_ms, 99)}


def _once(connection: socket.socket, request: bytes) -> float:
    began = time.perf_counter()
    connection.sendall(request)
    response, first = b"", 0.0
    while not response.endswith(wire.LAST_CHUNK):
        data = connection.recv(65536)
        if not data:
            raise wire.BrokenRun(f"the target closed the connection after {response[-200:]!r}")
        response += data
        if not first and b"\n\n" in response:
            first = time.perf_counter() - began
    wire.check_body(response, wire.stream_body(TOKENS))
    return first * 1000


def _percentile(ordered: list[float], percent: int) -> float:
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]
