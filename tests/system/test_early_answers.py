"""Answers to requests that have not arrived entirely: clients that send everything before they read get them."""

from __future__ import annotations

import asyncio
import http.client
import shutil
from asyncio.subprocess import PIPE
from contextlib import closing, suppress
from pathlib import Path

import pytest

from llama_smart_proxy.proxy.http import server
from tests.support.harness import running_proxy, until
from tests.support.here import served_here
from tests.support.raw_client import DEADLINE_S, connected, get, request
from tests.support.toxic import LAST_CHUNK, chunk

MIB = 2**20
SIZE = 24 * MIB
"""More than the buffers of two sockets."""
CHUNKS = 12
"""MiB of a body whose length is not known."""
CHAT = "/v1/chat/completions"
EARLY: dict[str, tuple[int, str, dict[str, str]]] = {
    "too large": (413, CHAT, {}),
    "too large for Ollama": (413, "/api/chat", {}),
    "too large for Anthropic": (413, "/v1/messages", {}),
    "no such endpoint": (404, "/v1/nothing", {}),
    "no such method": (405, "/v1/models", {}),
    "unknown coding": (415, CHAT, {"Content-Encoding": "br"}),
    "page of another origin": (403, CHAT, {"Origin": "http://evil.example"}),
    "offer of a web socket": (400, CHAT, {"Upgrade": "websocket", "Connection": "Upgrade"}),
    "header over the limit": (431, CHAT, {"X-Long": "x" * 20_000}),
    "headers over the limit": (431, CHAT, {f"X-{number}": "x" for number in range(120)}),
    "no HTTP": (400, CHAT, {"X-Odd": "a\x01b"}),
}


def blocking(port: int, path: str, headers: dict[str, str], *, in_chunks: bool) -> tuple[int, bytes]:
    """What a client of Python's library gets, which reads nothing before it has sent all."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)) as connection:
        connection.putrequest("POST", path)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.putheader(*(("Transfer-Encoding", "chunked") if in_chunks else ("Content-Length", str(SIZE))))
        connection.endheaders()
        for _ in range(CHUNKS if in_chunks else SIZE // MIB):
            connection.send(chunk(b" " * MIB) if in_chunks else b" " * MIB)
        if in_chunks:
            connection.send(LAST_CHUNK)
        answer = connection.getresponse()
        return answer.status, answer.read()


async def test_clients_that_send_all_before_they_read_get_an_early_answer() -> None:
    async with running_proxy({"server": {"max_body_mib": 1}}) as proxy:
        for name, (status, path, headers) in EARLY.items():
            for in_chunks in (False, True):
                got = await asyncio.to_thread(blocking, proxy.port, path, headers, in_chunks=in_chunks)
                assert got[0] == status and b'"error"' in got[1], (name, in_chunks, got)
        assert (await get(proxy.port, "/health")).status == 200


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
async def test_curl_shows_an_early_answer(tmp_path: Path) -> None:
    file = tmp_path / "body"
    file.write_bytes(b" " * SIZE)
    async with running_proxy({"server": {"max_body_mib": 1}}) as proxy:
        for more in ([], ["-H", "Expect:"]):
            argv = ["curl", "-sS", "--data-binary", f"@{file}", *more, f"{proxy.url}{CHAT}"]
            process = await asyncio.create_subprocess_exec(*argv, stdout=PIPE, stderr=PIPE)
            shown, errors = await process.communicate()
            assert process.returncode == 0 and b"larger than 1 MiB" in shown, (more, shown, errors)


LIMITS = {"REST_S": 0.3, "REST_PAUSE_S": 0.1, "REST_BYTES": MIB, "LEAST_REST_BYTES": MIB}


@pytest.mark.parametrize(
    ("refused", "limit"),
    [
        *((refused, limit) for refused in ("too large", "no HTTP") for limit in ("REST_S", "REST_PAUSE_S")),
        ("too large", "LEAST_REST_BYTES"),
        ("no HTTP", "REST_BYTES"),
    ],
)
async def test_what_is_discarded_has_limits(monkeypatch: pytest.MonkeyPatch, refused: str, limit: str) -> None:
    pause_s = 0.05 if limit == "REST_S" else 300.0
    others = {"REST_S": 300.0, "REST_PAUSE_S": pause_s, "REST_BYTES": 2**40, "LEAST_REST_BYTES": 2**40}
    for name, value in {**others, limit: LIMITS[limit]}.items():
        monkeypatch.setattr(server, name, value)
    _, path, headers = EARLY[refused]
    sent = request("POST", path, headers=[("Content-Length", str(2**50)), *headers.items()])
    async with served_here({"server": {"max_body_mib": 1}}) as (front, port), connected(port) as client:
        await client.send(sent)
        _, status, _ = await client.head()
        assert status == EARLY[refused][0]
        with suppress(ConnectionError):
            while front.clients and limit != "REST_PAUSE_S":
                await client.send(b" " * (1 if limit == "REST_S" else 2**16))
                await asyncio.sleep(0.01)
        await until(lambda: not front.clients, what="the end of the connection")


async def test_a_connection_with_an_early_answer_ends_with_its_client_and_answers_nothing_more() -> None:
    async with served_here({"server": {"max_body_mib": 1}}) as (front, port):
        async with connected(port) as client:
            await client.send(request("POST", CHAT, headers=[("Content-Length", str(8 * MIB))]))
            assert (await client.head())[1] == 413
            await client.send(b" " * 8 * MIB + request("GET", "/health"))
            assert (await client.rest()).count(b"HTTP/1.1") == 0
            assert front.clients and front.quiet.is_set()
        await until(lambda: not front.clients, what="the end of the connection")
