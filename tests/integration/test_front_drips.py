"""Clients that send what frames a body, and no body: a limit of time or of size ends each of them."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from llama_smart_proxy.proxy.http import server
from tests.support.harness import until
from tests.support.here import served_here
from tests.support.raw_client import connected, request
from tests.support.toxic import chunk

HEAD = request("POST", "/v1/chat/completions", headers=[("Transfer-Encoding", "chunked")])
BEGUN = HEAD + chunk(b'{"model":"none"' + b" " * 50_000)
ENDLESS: dict[str, tuple[bytes, bytes]] = {
    "a first chunk size": (HEAD, b"0"),
    "an extension of the first chunk": (HEAD + b"5;x=", b"y"),
    "a later chunk size": (BEGUN, b"0"),
    "an extension of a later chunk": (BEGUN + b"5;x=", b"y"),
    "a trailer": (BEGUN + b"0\r\nX-Long: ", b"x"),
    "trailers": (BEGUN + b"0\r\n", b"X: y\r\n"),
}
ENDLESS_HEADS = {
    "a request line": (b"GET /", b"x"),
    "a header": (b"GET / HTTP/1.1\r\nX: ", b"x"),
    "headers": (b"GET / HTTP/1.1\r\n", b"X: y\r\n"),
    "blank lines": (b"", b"\r\n"),
}


async def ended(first: bytes, again: bytes, *, times: int, pause_s: float) -> None:
    """Return when a client has been disconnected that sends `again` so many times at once, again and again."""
    async with served_here({"server": {"head_timeout_s": 1.0}}) as (front, port), connected(port) as client:
        await client.send(first)
        await until(lambda: front.clients, what="the connection")
        with suppress(ConnectionError):
            while front.clients:
                await client.send(again * times)
                await asyncio.sleep(pause_s)


@pytest.mark.parametrize("name", ENDLESS)
async def test_what_frames_a_body_does_not_extend_the_time_for_one(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(server, "BODY_STALL_S", 0.3)
    await ended(*ENDLESS[name], times=1, pause_s=0.01)


@pytest.mark.parametrize("name", [name for name in ENDLESS if "railer" not in name])  # these are headers too large
async def test_what_frames_a_body_does_not_count_as_one(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(server, "BODY_GRACE_S", 0.3)
    monkeypatch.setattr(server, "MIN_BODY_RATE", 100_000)
    await ended(*ENDLESS[name], times=4096, pause_s=0.01)


@pytest.mark.parametrize("name", ENDLESS)
async def test_what_frames_a_body_has_a_limit(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(server, "MOST_FRAMING", 2**19)
    monkeypatch.setattr(server, "REST_PAUSE_S", 0.1)
    monkeypatch.setattr(server, "REST_BYTES", 2**19)
    await ended(*ENDLESS[name], times=2**14, pause_s=0)


@pytest.mark.parametrize("name", ENDLESS_HEADS)
async def test_bytes_of_a_head_do_not_extend_the_time_for_one(name: str) -> None:
    await ended(*ENDLESS_HEADS[name], times=1, pause_s=0.02)


async def test_a_body_in_chunks_of_a_byte_is_a_body(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MOST_FRAMING", 1000)
    body = b'{"model":"none"' + b" " * 20_000 + b"}"
    async with served_here({"server": {"head_timeout_s": 0.2}}) as (_, port), connected(port) as client:
        pieces = [chunk(bytes([byte])) for byte in body]
        for start in range(0, len(pieces), 200):
            await client.send(HEAD * (start == 0) + b"".join(pieces[start : start + 200]))
            await asyncio.sleep(0.01)  # so that the limits are looked at meanwhile
        await client.send(b"0\r\n\r\n")
        assert (await client.answer()).status == 404


@pytest.mark.parametrize("rest", [b"zz\r\n", b"5\r\nabcdefgh\r\n", b"-1\r\n", b"0\r\nX: " + b"x" * 20_000])
async def test_a_body_that_breaks_off_into_something_else_is_refused_at_once(rest: bytes) -> None:
    async with served_here({}) as (_, port):
        for together in (True, False):
            async with connected(port) as client:
                await client.send(BEGUN + rest * together)
                if not together:
                    await asyncio.sleep(0.05)  # so that the handler waits for the body
                    await client.send(rest)
                assert (await client.answer()).status in (400, 431)
